"""The model card says what was measured, and carries the base's licence over."""

from pathlib import Path

import pytest
import yaml
from tests.quantize.small_runs import CPU, recipe_of, recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_core.manifest_files import verify_files
from lowbit_quantize.export.autogptq import AutoGptq
from lowbit_quantize.export.exporter import export
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.run.companions import CARD

BASE_CARD = """---
license: other
license_name: a-licence
license_link: https://example.org/licence
language:
- en
- de
tags:
- chat
---

# The base
"""


def head_of(file: Path) -> dict[str, object]:
    found: dict[str, object] = yaml.safe_load(file.read_text().split("---\n")[1])
    return found


def test_it_has_the_licence_of_the_base_and_the_figures_of_the_manifest(tmp_path: Path) -> None:
    base, out = write_tiny_model(tmp_path / "base", "qwen3_moe"), tmp_path / "out"
    (base / CARD).write_text(BASE_CARD)
    passes = [{"prune_experts": {"keep_experts": 4}}, "quantize"]
    rule = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
    manifest = quantize(str(base), recipe_with(rule, passes=passes), out, CPU)
    head, text = head_of(out / CARD), (out / CARD).read_text()
    assert head["license_name"] == "a-licence"
    assert head["language"] == ["en", "de"]
    assert head["tags"] == ["lowbit", "compressed-tensors", "W4A16"]
    assert "base_model" not in head  # which is an address on the hub
    assert f"{manifest.quality.mean_kld:.4f} ± {manifest.quality.kld_stderr:.4f}" in text
    assert "Routed experts: 4 of 8" in text
    assert f"| W4A16 | 64 | rtn | as they are | {len(manifest.modules)} |" in text
    assert "The base\n" not in text
    assert "licence" in manifest.base.left_out[CARD]
    verify_files(out, manifest, hashes=True)
    assert CARD in manifest.files


def test_what_older_readers_get_has_a_card_of_its_own(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    (base / CARD).write_text(BASE_CARD)
    quantize(str(base), recipe_of("awq-g64"), tmp_path / "out", CPU)
    manifest = export(tmp_path / "out", AutoGptq(), tmp_path / "older")
    text = (tmp_path / "older" / CARD).read_text()
    assert head_of(tmp_path / "older" / CARD)["license"] == "other"
    assert "autogptq" in text
    assert "This format holds no scales of an FP8 KV cache" in text
    assert "lowbit serve" not in text
    verify_files(tmp_path / "older", manifest, hashes=False)


@pytest.mark.parametrize(
    "card",
    [
        "",
        "# no head",
        "---\n: [",
        "---\n- a list\n---\n",
        "---\nlicense: 2024-99-99\n---\n",
        "\ufeff---\nlicense: mit\n---",
    ],
)
def test_a_card_that_has_no_head_or_a_wrong_one_is_no_obstacle(card: str, tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path / "base")
    (base / CARD).write_text(card)
    quantize(str(base), recipe_of("awq-g64"), tmp_path / "out", CPU)
    assert head_of(tmp_path / "out" / CARD)["library_name"] == "transformers"


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"scheme": "FP8_DYNAMIC"}, "reads it as it is, as FP8_PER_CHANNEL_PER_TOKEN."),
        ({"scheme": "W4A16", "group_size": 64}, "does not read it as it is: it takes no 4-bit weights"),
        ({"scheme": "W8A8"}, "does not read it as it is: it would read 8-bit integers as FP8"),
    ],
)
def test_it_says_what_tensorrt_llm_makes_of_it(rule: dict[str, object], said: str, tmp_path: Path) -> None:
    base, out = write_tiny_model(tmp_path / "base", "llama"), tmp_path / "out"
    quantize(str(base), recipe_with({"match": "*", **rule, "methods": ["rtn"]}), out, CPU)
    assert f"TensorRT-LLM, by its own rules and not run, {said}" in (out / CARD).read_text()
