"""The page of a checkpoint: complete for every manifest, bounded in size, and no name in it is markup."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from tests.core.test_core import example
from tests.page_checks import check_page, outside_the_library, specs

from lowbit_core.checkpoint_page import places
from lowbit_core.checkpoint_page.page import as_html
from lowbit_core.checkpoint_page.places import MOST_LAYERS, few_layers, place_of
from lowbit_core.cli import main
from lowbit_core.manifest import MANIFEST_NAME, Manifest, write_manifest
from lowbit_core.pages.html import library

EVIL = "</script><script>alert(1)</script><b onclick='x'>&amp;\"`"


def changed(**fields: Any) -> Manifest:
    """The example with other fields."""
    return Manifest.model_validate({**example({}).model_dump(), **fields})


def linear(name: str, error: float = 0.01, **fields: Any) -> dict[str, Any]:
    return {
        "name": name, "scheme": "W4A16", "bits": 4.0, "group_size": 64, "symmetric": True, "methods": ["gptq"],
        "error": error, "alpha": None, "weights": 64, "bytes": 34, **fields,
    }  # fmt: skip


def dense(layers: int) -> list[dict[str, Any]]:
    roles = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    return [
        linear(f"model.layers.{layer}.{role}", 0.001 * (1 + layer))
        for layer in range(layers)
        for role in roles
    ]


def experts(**fields: Any) -> dict[str, Any]:
    return {
        "experts": 4, "kept": 2, "criterion": "reap", "kept_by_layer": {0: [0, 3], 1: [1, 2]},
        "under_calibrated": [{"layer": 1, "expert": 0, "tokens": 3}], **fields,
    }  # fmt: skip


def run(**phases_s: float) -> dict[str, Any]:
    return {
        "device": "cpu", "seconds": 10.0, "cpu_seconds": 18.0, "peak_rss_bytes": 1 << 30, "phases_s": phases_s,
    }  # fmt: skip


def titles(page: str) -> list[str]:
    return [part.partition("<")[0] for part in page.split("<figcaption>")[1:]]


def test_a_page_has_every_part_with_its_numbers() -> None:
    manifest = changed(
        modules=[*dense(3), linear("lm_head", 0.5)],
        run=run(prepare=2.0, observe=3.0, quantize=5.0),
        unquantized=["model.layers.0.mlp.gate"],
        unquantized_because={"model.layers.0.mlp.gate": "a router", "lm_head": "no rule matches it"},
    )
    page = as_html(manifest, "a checkpoint")
    check_page(page)
    assert titles(page) == [
        "KL to the base",
        "top-1 agreement with the base",
        "perplexity, of the base&#x27;s",
        "output error by role",
        "output error by layer: self_attn",
        "output error by layer: mlp",
        "bytes of tensors",
        "time by phase",
    ]
    for fact in (
        "0.1000<small>[± 0.0100]</small>",  # mean KL
        "<td>lm_head</td><td>0.5</td>",
        "<td>quantize</td><td>5.0</td><td>50.0%</td>",
        "a router: 1 (model.layers.*.mlp.gate × 1)",
        "no rule matches it: 1 (lm_head × 1)",
        "<td>W4A16, 64, gptq</td><td>13</td><td>832</td><td>0.0</td><td>4.25</td>",
        "lowbit serve &#x27;./a checkpoint&#x27;",
        "Its recipe sets no limits",
    ):
        assert fact in page, fact


def test_no_text_of_the_manifest_is_markup() -> None:
    data = example({}).model_dump(mode="json")

    def replaced(value: Any) -> Any:
        if isinstance(value, dict):
            return {
                EVIL if key in ("code", "config.json") else key: replaced(one) for key, one in value.items()
            }
        if isinstance(value, list):
            return [replaced(one) for one in value]
        return EVIL if isinstance(value, str) else value

    data |= {
        "modules": [linear(f"model.layers.{layer}.{EVIL}.{EVIL}") for layer in range(2)],
        "base": data["base"] | {"left_out": {EVIL: EVIL}, "carried": [EVIL]},
        "unquantized_because": {EVIL: EVIL},
        "unopened": [{"scheme": EVIL, "linears": 1, "example": EVIL, "reader": EVIL}],
        "experts": experts(
            criterion=EVIL, consolidate=EVIL, similarity=EVIL, saliency_by_layer={0: [1, 2, 3, 4]}
        ),
        "figures": {0: {EVIL: 1.0}, 1: {EVIL: 2.0}},
        "trial": {"passes": [EVIL], "kept": True, "kld_without": 1.0, "kld_with": 0.5},
        "gate": {"limits": {EVIL: 1.0}, "accepted": False, "reasons": [EVIL]},
        "versions": {EVIL: EVIL},
        "recipe": {"description": EVIL},
        "run": run(**{EVIL: 1.0}),
        "export": {"to": EVIL, "left_out": [EVIL]},
    }
    page = as_html(Manifest.model_validate(replaced(data)), EVIL.replace("/", ""))
    check_page(page)
    rest = outside_the_library(page)
    assert "<script>alert" not in rest
    assert "<b " not in rest
    assert rest.count("<script") == len(specs(page)) + 2  # the charts' data, the library and what draws


@pytest.mark.parametrize(
    "fields",
    [
        {"modules": [], "unquantized": []},
        {"modules": [linear("lm_head")]},
        {"modules": [linear("model.layers.3.mlp.up_proj", weights=None, bytes=None)]},
        {"modules": [linear("h.0.x", math.nan), linear("h.1.x", math.inf), linear("h.2.x", 0.0)]},
        {"modules": [linear("."), linear(f"{'9' * 5000}.x"), linear("0.1.2")]},
        {"export": {"to": "autogptq", "left_out": ["scales of an FP8 KV cache"]}},
        {"gate": {"limits": {"max_mean_kld": 0.1}, "accepted": False, "reasons": ["mean KL 0.2"]}},
        {"run": run()},
        {"experts": experts()},
        {"experts": experts(kept=4, kept_by_layer={}, criterion=None, under_calibrated=[])},
        {
            "experts": experts(
                consolidate="average",
                similarity="output",
                absorbed_by_layer={0: {1: 0, 2: 0}},
                saliency_by_layer={0: [1.0, 0.0, 2.0, 3.0], 1: [4.0]},
                tokens_by_layer={0: [9, 0, 2, 3], 1: [1, 2, 3, 4]},
            )
        },
        {
            "calibration": None,
            "kv_cache": {"dtype": "fp8_e4m3", "source": "maximum", "layers": [], "skip_layers": [0]},
        },
        {"size": example({}).size.model_copy(update={"bytes": 0, "base_bytes": 0}).model_dump()},
    ],
)
def test_every_manifest_has_a_page(fields: dict[str, Any]) -> None:
    check_page(as_html(changed(**fields), "ckpt"))


@pytest.mark.parametrize("missing", [{"predictions": 0}, {"mean_kld": math.nan}])
def test_quality_that_was_not_measured_is_said(missing: dict[str, Any]) -> None:
    quality = example({}).quality.model_dump() | missing | {"domains": {}}
    page = as_html(changed(quality=quality), "ckpt")
    check_page(page)
    assert "Quality was not measured" in page


def test_saliency_and_coverage_are_of_those_that_stay_and_those_that_go() -> None:
    seen = experts(
        saliency_by_layer={0: [4.0, 1.0, 1.0, 6.0], 1: [0.0, 2.0, 2.0, 1.0]},
        tokens_by_layer={0: [8, 2, 0, 4]},
    )
    page = as_html(changed(experts=seen), "ckpt")
    assert "<td>0</td><td>5<small>[4–6]</small></td><td>1</td>" in page
    assert "<td>0</td><td>6<small>[4–8]</small></td><td>1<small>[0–2]</small></td>" in page
    assert "2 of 4 routed experts of each layer stay, chosen by reap" in page
    assert "<td>0</td><td>0, 3</td>" in page


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.{0}.mlp.experts.{1}.up_proj",  # 400 layers of 250 experts
        "model.layers.{2}.up_proj",  # 100,000 layers
        "model.layers.{0}.part.role{1}",  # 400 layers of 250 roles
        "model.layers.{1}.part{0}.role{2}",  # no two roles alike
        "model.layers.0.{2}" + "long" * 100,
        "{2}",
    ],
)
def test_a_hundred_thousand_modules_have_a_page_of_five_megabytes(name: str) -> None:
    names = [name.format(number // 250, number % 250, number) for number in range(100_000)]
    modules = [linear(one, 1e-6 * (1 + number)) for number, one in enumerate(names)]
    stay = [f"{one}x" for one in names]
    reasons = {one: f"reason {number}" for number, one in enumerate(stay)}
    kept = {layer: list(range(0, 512, 2)) for layer in range(1000)}
    manifest = example({}).model_copy(
        update={
            "modules": changed(modules=modules).modules,
            "unquantized": stay,
            "unquantized_because": reasons,
            "experts": changed(experts=experts(kept_by_layer=kept)).experts,
        }
    )
    page = as_html(manifest, "ckpt")
    check_page(page)
    assert "0.1" in page  # the largest


def test_layers_beyond_what_a_chart_tells_apart_are_taken_together() -> None:
    many = few_layers({layer: [float(layer)] for layer in range(3 * MOST_LAYERS)})
    assert len(many) == MOST_LAYERS
    assert many[3] == [3.0, 4.0, 5.0]
    assert few_layers({5: [1.0], 2: [2.0]}) == {2: [2.0], 5: [1.0]}
    assert places.layers_note(MOST_LAYERS) == ""


@pytest.mark.parametrize(
    ("name", "layer", "part", "role"),
    [
        ("model.layers.3.mlp.experts.17.up_proj", 3, "mlp.experts.*", "up_proj"),
        ("model.language_model.layers.0.self_attn.q_proj", 0, "self_attn", "q_proj"),
        ("lm_head", None, "", "lm_head"),
        ("h.2.c_fc", 2, "", "c_fc"),
    ],
)
def test_a_name_says_layer_part_and_role(name: str, layer: int | None, part: str, role: str) -> None:
    place = place_of(name)
    assert (place.layer, place.part, place.role) == (layer, part, role)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    directory = tmp_path / "ckpt"
    directory.mkdir()
    write_manifest(directory, example({}))
    return directory


def test_the_command_writes_a_page_and_nothing_else(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    assert main(["inspect", str(checkpoint), "--html", str(file)]) == 0
    check_page(file.read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"ckpt", "page.html"}
    assert [path.name for path in checkpoint.iterdir()] == [MANIFEST_NAME]
    assert file.stat().st_mode & 0o444 == 0o444


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["DIR", "--html", "DIR/lowbit.json"], "is there already"),
        (["DIR", "--html", "DIR"], "is there already"),
        (["DIR", "--html", "DIR/link"], "is there already"),
        (["DIR", "--html", "nowhere/page.html"], "cannot be written"),
        (["DIR", "--html", "/proc/page.html"], "--html /proc/page.html"),
        (["DIR", "--html", "DIR/" + "x" * 300], "File name too long"),
        (["DIR", "--json", "--html", "page.html"], "--json prints"),
        (["--architecture", "X", "--html", "page.html"], "--architecture prints"),
        (["none", "--html", "page.html"], "is not a directory"),
        (["empty", "--html", "page.html"], "has no lowbit.json"),
    ],
)
def test_what_cannot_be_written_is_one_line_and_nothing_is(
    arguments: list[str],
    words: str,
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(checkpoint.parent)
    (checkpoint / "link").symlink_to("nowhere")
    (checkpoint.parent / "empty").mkdir()
    before = sorted(checkpoint.parent.rglob("*"))
    assert main(["inspect", *(one.replace("DIR", "ckpt") for one in arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert words in captured.err
    assert sorted(checkpoint.parent.rglob("*")) == before


def test_the_library_is_in_the_page_once(checkpoint: Path) -> None:
    assert as_html(example({}), "ckpt").count(library()) == 1
    assert json.loads((checkpoint / MANIFEST_NAME).read_text())["run"]["phases_s"] == {}
