"""Calibration and held-out text."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.tiny_models import VOCABULARY, tiny_tokenizer

from lowbit_core.errors import RecipeError
from lowbit_quantize.quality.dataset import TokenText, judging_ids, load_texts
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.overlap import drop_overlap, token_runs, word_runs
from lowbit_quantize.quality.sources import find_documents
from lowbit_quantize.quality.templates import render
from lowbit_quantize.recipe import Calibration, Quality, Text


def test_default_calibration_and_heldout_text_never_overlap() -> None:
    calibration = find_documents(Text(), "calibration", Quality())
    heldout = find_documents(Quality(), "heldout", Text())
    runs = {run for document in calibration for run in word_runs(document.words)}
    assert len(runs) > 100_000
    assert len(heldout) > 100
    assert all(runs.isdisjoint(word_runs(document.words)) for document in heldout)


def test_sequences_hold_one_domain_each_and_every_prefix_is_a_mix() -> None:
    calibration, heldout = load_texts(
        Text(num_samples=8, max_seq_length=64),
        Quality(num_samples=8, max_seq_length=64),
        tiny_tokenizer(),
        VOCABULARY,
    )
    assert calibration.ids.shape == (8, 64)
    assert sorted(calibration.domains[:4]) == ["code", "dialogue", "maths", "prose"]
    assert heldout.domains[:4] == heldout.domains[4:]


def test_the_same_seed_gives_the_same_tokens_and_another_seed_others() -> None:
    def ids(seed: int) -> torch.Tensor:
        text = Text(num_samples=4, max_seq_length=64, seed=seed)
        return load_texts(text, Quality(num_samples=2, max_seq_length=64), tiny_tokenizer(), VOCABULARY)[
            0
        ].ids

    assert torch.equal(ids(1), ids(1))
    assert not torch.equal(ids(1), ids(2))


def test_what_is_set_aside_is_of_other_documents_than_those_that_calibrate(tmp_path: Path) -> None:
    lines = [" ".join(f"{chr(97 + number)}{word}" for word in range(40)) for number in range(12)]
    path = tmp_path / "own.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))

    def texts(count: int, aside: int) -> tuple[TokenText, TokenText]:
        text = Calibration(dataset=str(path), num_samples=count, max_seq_length=32, set_aside=aside)
        return load_texts(text, Quality(num_samples=2, max_seq_length=48), tiny_tokenizer(), VOCABULARY)

    calibration, heldout = texts(2, 1)
    assert calibration.aside is not None
    assert calibration.aside.shape == (1, 48)  # as long as the sequences that it is judged beside
    assert token_runs(calibration.ids).isdisjoint(token_runs(calibration.aside))
    judging = judging_ids(calibration, heldout)
    assert torch.equal(judging, torch.cat([heldout.ids, calibration.aside]))
    assert calibration.record.set_aside_sha256
    assert texts(2, 0)[0].record.sha256 == calibration.record.sha256
    assert texts(2, 0)[0].aside is None
    most = texts(2, 1000)[0].aside
    assert most is not None
    assert 1 < len(most) < 1000  # as many as the source has
    every = next(count for count in range(1000, 0, -1) if _gives(texts, count))
    assert texts(every, 4)[0].aside is None  # all of it calibrates
    assert torch.equal(judging_ids(*texts(every, 4)), heldout.ids)


def _gives(texts: Callable[[int, int], object], count: int) -> bool:
    try:
        texts(count, 0)
    except RecipeError:
        return False
    return True


def test_conversations_go_through_the_chat_template() -> None:
    conversation = Document(
        "dialogue", messages=({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes"})
    )
    assert render(conversation, tiny_tokenizer()) == "<|user|>Hi<|end|><|assistant|>Yes<|end|>"
    assert render(conversation, tiny_tokenizer(chat=False)) == "Hi\n\nYes"


def test_a_document_that_shares_thirteen_words_is_dropped() -> None:
    shared = "one two three four five six seven eight nine ten eleven twelve thirteen"
    seen = Document("text", text=f"Here it says {shared} and goes on.")
    copied = Document("text", text=f"Elsewhere: {shared.upper()} again")
    near = Document("text", text=f"Elsewhere: {shared.replace('seven', '7')} again")
    assert drop_overlap([copied, near], [seen]) == [near]


def test_one_file_for_both_texts_is_split(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    lines = [
        json.dumps({"text": f"Document number {n}: " + " ".join(f"w{n}x{m}" for m in range(60))})
        for n in range(120)
    ]
    path.write_text("\n".join(lines))
    calibration = find_documents(Text(dataset=str(path)), "calibration", Quality(dataset=str(path)))
    heldout = find_documents(Quality(dataset=str(path)), "heldout", Text(dataset=str(path)))
    assert len(calibration) + len(heldout) == 120
    assert 10 < len(heldout) < 50
    assert {d.text for d in calibration}.isdisjoint(d.text for d in heldout)


def test_a_text_file_is_cut_at_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("\n\n".join(f"paragraph {n} " + "x" * 900 for n in range(10)))
    documents = find_documents(Text(dataset=str(path)), "calibration", Quality())
    assert len(documents) == 2
    assert documents[0].text.startswith("paragraph 0")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bad.jsonl", '{"text": "a"}\n{"txt": "b"}\n', "line 2"),
        ("bad.jsonl", "not json\n", "line 1"),
        ("short.jsonl", '{"text": "too short"}\n', "lower calibration.num_samples"),
    ],
)
def test_wrong_text_is_refused_with_its_place(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=message):
        load_texts(Text(dataset=str(tmp_path / name)), Quality(), tiny_tokenizer(), VOCABULARY)


@pytest.mark.parametrize("ids", [[[1, 2], [3]], [[1, 99999]], [], "x"])
def test_wrong_token_ids_are_refused(tmp_path: Path, ids: object) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"input_ids": ids}))
    with pytest.raises(RecipeError, match="ids"):
        load_texts(Text(token_ids=str(path)), Quality(), tiny_tokenizer(), VOCABULARY)


def test_exact_token_ids_are_used_as_given(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    path.write_text(json.dumps({"input_ids": [[1] * 32, [2] * 32]}))
    calibration, _ = load_texts(
        Calibration(token_ids=str(path)),
        Quality(num_samples=2, max_seq_length=32),
        tiny_tokenizer(),
        VOCABULARY,
    )
    assert calibration.aside is None
    assert calibration.ids.tolist() == [[1] * 32, [2] * 32]


def test_rows_of_token_ids_may_name_their_domains(tmp_path: Path) -> None:
    path = tmp_path / "ids.json"
    data: dict[str, object] = {"input_ids": [[1] * 32, [2] * 32]}
    texts = (
        Text(token_ids=str(path)),
        Quality(num_samples=2, max_seq_length=32),
        tiny_tokenizer(),
        VOCABULARY,
    )
    path.write_text(json.dumps(data))
    assert load_texts(*texts)[0].domains == ("all", "all")
    path.write_text(json.dumps({**data, "domains": ["wiki", "code"]}))
    assert load_texts(*texts)[0].domains == ("wiki", "code")
    for domains in (["wiki"], ["a", "b", "c"], [1, 2], "ab"):
        path.write_text(json.dumps({**data, "domains": domains}))
        with pytest.raises(RecipeError, match="domains"):
            load_texts(*texts)
