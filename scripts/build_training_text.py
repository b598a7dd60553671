"""Build text to distil on, some two million tokens, out of unpacked data packages. It is not committed.

    apt-get download python3.11-doc libpython3.11-stdlib anarchism debian-history fortunes    # dpkg -x each into DIR
    python scripts/build_training_text.py DIR OUT.jsonl.gz

| domain | out of | licence |
|---|---|---|
| documentation | Debian's python3.11-doc | PSF-2.0, Python Software Foundation and others |
| code | Debian's libpython3.11-stdlib | PSF-2.0 |
| essays | Debian's anarchism: An Anarchist FAQ | GPL-2 (or GFDL), the Anarchist FAQ Editorial Collective |
| history | Debian's debian-history | GPL-2 or later |
| sayings | Debian's fortunes | BSD-3-Clause; single sayings are their authors' |

The bundled calibration text goes beside it (`--data OUT.jsonl.gz default`). Documents are cut at paragraphs, ordered by
a hash, and of each domain no more than a share is taken, so that the result hangs on nothing but the packages. What
shares words with held-out text is dropped by `lowbit distill` itself. Nothing here is a source of the text that judges
quantizers (`build_unseen_text.py`).
"""

import argparse
import gzip
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path

DOCUMENT_CHARS = 4_000
DOMAIN_CHARS = 3_000_000  # at most, of each
SILENT = {"script", "style", "nav", "head", "footer", "table"}
BLOCKS = {"p", "li", "div", "h1", "h2", "h3", "h4", "dt", "dd", "pre", "blockquote", "br"}


class _Words(HTMLParser):
    """The words of a page, by paragraph; navigation, tables and scripts are left out."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        role = dict(attrs).get("role") or ""
        if tag in SILENT or role == "navigation":
            self._silent += tag in SILENT
        elif tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in SILENT:
            self._silent = max(0, self._silent - 1)
        elif tag in BLOCKS:
            self.parts.append("\n\n")

    def handle_data(self, data: str) -> None:
        if not self._silent:
            self.parts.append(data)


def words_of_page(page: str) -> str:
    """Paragraphs of an HTML page that have more than a few words."""
    reader = _Words()
    reader.feed(page)
    paragraphs = (re.sub(r"\s+", " ", one).strip("¶ ") for one in "".join(reader.parts).split("\n\n"))
    return "\n\n".join(one for one in paragraphs if len(one) > 60)


def pages(folder: str, ending: str = ".html") -> Callable[[Path], Iterator[str]]:
    """The words of every HTML page below a folder of a package."""

    def read(unpacked: Path) -> Iterator[str]:
        for path in sorted(unpacked.glob(f"usr/share/doc/{folder}/**/*{ending}")):
            if path.is_file() and not path.is_symlink():
                yield words_of_page(path.read_text(encoding="utf-8", errors="ignore"))

    return read


def code(unpacked: Path) -> Iterator[str]:
    """Modules of the standard library."""
    for path in sorted(unpacked.glob("usr/lib/python3.11/**/*.py")):
        if path.is_file() and not path.is_symlink():
            yield path.read_text(encoding="utf-8", errors="ignore")


def sayings(unpacked: Path) -> Iterator[str]:
    """Files of fortunes, without what is sorted under offensive."""
    for path in sorted(unpacked.glob("usr/share/games/fortunes/*")):
        if path.is_file() and not path.is_symlink() and path.suffix not in (".dat", ".u8"):
            yield path.read_text(encoding="utf-8", errors="ignore").replace("\n%\n", "\n\n")


SOURCES: dict[str, Callable[[Path], Iterator[str]]] = {
    "documentation": pages("python3.11"),
    "code": code,
    "essays": pages("anarchism"),
    "history": pages("debian-history/docs", ".en.html"),
    "sayings": sayings,
}


def cut(text: str) -> Iterator[str]:
    """Documents of about `DOCUMENT_CHARS`, cut between paragraphs."""
    held = ""
    for paragraph in text.split("\n\n"):
        held += paragraph + "\n\n"
        if len(held) >= DOCUMENT_CHARS:
            yield held.strip()
            held = ""
    if len(held.strip()) > DOCUMENT_CHARS // 8:
        yield held.strip()


def digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("unpacked", type=Path, help="directory with the unpacked packages")
    parser.add_argument("out", type=Path, help="a file that ends in .jsonl.gz")
    arguments = parser.parse_args()
    lines, counts = [], {}
    for domain, read in SOURCES.items():
        documents = {digest(one): one for text in read(arguments.unpacked) for one in cut(text)}
        taken = 0
        for _, document in sorted(documents.items()):
            if taken + len(document) > DOMAIN_CHARS:
                break
            taken += len(document)
            lines.append(json.dumps({"domain": domain, "text": document}, ensure_ascii=False))
        counts[domain] = taken
    content = "".join(f"{line}\n" for line in lines).encode(errors="replace")
    arguments.out.write_bytes(gzip.compress(content, mtime=0))
    print(f"{arguments.out}: {len(lines)} documents, {sum(counts.values()):,} characters: {counts}")


if __name__ == "__main__":
    main()
