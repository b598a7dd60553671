"""Experts of this year's families are pruned, routers fitted anew, and criteria compared, whoever it is that routes.

Some count their experts by keys of their own, some keep a bias for each beside the router, some route in the block.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.quantize.small_runs import CPU, PLAIN_CACHE, heldout_ids, mean_kld, recipe_of, recipe_with
from tests.quantize.tiny_families import config_of
from tests.tiny_models import SIZES, VOCABULARY, seeded_model, tiny_tokenizer
from transformers import HunYuanMoEV1Config

from lowbit_core.errors import ModelError
from lowbit_core.manifest import Manifest
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.check.expert_report import report_experts
from lowbit_quantize.model.experts.routing import expert_count, experts_used
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize

COUNTED = {  # by which key of the file
    "mixtral": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
    "deepseek_v32": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
    "minimax_m2": "num_local_experts",
    "granitemoehybrid": "num_local_experts",
    "qwen3_next": "num_experts",
    "nemotron_h": "n_routed_experts",
    "kimi_linear": "num_experts",
    "gpt_oss": "num_local_experts",
    "lfm2_moe": "num_experts",
    "ernie4_5_moe": "moe_num_experts",
    "phimoe": "num_local_experts",
}
ROUTED_BY_BLOCK = ("deepseek_v3", "minimax_m2", "ernie4_5_moe", "gpt_oss")


@pytest.fixture(scope="module")
def routed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Directories of tiny models by family, made once."""
    made: dict[str, Path] = {}

    def of(family: str, **sizes: int) -> Path:
        key = f"{family} {sizes}"
        if key not in made:
            config = config_of(family)
            config.update({"vocab_size": VOCABULARY, **sizes})
            made[key] = tmp_path_factory.mktemp(family)
            model = seeded_model(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    if not parameter.any():  # routers and their biases that begin with zeros tie
                        parameter.normal_(std=0.2)
            model.save_pretrained(made[key])
            tiny_tokenizer().save_pretrained(made[key])
        return made[key]

    return of


def run(base: Path, out: Path, *passes: Any) -> Manifest:
    recipe = recipe_of("awq-g64", "modules=[]", PLAIN_CACHE, f"passes={json.dumps(passes)}")
    manifest = quantize(str(base), recipe, out, CPU)
    before, after = (load_model(find_model(str(place)), CPU).model for place in (base, out))
    assert mean_kld(before, after, heldout_ids(base, recipe)) == pytest.approx(
        manifest.quality.mean_kld, abs=1e-3
    )
    return manifest


@pytest.mark.parametrize("family", COUNTED)
def test_a_pruned_model_is_what_was_measured(family: str, routed: Any, tmp_path: Path) -> None:
    base, out = routed(family), tmp_path / "out"
    manifest = run(base, out, {"prune_experts": {"keep_experts": 3}})
    assert manifest.quality.mean_kld > 1e-3
    assert manifest.experts is not None
    assert (manifest.experts.experts, manifest.experts.kept) == (4, 3)
    written = json.loads((out / "config.json").read_text())
    assert written[COUNTED[family]] == 3
    assert {written.get(key, 3) for key in COUNTED.values()} == {3}


@pytest.mark.parametrize("family", ROUTED_BY_BLOCK)
def test_routers_are_fitted_anew(family: str, routed: Any, tmp_path: Path) -> None:
    manifest = run(routed(family), tmp_path / "out", {"prune_experts": {"keep_experts": 2}}, "distill_router")
    assert manifest.trial is not None
    assert manifest.trial.kld_with != manifest.trial.kld_without  # whichever is kept: routers did move


@pytest.mark.parametrize("family", ROUTED_BY_BLOCK)
def test_criteria_are_compared(family: str, routed: Any, tmp_path: Path) -> None:
    for kept, low, high in ((3, 1e-4, 2.0), (4, 0.0, 1e-9)):
        recipe = recipe_of("awq-g64", PLAIN_CACHE, f'passes=[{{"prune_experts":{{"keep_experts":{kept}}}}}]')
        report = report_experts(str(routed(family)), recipe, tmp_path / "report.json", CPU)
        assert report["experts"] == 4
        assert all(low <= error <= high for error in report["mean_error"][str(kept)].values())


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({}, r"\(none; looked for: num_experts"),
        ({"num_experts": 8, "n_routed_experts": 4}, "num_experts = 8, n_routed_experts = 4"),
        ({"num_experts": [4, 8]}, r"\(none; looked for"),
    ],
)
def test_a_count_that_is_not_said_in_one_way_is_refused(keys: dict[str, Any], says: str) -> None:
    with pytest.raises(ModelError, match=says):
        expert_count(SimpleNamespace(**keys))


def test_how_many_a_token_uses_must_be_said() -> None:
    assert experts_used(SimpleNamespace(moe_k=3)) == 3
    with pytest.raises(ModelError, match="how many experts a token uses"):
        experts_used(SimpleNamespace(num_experts=4))


@pytest.mark.parametrize("similarity", ["output", "router"])
def test_experts_that_read_a_latent_are_compared_and_aligned_on_it(
    similarity: str, routed: Any, tmp_path: Path
) -> None:
    merging = {"keep_experts": 2, "consolidate": "permute", "similarity": similarity}
    manifest = run(routed("nemotron_h", moe_latent_size=32), tmp_path / "out", {"prune_experts": merging})
    assert manifest.experts is not None
    assert {len(absorbed) for absorbed in manifest.experts.absorbed_by_layer.values()} == {2}


@pytest.mark.parametrize("methods", [["gptq"], ["awq", "gptq"]])
def test_experts_that_read_a_latent_are_quantized_on_it(
    methods: list[str], routed: Any, tmp_path: Path
) -> None:
    wide = {"moe_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64}
    base, out = routed("nemotron_h", moe_latent_size=32, **wide), tmp_path / "out"
    recipe = recipe_with({"match": "*", "scheme": "W4A16", "group_size": 32, "methods": methods})
    manifest = quantize(str(base), recipe, out, CPU)
    assert sum(".experts." in one.name for one in manifest.modules) == 8
    before, after = (load_model(find_model(str(place)), CPU).model for place in (base, out))
    assert mean_kld(before, after, heldout_ids(base, recipe)) == pytest.approx(
        manifest.quality.mean_kld, abs=2e-3
    )


def test_a_router_that_reads_in_float32_leaves_experts_in_their_type(tmp_path: Path) -> None:
    """Hunyuan's; experts that see few tokens borrow what it reads, and merging looks at that too."""
    config = HunYuanMoEV1Config(
        **SIZES | {"num_hidden_layers": 2},
        num_experts=4,
        moe_topk=2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    base, recipe = tmp_path / "base", recipe_with({"match": "*", "scheme": "W4A16", "group_size": 32})
    seeded_model(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    manifest = quantize(str(base), recipe, tmp_path / "out", CPU)
    before, after = (load_model(find_model(str(place)), CPU).model for place in (base, tmp_path / "out"))
    assert mean_kld(before, after, heldout_ids(base, recipe)) == pytest.approx(
        manifest.quality.mean_kld, abs=4e-3
    )
    merging = {"keep_experts": 2, "consolidate": "permute"}
    merged = run(base, tmp_path / "merged", {"prune_experts": merging}, "distill_router")
    assert merged.trial is not None
