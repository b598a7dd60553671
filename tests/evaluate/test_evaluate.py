"""`lowbit evaluate` in process, on tiny models: against plain transformers, against the walk, and what it refuses."""

import gzip
import json
import shutil
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.tiny_gguf import write_tiny_gguf
from transformers import AutoModelForCausalLM

from lowbit_core.cli import main
from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item, Request
from lowbit_core.evals.tasks import CLOZE, REPRESENTATIVE, TASKS, load_own_items
from lowbit_core.manifest import read_manifest
from lowbit_evaluate.endpoint import GROUP, find_connect
from lowbit_evaluate.heldout_text import TextStates, compare_text, load_heldout, run_text
from lowbit_evaluate.loaded_model import load_model
from lowbit_evaluate.loglikelihood import BATCH_TOKENS, Encoded, batches, encode, score_items
from lowbit_quantize.export.autoawq import AutoAwq
from lowbit_quantize.export.exporter import export
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import Recipe, load_recipe

CPU = torch.device("cpu")
SMALL = (
    "modules.0.group_size=32", "calibration.num_samples=16", "calibration.max_seq_length=64", "quality.num_samples=8",
    "quality.max_seq_length=64", "quality.isolate=false",
)  # fmt: skip


def recipe_of(*overrides: str) -> Recipe:
    return load_recipe("awq-g64", (*SMALL, *overrides))


@pytest.fixture(scope="module")
def checkpoint(tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama in 4 bits with an FP8 cache."""
    out = tmp_path_factory.mktemp("checkpoint") / "out"
    quantize(str(tiny_model("llama")), recipe_of(), out, CPU)
    return out


@pytest.fixture(scope="module")
def own_items(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty choices of unequal length, and a cloze."""
    rows: list[dict[str, Any]] = [
        {
            "context": f"Question {'very ' * (n % 7)}{n}:",
            "choices": [f" answer {n}", " no", " something quite different"],
            "gold": n % 3,
        }
        for n in range(20)
    ]
    rows.append({"context": "The end of", "choices": [" it"], "task": "cloze"})
    file = tmp_path_factory.mktemp("items") / "own.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `lowbit evaluate`."""
    status = main(["evaluate", *map(str, arguments)])
    done = capsys.readouterr()
    return status, done.out, done.err


def check_manifests_quality(base: Path, out: Path, file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, shown, _ = run(capsys, out, "--base", base, "--text", "--json", file)
    text, manifest = json.loads(file.read_text())["text"], read_manifest(out)
    assert status == 0
    assert manifest is not None
    assert manifest.quality.kv_cache_included
    assert text["manifest"]["agrees"]
    assert text["mean_kld"] == pytest.approx(manifest.quality.mean_kld, rel=0.02)
    assert text["perplexity"] == pytest.approx(manifest.quality.perplexity, rel=0.005)
    assert text["kv_cache_included"]
    assert f"{text['mean_kld']:.5f}" in shown


def test_a_model_loaded_whole_gives_the_manifests_quality(
    tiny_model: Callable[[str], Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_manifests_quality(tiny_model("llama"), checkpoint, tmp_path / "out.json", capsys)


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("gemma3_text", ()), ("qwen3_moe", ("passes=[{prune_experts: {prune_ratio: 0.5}}, quantize]",))],
    ids=["sliding", "pruned experts"],
)
def test_other_kinds_of_models_give_the_manifests_quality_too(
    tiny_model: Callable[[str], Path],
    family: str,
    overrides: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, out = tiny_model(family), tmp_path / "out"
    quantize(str(base), recipe_of(*overrides), out, CPU)
    check_manifests_quality(base, out, tmp_path / "out.json", capsys)


def test_an_older_format_names_the_package_that_opens_it(
    tiny_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, out = tiny_model("mistral"), tmp_path / "out"
    quantize(str(base), recipe_of("modules.0.methods=rtn"), tmp_path / "made of", CPU)
    export(tmp_path / "made of", AutoAwq(), out)
    status, _, error = run(capsys, out, "--base", base, "--text")
    assert status == 2
    assert "opens with gptqmodel" in error


def test_the_fp8_cache_counts_and_can_be_left_out(
    tiny_model: Callable[[str], Path], checkpoint: Path
) -> None:
    """Its scales are the manifest's; a copy without a manifest has the same from its tensors."""
    bare = checkpoint.parent / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("lowbit.json"))
    with_manifest, without = (load_model(find_model(str(path)), CPU) for path in (checkpoint, bare))
    assert len(with_manifest.scales) == 3
    pairs = [
        [(one.k_scale, one.v_scale) for one in each.scales.values()] for each in (with_manifest, without)
    ]
    assert pairs[0] == pairs[1]
    unrounded = load_model(find_model(str(checkpoint)), CPU, fp8_cache=False)
    base = load_model(find_model(str(tiny_model("llama"))), CPU)
    assert (unrounded.scales, base.scales) == ({}, {})
    ids = torch.arange(64)[None] % 500
    assert torch.equal(with_manifest.hidden(ids), without.hidden(ids))
    assert not torch.equal(with_manifest.hidden(ids), unrounded.hidden(ids))


def test_scores_are_those_of_one_request_at_a_time(
    tiny_model: Callable[[str], Path], own_items: Path
) -> None:
    """Batched and padded against the plain logits of each request by itself, in float32."""
    items = load_own_items(own_items)
    reference = find_model(str(tiny_model("llama")))
    model, encoded = load_model(reference, CPU, torch.float32), encode(reference, items)
    answers = score_items(model, items, encoded, "test")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()
    for item, requests in zip(items, encoded, strict=True):
        totals, greedy = [], []
        for one in requests:
            with torch.inference_mode():
                logps = plain(torch.tensor([one.ids])).logits[0].log_softmax(-1)
            rows, targets = (
                logps[one.continuation_start - 1 : -1],
                torch.tensor(one.ids[one.continuation_start :]),
            )
            totals.append(float(rows.gather(-1, targets[:, None]).sum()))
            greedy.append(bool((rows.argmax(-1) == targets).all()))
        given = answers[item.key]
        assert given.logprob == pytest.approx(totals[item.gold or 0], rel=1e-4, abs=1e-3)
        if item.kind == "cloze":
            assert given.acc_norm is greedy[0]
        else:
            assert given.acc is (totals.index(max(totals)) == item.gold)


def test_every_request_is_in_one_batch_and_no_batch_is_too_large() -> None:
    requests = [Encoded([0] * (1 + (n * 37) % 900), 0) for n in range(200)]
    found = batches([*requests, Encoded([0] * 3000, 0)])
    assert sorted(place for batch in found for place in batch) == list(range(201))
    assert all(
        len(batch) == 1 or len(batch) * max(len(requests[place].ids) for place in batch) <= BATCH_TOKENS
        for batch in found
    )
    assert len(found) < 70


def test_a_model_against_itself_changes_nothing_and_its_result_can_be_a_base(
    tiny_model: Callable[[str], Path],
    checkpoint: Path,
    own_items: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, result = tiny_model("llama"), tmp_path / "base.json"
    status, shown, _ = run(capsys, base, "--base", base, "--items", own_items, "--json", result)
    document = json.loads(result.read_text())
    assert status == 0
    changed = document["tasks"]["all"]["changes"]
    assert (changed["items"], changed["flips"], changed["lost"], changed["gained"]) == (21, 0, 0, 0)
    assert changed["mcnemar_p"] == 1
    assert changed["acc_norm_change"]["low"] < 0 < changed["acc_norm_change"]["high"]
    assert set(document["tasks"]) == {"own", "cloze", "all"}
    assert "0 of 21" in shown
    both = tmp_path / "both.json", tmp_path / "file.json"
    for base_given, file in ((base, both[0]), (result, both[1])):
        assert run(capsys, checkpoint, "--base", base_given, "--items", own_items, "--json", file)[0] == 0
    by_model, by_file = (json.loads(file.read_text())["tasks"] for file in both)
    one, other = (each["all"]["changes"] for each in (by_model, by_file))
    assert one["mean_logprob_shift"] == pytest.approx(other["mean_logprob_shift"], abs=1e-5)
    assert one["mean_logprob_shift"] > 0
    same = ("items", "flips", "lost", "gained", "mcnemar_p", "acc_norm_change")
    assert [one[name] for name in same] == [other[name] for name in same]
    assert by_model["own"]["base"] == by_file["own"]["base"]


def test_without_a_base_there_are_accuracies_alone(
    tiny_model: Callable[[str], Path], own_items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    status, shown, error = run(capsys, tiny_model("llama"), "--items", own_items, "--text", "--json", file)
    document = json.loads(file.read_text())
    assert status == 0
    assert document["tasks"]["own"]["changes"] is None
    assert document["tasks"]["own"]["model"]["acc_norm"]["low"] is not None
    assert set(document["text"]) == {"heldout", "predictions", "perplexity", "kv_cache_included"}
    assert "flips" not in shown
    assert "s left" in error


def test_models_with_other_heads_are_compared_each_through_its_own(tiny_model: Callable[[str], Path]) -> None:
    one, other = (load_model(find_model(str(tiny_model(name))), CPU) for name in ("llama", "qwen2"))
    text = load_heldout(None, None, one.tokenizer, 512)
    few = type(text)(text.ids[:3, :40], text.domains[:3], text.record)
    p, q = run_text(one, few, "one"), run_text(other, few, "other")
    measured = compare_text(p, q, few, fp8_cache=False)

    def log_p(each: TextStates) -> torch.Tensor:
        return (each.hidden[:, :-1].float() @ each.head.float().T).double().log_softmax(-1)

    apart = (log_p(p).exp() * (log_p(p) - log_p(q))).sum(-1).mean()
    assert measured.mean_kld == pytest.approx(float(apart), rel=1e-3)


def test_where_nothing_is_asked_tasks_of_several_kinds_run_before_and_after(
    tiny_model: Callable[[str], Path], checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "tasks"
    for task in REPRESENTATIVE:
        cloze = task in CLOZE
        rows = [
            {"doc_id": doc, "label": ["x"] if cloze else doc % 2, "request": request}
            for doc in range(12)
            for word in ((" goes",) if cloze else (" red", " blue"))
            for request in [{"context": f"Question {doc}:", "continuation": word}]
        ]
        file = folder / TASKS[task] / "requests.jsonl.gz"
        file.parent.mkdir(parents=True)
        with gzip.open(file, "wt", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
    asked = (checkpoint, "--base", tiny_model("llama"), "--tasks-dir", folder, "--limit", 10)
    status, shown, _ = run(capsys, *asked, "--json", tmp_path / "out.json")
    found = json.loads((tmp_path / "out.json").read_text())
    assert status == 0
    assert len(REPRESENTATIVE) >= 3
    assert set(found["tasks"]) == {*REPRESENTATIVE, "all"}
    each = [found["tasks"][task] for task in REPRESENTATIVE]
    assert {one[who]["items"] for one in each for who in ("model", "base")} == {10}
    assert found["broken"] == []
    assert "no task broke" in shown
    status, shown, _ = run(capsys, *asked[:-2], "--text", "--json", tmp_path / "text.json")
    found = json.loads((tmp_path / "text.json").read_text())
    assert (status, "tasks" in found) == (0, False)
    assert found["text"]["broken"] == []
    assert "mean KL, " in shown
    assert "no domain broke" in shown


def test_what_is_wrong_is_said_in_one_line(
    tiny_model: Callable[[str], Path],
    checkpoint: Path,
    own_items: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base = tiny_model("llama")
    other, twice, long = (tmp_path / name for name in ("other.json", "twice.jsonl", "long.jsonl"))
    assert run(capsys, base, "--items", own_items, "--json", other)[0] == 0
    line = json.dumps({"context": "a", "choices": [" b", " c"], "id": "1"}) + "\n"
    twice.write_text(line + line)
    long.write_text(json.dumps({"context": "word " * 2000, "choices": [" b", " c"]}) + "\n")
    cases: list[tuple[tuple[object, ...], str]] = [
        ((base, "--tasks-dir", tmp_path), "nothing is asked: give --items or --text, or let tasks"),
        ((base, "--tasks", "arc"), "unknown task 'arc'; did you mean arc_easy? tasks are: arc_challenge"),
        ((base, "--tasks", "piqa", "--tasks-dir", tmp_path), "has no arc_easy"),
        ((base, "--items", tmp_path / "none.jsonl"), "cannot be read"),
        ((base, "--items", twice), "2 items of task own have the id 1"),
        ((base, "--items", long), "tokens, "),
        ((base, "--items", own_items, "--base", tmp_path / "none.json"), "cannot be read"),
        ((base, "--items", own_items, "--base", own_items.parent), "has no config.json"),
        ((base, "--items", twice.parent / "other.jsonl"), "cannot be read"),
        ((base, "--text", "--base", other), "holds answers only"),
        ((base, "--text", "--target", "http://127.0.0.1:9"), "leave out --target"),
        ((base, "--text", "none.txt"), "is not an existing"),
        ((base, "--items", own_items, "--target", "127.0.0.1:9"), "is no URL"),
        ((base, "--items", own_items, "--target", "http://127.0.0.1:9"), "does not answer"),
        ((base, "--items", own_items, "--json", tmp_path / "no" / "out.json"), "cannot be written"),
        ((tmp_path / "nothing", "--items", own_items), "is not a directory"),
    ]
    for arguments, message in cases:
        status, shown, error = run(capsys, *arguments)
        assert (status, shown) == (2, ""), message
        assert message in error
        assert error.count("lowbit: error:") == error.count("\n") == 1, error
    older = tmp_path / "older.json"
    older.write_text(json.dumps(json.loads(other.read_text()) | {"format_version": 1}))
    status, _, error = run(capsys, base, "--items", own_items, "--base", older)
    assert (status, "has format version 1, this lowbit reads 2; make the file anew" in error) == (2, True)
    more = tmp_path / "more.jsonl"
    more.write_text(own_items.read_text() + line.replace('"1"', '"another"'))
    status, _, error = run(capsys, base, "--items", more, "--base", other)
    assert (status, "answers other items" in error) == (2, True)


def test_an_unfinished_checkpoint_or_one_that_lacks_tensors_is_refused(
    checkpoint: Path, own_items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(checkpoint, cut)
    shard = next(cut.glob("model-*.safetensors"))
    shard.unlink()
    status, _, error = run(capsys, cut, "--items", own_items)
    assert (status, f"{shard.name} is missing" in error) == (2, True)
    (cut / "lowbit.json").unlink()
    status, _, error = run(capsys, cut, "--items", own_items)
    assert (status, error.count("lowbit: error:")) == (2, 1)


def test_a_gguf_file_is_evaluated_and_one_that_transformers_reads_in_part_is_refused(
    own_items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stretched = (
        write_tiny_gguf(tmp_path / name, yarn_factor=factor)
        for name, factor in (("whole", None), ("part", 4.0))
    )
    status, shown, _ = run(capsys, whole, "--items", own_items)
    assert (status, "own" in shown) == (0, True)
    status, shown, error = run(capsys, stretched, "--items", own_items)
    assert (status, shown) == (2, "")
    assert "has llama.rope.scaling.type, which transformers does not read" in error


def test_a_gguf_model_in_parts_is_evaluated_as_the_whole_one(
    own_items: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        write_tiny_gguf(tmp_path / f"{size}{tied}", tensors_a_part=size, tie_word_embeddings=tied)
        for size, tied in ((0, False), (12, False), (0, True), (12, True))
    ]
    answers = []
    for number, file in enumerate(files):
        document = tmp_path / f"{number}.json"
        assert run(capsys, file, "--items", own_items, "--json", document)[0] == 0
        answers.append(json.loads(document.read_text())["answers"]["model"])
    assert answers[0] == answers[1] != answers[2] == answers[3]


def test_a_choice_needs_something_before_it(tiny_model: Callable[[str], Path]) -> None:
    item = Item("t", "1", "choice", (Request(" ", "a"), Request(" ", "b")), 0)
    with pytest.raises(ConfigError, match="item 1 of t has a choice with nothing before it"):
        encode(find_model(str(tiny_model("llama"))), [item])


def test_an_installation_without_an_endpoint_names_the_command() -> None:
    with pytest.raises(ConfigError, match="pip install"):
        find_connect([])
    missing = EntryPoint("endpoint", "no_such_package:connect", GROUP)
    with pytest.raises(ConfigError, match="needs no_such_package; run: pip install no_such_package"):
        find_connect([missing])
    assert callable(find_connect())
