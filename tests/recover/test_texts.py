"""Text to train on: what judges never trains."""

import json
import random
from pathlib import Path

import pytest
import torch
from tests.tiny_models import tiny_tokenizer

from lowbit_core.errors import ConfigError
from lowbit_core.manifest import TextRecord
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.overlap import token_runs, word_runs
from lowbit_recover.distill.settings import Settings
from lowbit_recover.distill.texts import Texts, load_training

SETTINGS = Settings("scales", tokens=640, row_tokens=64, batch=4, set_aside=4)
WORDS = ["river", "stone", "evening", "lantern", "harbour", "winter", "letter", "garden", "bridge", "silver"]


def heldout(ids: torch.Tensor | None = None) -> TokenText:
    found = torch.full((2, 64), 3) if ids is None else ids
    record = TextRecord(dataset="x", num_samples=len(found), max_seq_length=64, tokens=128, seed=0, sha256="")
    return TokenText(found, ("all",) * len(found), record)


def story(seed: int, words: int = 120) -> str:
    drawn = random.Random(seed)
    return " ".join(drawn.choice(WORDS) for _ in range(words))


def written(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def loaded(
    sources: list[str],
    documents: list[Document],
    settings: Settings = SETTINGS,
    held: TokenText | None = None,
) -> Texts:
    return load_training(sources, settings, held or heldout(), documents, tiny_tokenizer(), 512)


def test_no_row_that_trains_shares_words_with_held_out_documents_or_with_rows_that_are_set_aside(
    tmp_path: Path,
) -> None:
    stories = [story(seed) for seed in range(60)]
    held = [Document("x", text=stories[3]), Document("x", text=" ".join(stories[7].split()[20:60]))]
    copies = [
        *stories,
        stories[11],
        stories[12] + " again",
    ]  # of which one is set aside, perhaps, and one trains
    texts = loaded([written(tmp_path / "data.jsonl", copies)], held)
    tokenizer = tiny_tokenizer()
    seen = {run for one in held for run in word_runs(one.words)}
    judged = {
        run for row in texts.set_aside.ids for run in word_runs(tokenizer.decode(row)) if run.count(" ") == 12
    }
    for row in texts.training.ids:
        runs = {run for run in word_runs(tokenizer.decode(row)) if run.count(" ") == 12}
        assert runs
        assert runs.isdisjoint(seen)
        assert runs.isdisjoint(judged)
    assert texts.dropped >= 2
    assert texts.training.ids.shape == (10, 64)
    assert token_runs(texts.training.ids).isdisjoint(token_runs(texts.set_aside.ids))


def test_the_rows_hang_on_the_seed_and_on_nothing_else(tmp_path: Path) -> None:
    source = written(tmp_path / "data.jsonl", [story(seed) for seed in range(40)])
    first, again = loaded([source], []), loaded([source], [])
    other = loaded([source], [], Settings("scales", tokens=640, row_tokens=64, batch=4, set_aside=4, seed=1))
    assert torch.equal(first.training.ids, again.training.ids)
    assert not torch.equal(first.training.ids, other.training.ids)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([""], "holds no text|no text"),
        ([story(1)], "all of its 1 documents share 13 words in a row with the held-out text"),
        ([story(1), story(2)], "wanted are --set-aside 4 and at least one --batch of 4"),
    ],
)
def test_an_empty_an_overlapping_and_a_short_file_are_refused_in_a_line(
    tmp_path: Path, texts: list[str], message: str
) -> None:
    source = written(tmp_path / "data.jsonl", texts)
    with pytest.raises(Exception, match=message) as refused:
        loaded([source], [Document("x", text=story(1))])
    assert "\n" not in str(refused.value)


def test_rows_given_as_ids_that_are_held_out_do_not_train(tmp_path: Path) -> None:
    ids = torch.randint(0, 512, (24, 64), generator=torch.Generator().manual_seed(0))
    file = tmp_path / "ids.json"
    domains = ["one", "two"] * 12
    file.write_text(json.dumps({"input_ids": ids.tolist(), "domains": domains}), encoding="utf-8")
    texts = loaded([str(file)], [], held=heldout(ids[5:9].clone()))
    rows = {tuple(row) for row in (*texts.training.ids.tolist(), *texts.set_aside.ids.tolist())}
    assert not rows & {tuple(row) for row in ids[5:9].tolist()}
    assert texts.set_aside.domains.count("one") == texts.set_aside.domains.count("two")
    with pytest.raises(ConfigError, match="all of its 24 rows share 64 tokens"):
        loaded([str(file)], [], held=heldout(ids))


def test_text_whose_tokens_are_held_out_as_ids_does_not_train(tmp_path: Path) -> None:
    stories = [story(seed) for seed in range(40)]
    source = written(tmp_path / "data.jsonl", stories)
    plain = loaded([source], [])
    held = heldout(plain.training.ids[:2].clone())
    texts = loaded([source], [], held=held)
    assert token_runs(texts.training.ids).isdisjoint(token_runs(held.ids))
    assert token_runs(texts.set_aside.ids).isdisjoint(token_runs(held.ids))
