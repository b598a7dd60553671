"""Files as people have them are read alike whatever their kind; any bytes end as tokens or as one line."""

import codecs
import csv
import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import Table, parquet
from tests.tiny_models import VOCABULARY, tiny_tokenizer

from lowbit_core.errors import RecipeError
from lowbit_quantize.quality.dataset import load_texts
from lowbit_quantize.quality.readers import read_file, read_folder
from lowbit_quantize.quality.sources import find_documents
from lowbit_quantize.quality.token_ids import holds_token_ids
from lowbit_quantize.recipe import Quality, Text

ROWS = [{"text": f"Zeile {n}: äß 漢字 😀, “quoted” text", "domain": "x"} for n in range(5)]
WORDS = [row["text"] for row in ROWS]


def lines(rows: Any = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(delimiter: str = ",") -> str:
    file = io.StringIO()
    writer = csv.DictWriter(file, ["text", "domain"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


def columns() -> bytes:
    file = io.BytesIO()
    parquet.write_table(Table.from_pylist(ROWS), file)
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", lines().encode()),
        ("a.JSONL", lines().encode()),
        ("a.jsonl", codecs.BOM_UTF8 + lines().encode()),
        ("a.jsonl", lines().encode("utf-16")),
        ("a.jsonl", codecs.BOM_UTF16_BE + lines().encode("utf-16-be")),
        ("a.jsonl", lines().encode("utf-32")),
        ("a.jsonl", lines().replace("\n", "\r\n").encode()),
        ("a.jsonl.gz", gzip.compress(codecs.BOM_UTF8 + lines().encode(), mtime=0)),
        ("a.gz", gzip.compress(lines().encode(), mtime=0)),
        ("a.json", json.dumps(ROWS).encode()),
        ("a.json", json.dumps({"data": ROWS, "version": 1}, indent=2).encode("utf-16")),
        ("a.json", lines().encode()),
        ("a.JSON.GZ", gzip.compress(json.dumps(ROWS).encode(), mtime=0)),
        ("a.csv", table().encode()),
        ("a.csv", codecs.BOM_UTF8 + table().encode()),
        ("a.CSV.gz", gzip.compress(table().encode(), mtime=0)),
        ("a.tsv", table("\t").encode()),
        ("a.parquet", columns()),
        ("a.parquet.gz", gzip.compress(columns(), mtime=0)),
    ],
)
def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    assert [document.text for document in read_file(tmp_path / name)] == WORDS
    assert {document.domain for document in read_file(tmp_path / name)} == {"x"}


def test_a_folder_is_read_in_the_order_of_its_paths_without_what_lies_beside(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "b.jsonl").write_text(lines(ROWS[2:]))
    (tmp_path / "a.PARQUET").write_bytes(columns())
    for name in ("README.md", "dataset_infos.json", ".hidden.jsonl"):
        (tmp_path / name).write_text("not rows")
    assert [document.text for document in read_folder(tmp_path)] == WORDS + WORDS[2:]
    (tmp_path / "none").mkdir()
    with pytest.raises(RecipeError, match=r"holds no file that is read: \.jsonl, "):
        list(read_folder(tmp_path / "none"))


def test_one_object_is_one_row_and_a_long_csv_field_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(ROWS[0], indent=1))
    assert [document.text for document in read_file(tmp_path / "a.json")] == WORDS[:1]
    (tmp_path / "a.csv").write_text("text\n" + "x" * 200_000)
    assert len(next(read_file(tmp_path / "a.csv")).text) == 200_000


GOOD = lines(ROWS[:1])


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", GOOD.encode() + b'{"text": "a \\ud83d"}\n', "line 2: half of a surrogate pair"),
        ("a.jsonl", GOOD.encode() + b'{"text": "caf\xe9"}\n' + b"x" * 9000, "line 2: not UTF-8: '{\"text\": \"caf"),
        ("a.jsonl", GOOD.encode() + b'{"text": "cut off', "line 2: not JSON"),
        ("a.jsonl", GOOD.encode() + b"null\n", "line 2: not a JSON object: 'null'"),
        ("a.jsonl", json.dumps(ROWS).encode(), "an array of rows belongs into a .json"),
        ("a.jsonl", GOOD.encode() + b'{"text": null}\n', "line 2: its keys are 'text (null)'"),
        ("a.jsonl", b"[" * 100_000, "line 1: nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}", "line 1: not JSON that can be read"),
        ("a.jsonl", lines().encode("utf-16-le"), "UTF-16 without a byte order mark"),
        ("a.jsonl", codecs.BOM_UTF16_LE + lines().encode("utf-16-le")[:-1], "a character is cut off"),
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.txt", ("caf\xe9 " * 900).encode("latin-1"), "line 1: not UTF-8"),
        ("a.json", b"[1]", "row 1: 1 is not an object"),
        ("a.json", b"3", "neither an array of rows nor"),
        ("a.json", b'[{"text": "a"}, {"text": "\\udfff"}]', "half of a surrogate pair"),
        ("a.csv", b"text\na,b\n", "line 2: more fields than the header's 1"),
        ("a.csv", b"a,b\n1,2\n", "line 2: its keys are 'a, b'"),
        ("a.csv", b'text\n"a"b\n', "after line 1: not CSV"),
        ("a.parquet", b"PAR1xxxx", "is not a whole Parquet file"),
        ("a.parquet", columns()[:-40], "is not a whole Parquet file"),
    ],
)  # fmt: skip
def test_a_wrong_place_is_named_with_a_short_quote(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError) as caught:
        list(read_file(tmp_path / name))
    line = str(caught.value)
    assert line.startswith(f"text {tmp_path / name}")
    assert words in line
    assert len(line.replace(str(tmp_path), "")) < 400
    assert "\n" not in line


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("wikitext", "for a data set of the hub write hub:wikitext"),
        ("HuggingFaceH4/ultrachat_200k", "write hub:HuggingFaceH4/ultrachat_200k"),
        ("./nowhere.jsonl", "is not an existing file or folder; allowed are .jsonl, .json, .csv"),
        ("nowhere.jsonl", "is not an existing file or folder; allowed are"),
        ("", "is not an existing"),
        ("hub:", "write hub:NAME[:CONFIG][:SPLIT][@REVISION]"),
    ],
)
def test_a_source_that_is_none_says_what_to_write(source: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        find_documents(Text().model_copy(update={"dataset": source}), "calibration", Quality())
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [("two.jsonl", lines([{"text": "word " * 300}] * 2), 2), ("one.txt", "one long line " * 400, 1)],
)
def test_one_small_file_for_both_texts_says_that_every_fifth_document_is_held_out(
    tmp_path: Path, name: str, content: str, documents: int
) -> None:
    (tmp_path / name).write_text(content)
    small: dict[str, Any] = {"dataset": str(tmp_path / name), "num_samples": 2, "max_seq_length": 16}
    with pytest.raises(RecipeError) as caught:
        load_texts(Text(**small), Quality(**small), tiny_tokenizer(), VOCABULARY)
    line = str(caught.value)
    assert "every 5th document or so is held out" in line
    assert f"of its {documents} documents" in line


def test_held_out_documents_that_are_left_out_for_sharing_words_are_counted(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(lines([{"text": "one two three four five six seven eight " * 40}]))
    small: dict[str, Any] = {"num_samples": 2, "max_seq_length": 16}
    copied = tmp_path / "b.jsonl"
    copied.write_text((tmp_path / "a.jsonl").read_text())
    with pytest.raises(RecipeError, match=r"1 held-out documents are left out, which share 13 words"):
        load_texts(
            Text(dataset=str(tmp_path / "a.jsonl"), **small), Quality(dataset=str(copied), **small),
            tiny_tokenizer(), VOCABULARY,
        )  # fmt: skip


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("\ud83d"),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["text", "messages", "role", "content", "from", "value", "conversations", "tools", "prompt",
                             "completion", "instruction", "output", "input", "tool_calls", "function", "name",
                             "arguments", "domain", "type", "system"]) | st.text(max_size=4),
            inner, max_size=5,
        )
    ),
    max_leaves=12,
)  # fmt: skip
GARBAGE = (
    st.binary(max_size=400)
    | st.lists(JSON, max_size=5).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.tuples(st.just(lines().encode()), st.integers(0, 300), st.binary(min_size=1, max_size=4)).map(
        lambda one: one[0][: one[1]] + one[2] + one[0][one[1] :]
    )
)
NAMES = st.sampled_from(["a.jsonl", "a.jsonl", "a.json", "a.csv", "a.parquet", "a.txt", "a.jsonl.gz"])


def outcome(read: Callable[[], Any]) -> str:
    """The one line of a refusal; nothing where it went well."""
    try:
        read()
    except RecipeError as error:
        return str(error)
    return ""


@settings(
    max_examples=500, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(name=NAMES, content=GARBAGE, both=st.booleans())
def test_random_bytes_and_random_json_end_as_tokens_or_as_one_line(
    tmp_path: Path, name: str, content: bytes, both: bool
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    small: dict[str, Any] = {"num_samples": 2, "max_seq_length": 16}
    heldout = Quality(dataset=str(path), **small) if both else Quality(**small)
    line = outcome(
        lambda: load_texts(Text(dataset=str(path), **small), heldout, tiny_tokenizer(), VOCABULARY)
    )
    assert "\n" not in line
    assert len(line.replace(str(tmp_path), "")) < 600
    line.encode()


@pytest.mark.parametrize(
    ("name", "content", "ids"),
    [
        ("a.json", '{"input_ids": [[1, 2]]}', True),
        ("a.json", '\ufeff{"domains": ["x"], "input_ids": [[1, 2]]}', True),
        ("a.json", "{", True),
        ("a.json", json.dumps(ROWS), False),
        ("a.json", lines(), False),
        ("a.jsonl", lines(), False),
    ],
)
def test_a_json_file_is_token_ids_by_what_it_holds(
    tmp_path: Path, name: str, content: str, ids: bool
) -> None:
    (tmp_path / name).write_text(content)
    assert holds_token_ids(tmp_path / name) is ids
    assert holds_token_ids(tmp_path / "none.json")
