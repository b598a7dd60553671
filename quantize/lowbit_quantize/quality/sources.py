"""Which documents a recipe's text names, and which of them are held out where one source gives both texts."""

import hashlib
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from lowbit_core.errors import RecipeError
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.hub import PREFIX, read_hub
from lowbit_quantize.quality.readers import SUFFIXES, is_readable, read_file, read_folder
from lowbit_quantize.recipe import BUNDLED, Text

HELDOUT_SHARE = 5  # where one source gives both texts, one document in five is held out
HUB_CHARACTERS_PER_TOKEN = 40  # how much to read of an endless data set: several times what is needed


def find_documents(text: Text, role: str, other: Text) -> list[Document]:
    """The documents of a text: `role` is calibration or heldout, `other` the text of the other role."""
    if text.token_ids:
        return []
    if text.dataset == BUNDLED:
        folder = Path(str(files("lowbit_quantize.quality"))) / "texts"
        return list(read_file(folder / f"{role}.jsonl.gz", f"{BUNDLED} ({role})"))
    wanted = text.num_samples * text.max_seq_length * HUB_CHARACTERS_PER_TOKEN
    shared = is_shared(text, other)
    found = list(_read(text.dataset, wanted * (HELDOUT_SHARE if text.dataset == other.dataset else 1)))
    return [one for one in found if not shared or (_draw(one) == 0) == (role == "heldout")]


def is_shared(text: Text, other: Text) -> bool:
    """Whether one source gives both texts."""
    return text.dataset == other.dataset != BUNDLED and not text.token_ids and not other.token_ids


def _draw(document: Document) -> int:
    return int(hashlib.sha256(document.words.encode()).hexdigest(), 16) % HELDOUT_SHARE


def _read(source: str, characters: int) -> Iterator[Document]:
    if source.startswith(PREFIX):
        return read_hub(source, characters)
    path = Path(source)
    if source and path.is_dir():
        return read_folder(path)
    if path.is_file() and is_readable(path):
        return read_file(path)
    hub = "hub:NAME[:CONFIG][:SPLIT][@REVISION]"
    known = f"{', '.join(SUFFIXES)} (each also .gz), a folder of these, {hub}, or {BUNDLED}"
    if path.is_file():
        raise RecipeError(f"text source {source!r}: its name does not say what it is; allowed are {known}")
    is_name = (
        path.suffix.lower() not in SUFFIXES
        and source.count("/") <= 1
        and not source.startswith(("/", ".", "~"))
    )
    hint = f"; for a data set of the hub write hub:{source}" if source and is_name else ""
    raise RecipeError(f"text source {source!r} is not an existing file or folder{hint}; allowed are {known}")
