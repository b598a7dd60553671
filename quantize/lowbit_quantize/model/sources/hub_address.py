"""A hub repository as people write it down: OWNER/NAME[@REVISION], or the address of one of its pages.

Of an address only the path is read. Where the hub itself is, `huggingface_hub` knows.
"""

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from lowbit_core.errors import ModelError

HUB_ID = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?/?", re.ASCII)
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
VIEWS = ("tree", "blob", "resolve", "raw")  # how a page of a revision begins, after the repository
OTHER_PAGES = ("datasets", "spaces", "collections", "papers", "docs", "models")


@dataclass(frozen=True)
class HubAddress:
    """A repository at a revision, and a GGUF file in it where one was named."""

    repository: str
    revision: str | None = None
    file: str | None = None


def hub_id(text: str) -> HubAddress | None:
    """What OWNER/NAME[@REVISION] names; None where `text` has no such form."""
    found = HUB_ID.fullmatch(text)
    return HubAddress(found["repository"], found["revision"]) if found and text[0] not in "./" else None


def page_address(text: str) -> HubAddress | None:
    """What a page's address names; None where `text` is no address, ModelError where it is not of a model's page."""
    path = _page(text)
    return None if path is None else _address(text, path)


def _page(text: str) -> str | None:
    """The path of an address, with or without https:// before it; None where the text is no address."""
    has_scheme = "://" in text
    if not has_scheme and not text.lower().startswith(tuple(f"{host}/" for host in HOSTS)):
        return None
    parts = urlsplit(text if has_scheme else f"https://{text}")
    if parts.scheme not in ("http", "https") or (parts.hostname or "").lower() not in HOSTS:
        raise ModelError(
            f"model {text!r} is no page of the hub; give a directory, a .gguf file or a hub id OWNER/NAME[@REVISION]"
        )
    return parts.path


def _address(text: str, path: str) -> HubAddress:
    owner, name, view, revision, *inside = [*map(unquote, path.strip("/").split("/")), *[""] * 4]
    inside = [part for part in inside if part]
    if not name or owner in OTHER_PAGES or (view and view not in VIEWS):
        raise ModelError(
            f"model {text!r} is no model's page; give OWNER/NAME[@REVISION] or the page of a model"
        )
    repository, file = f"{owner}/{name.removesuffix('.git')}", "/".join(inside)
    if not HUB_ID.fullmatch(repository):
        raise ModelError(f"model {text!r} names no hub id OWNER/NAME")
    if (file and view == "tree") or ("/" in file and not file.lower().endswith(".gguf")):
        raise ModelError(
            f"model {text!r} is a folder of a repository; download it and give its directory, or give the repository"
        )
    return HubAddress(repository, revision or None, file if file.lower().endswith(".gguf") else None)
