"""Exact token ids from a file, in place of a text."""

import json
from pathlib import Path

import torch
from torch import Tensor

from lowbit_core.errors import RecipeError
from lowbit_core.text_file import quote


def holds_token_ids(path: Path) -> bool:
    """Whether a file is meant as token ids: JSON with `input_ids`, or a .json that cannot be read as anything."""
    if path.suffix.lower() != ".json":
        return False
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        return error.msg != "Extra data"  # JSON lines
    except (OSError, ValueError, RecursionError):
        return True
    return isinstance(data, dict) and "input_ids" in data


def read_token_ids(path: Path, vocabulary: int, section: str) -> tuple[Tensor, tuple[str, ...]]:
    """Rows of token ids from a file, and the domain of each row: "all" where the file names none."""
    wanted = (
        f'{section}.token_ids wants JSON {{"input_ids": [[int, …], …]}} with rows of equal length, '
        'and optionally "domains": ["…", …], one for each row'
    )
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
        rows = data["input_ids"]
        domains = data.get("domains", ["all"] * len(rows))
        if any(type(token) is not int for row in rows for token in row):
            raise TypeError("not every id is an integer")
        ids = torch.tensor(rows, dtype=torch.int64)
        if type(domains) is not list or any(type(domain) is not str for domain in domains):
            raise TypeError("domains is not a list of strings")
        if len(domains) != len(rows):
            raise ValueError(f"{len(domains)} domains for {len(rows)} rows")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise RecipeError(f"{path}: {quote(str(error))}; {wanted}") from error
    if ids.dim() != 2 or len(ids) < (2 if section == "quality" else 1) or ids.shape[1] < 2:
        raise RecipeError(f"{path} holds ids of shape {tuple(ids.shape)}; {wanted}, two rows to judge by")
    if int(ids.min()) < 0 or int(ids.max()) >= vocabulary:
        raise RecipeError(
            f"{path} holds token ids outside 0…{vocabulary - 1}; they belong to another tokenizer"
        )
    return ids, tuple(domains)
