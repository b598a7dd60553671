"""Plans by sensitivities: layers differ where that loses less, and predicted KL is a target like any other."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lowbit_core.errors import ConfigError
from lowbit_plan.work import Product, parts_of
from lowbit_quantize.check.preflight import dry_run
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import load_recipe, parse_recipe
from lowbit_quantize.sensitivity.report import Sensitivity

GIB = 1 << 30
Run = Callable[..., tuple[int, dict[str, Any], str]]
Models = Callable[[str], Path]
OPTIONS: dict[str, dict[str, Any]] = {
    "W4A16": {"scheme": "W4A16", "group_size": 64, "methods": ["rtn"]},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC", "methods": ["rtn"]},
    "none": {"scheme": "none"},
}
KL = {"W4A16": 0.01, "FP8_DYNAMIC": 0.001, "none": 0.0}  # of a decision, times one more than its place
CACHE_KL = 0.002  # of a layer
TEXT = {"num_samples": 16, "max_seq_length": 64}


def write_sensitivity(model: Path, out: Path) -> None:
    """A document as `lowbit sensitivity` writes it, in which later decisions lose more."""
    reference = find_model(str(model))
    plans = {}
    for name, rule in OPTIONS.items():
        rules = [] if name == "none" else [{"match": "*", **rule}]
        sections = {"modules": rules, "passes": ["quantize"] if rules else [], "kv_cache": "none"}
        plans[name] = make_plan(
            reference, parse_recipe(sections | {"calibration": TEXT, "quality": TEXT}, "a test")
        )
    parts = {
        name: [(names, part) for names, part in parts_of(plan) if isinstance(part, Product)]
        for name, plan in plans.items()
    }
    decisions: list[dict[str, Any]] = []
    for place, (names, plain) in enumerate(parts["none"]):
        choices = {
            name: {
                "bytes": parts[name][place][1].bytes,
                "bits": 4.0,
                "kl": KL[name] * (place + 1),
                "kl_stderr": 0.0,
            }
            for name in OPTIONS
        }
        published = [plans["none"].names.published(one) for one in names]
        layer = int(published[0].split(".")[2])
        decisions.append(
            {"name": f"{place}", "layer": layer, "kind": "linears", "modules": published,
             "weights": plain.inputs * plain.outputs, "choices": choices}
        )  # fmt: skip
    for layer in range(3):
        choice = {"fp8": {"bytes": 128, "bits": 8.0, "kl": CACHE_KL, "kl_stderr": 0.0}}
        decisions.append(
            {"name": f"{layer}.kv_cache", "layer": layer, "kind": "kv_cache", "modules": [], "weights": 0,
             "choices": choice}
        )  # fmt: skip
    text = {
        "dataset": "default",
        "num_samples": 1,
        "max_seq_length": 64,
        "tokens": 64,
        "seed": 0,
        "sha256": "",
    }
    found = Sensitivity.model_validate(
        {
            "base": {"name": model.name, "sha256": reference.sha256, "other_bytes": 0},
            "recipe": {}, "seed": 0, "candidates": [{"name": name, **rule} for name, rule in OPTIONS.items()],
            "decisions": decisions, "calibration": text, "scored": text,
            "run": {"device": "cpu", "seconds": 1.0, "cpu_seconds": 1.0, "peak_rss_bytes": 1},
        }
    )  # fmt: skip
    out.write_text(found.model_dump_json(), encoding="utf-8")


def test_a_mix_loses_less_than_one_scheme_in_the_same_memory(
    plan: Run, tiny_model: Models, tmp_path: Path, written: Callable[..., Path]
) -> None:
    model, file = tiny_model("llama"), written("llama")
    flags = (model, "--context", 256, "--on", "L40S", "--sensitivity", file)
    wide = plan(*flags)[1]
    by_name = {one["candidate"]: one for one in wide["met"]}
    assert wide["met"][0]["candidate"] == "bf16"
    assert by_name["W4A16"]["kl"] == pytest.approx(0.01 * sum(range(1, 13)))
    assert by_name["W4A16, FP8 cache"]["kl"] == pytest.approx(by_name["W4A16"]["kl"] + 3 * CACHE_KL)

    between = (by_name["W4A16"]["needed_bytes"] + by_name["FP8_DYNAMIC"]["needed_bytes"]) // 2
    out = tmp_path / "recipe.yaml"
    _, narrow, _ = plan(*flags, "--fit", between, "--out", out)
    best = narrow["met"][0]
    assert best["candidate"] in ("mixed", "mixed, FP8 cache")
    assert by_name["FP8_DYNAMIC"]["kl"] < best["kl"] < by_name["W4A16"]["kl"]
    told = dry_run(str(model), load_recipe(str(out), ("calibration.max_seq_length=64", "quality.max_seq_length=64")),
                   48e9 / GIB, 1 << 30)  # fmt: skip
    assert best["weights_bytes"] == told["checkpoint_bytes"]


def test_the_mix_is_the_best_of_all_that_could_be_chosen(
    plan: Run, tiny_model: Models, written: Callable[..., Path]
) -> None:
    model, file = tiny_model("llama"), written("llama")
    flags = (model, "--context", 256, "--on", "L40S", "--sensitivity", file)
    by_name = {one["candidate"]: one for one in plan(*flags)[1]["met"]}
    four, eight = by_name["W4A16"], by_name["FP8_DYNAMIC"]
    limit = (four["itl_s"] + eight["itl_s"]) / 2
    mixes = [one for one in plan(*flags, "--itl-ms", 1e3 * limit)[1]["met"] if one["candidate"] == "mixed"]
    # Every product of W4A16 and FP8 in the twelve places; kernels of a card are known from the uniform ones' parts.
    found = json.loads(file.read_text())["decisions"][:12]
    bandwidth = 0.8 * 864e9
    fixed = four["itl_s"] - sum(one["choices"]["W4A16"]["bytes"] for one in found) / bandwidth
    best = min(
        sum(one["choices"][name]["kl"] for one, name in zip(found, names, strict=True))
        for names in itertools.product(("W4A16", "FP8_DYNAMIC"), repeat=12)
        if fixed
        + sum(one["choices"][name]["bytes"] for one, name in zip(found, names, strict=True)) / bandwidth
        <= limit
    )
    assert mixes[0]["kl"] == pytest.approx(best)
    assert mixes[0]["itl_s"] <= limit


def test_a_limit_on_kl_is_a_target(plan: Run, tiny_model: Models, written: Callable[..., Path]) -> None:
    flags = (tiny_model("llama"), "--context", 256, "--on", "L40S", "--sensitivity", written("llama"))
    by_name = {one["candidate"]: one for one in plan(*flags)[1]["met"]}
    short = by_name["FP8_DYNAMIC"]["needed_bytes"] - 1000
    status, report, _ = plan(*flags, "--fit", short, "--max-kld", 1e-6)
    assert status == 1
    takes = " ".join(report["missed"][0]["takes"])
    assert "--max-kld" in takes or "GiB" in takes
    assert plan(*flags, "--max-kld", by_name["FP8_DYNAMIC"]["kl"])[0] == 0


def test_sensitivities_of_another_model_are_refused(
    plan: Run, tiny_model: Models, written: Callable[..., Path]
) -> None:
    with pytest.raises(ConfigError, match=r"--sensitivity is of .*, other files than"):
        plan(tiny_model("olmo2"), "--context", 64, "--on", "L4", "--sensitivity", written("llama"))
    with pytest.raises(ConfigError, match="has its own candidates"):
        plan(
            tiny_model("llama"),
            "--context",
            64,
            "--on",
            "L4",
            "--sensitivity",
            written("llama"),
            "--schemes",
            "bf16",
        )


@pytest.fixture
def written(tiny_model: Models, tmp_path: Path) -> Callable[..., Path]:
    """`written(family)` is a file of sensitivities of its tiny model."""

    def write(family: str) -> Path:
        file = tmp_path / "sensitivity.json"
        write_sensitivity(tiny_model(family), file)
        return file

    return write
