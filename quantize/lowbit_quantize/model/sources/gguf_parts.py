"""Names of GGUF files. A large model is split into `NAME-00001-of-00003.gguf` and so on, which are read as one."""

import re
from collections.abc import Collection
from pathlib import Path

from lowbit_core.errors import ModelError

SUFFIX = ".gguf"
PART = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.gguf)", re.IGNORECASE)


def is_gguf(name: str) -> bool:
    """Whether a file is called as a GGUF file is, in whatever case."""
    return name.lower().endswith(SUFFIX)


def name_of(name: str) -> str:
    """The model's name: that of its file, of whichever part."""
    part = PART.fullmatch(name)
    return part["name"] if part else name[: -len(SUFFIX)]


def all_parts(name: str) -> str:
    """A pattern that matches all parts of the model that a file belongs to."""
    return PART.sub(r"\g<name>-*-of-\g<count>\g<suffix>", name)


def parts_of(path: Path) -> tuple[Path, ...]:
    """All parts of the model that a file belongs to, the first one first; raises ModelError where one is missing."""
    part = PART.fullmatch(path.name)
    if not part:
        return (path,)
    count = int(part["count"])
    names = [f"{part['name']}-{n:05d}-of-{count:05d}{part['suffix']}" for n in range(1, count + 1)]
    if missing := [name for name in names if not (path.parent / name).is_file()]:
        raise ModelError(
            f"{path} is one of {count} parts, and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not "
            "beside it; put all parts into one directory"
        )
    return tuple(path.parent / name for name in names)


def first_parts(names: Collection[str]) -> list[str]:
    """One file of each model among these names."""
    found: dict[str, str] = {}
    for name in sorted(filter(is_gguf, names)):
        found.setdefault(all_parts(name), name)
    return list(found.values())
