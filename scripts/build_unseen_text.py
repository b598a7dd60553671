"""Build the text that `benchmarks/quantizers` judges on beside the bundled one, out of unpacked data packages.

    pip download --no-deps --no-binary :all: gensim==4.4.0 chatterbot-corpus==1.3.3   # unpack both into DIR
    apt-get download dict-jargon r-cran-{lme4,sandwich,zoo,...}                       # dpkg -x each into DIR
    python scripts/build_unseen_text.py DIR

No calibration text resembles it: encyclopedia articles with their sections (the bundled text has paragraphs), papers
on statistics, small talk, a lexicon of slang. `benchmarks/quantizers/texts/SOURCES.md` names sources and licences.
Markup, code, figures, equations and references are left out. Excerpts are ordered by a hash, sources take turns; one
that shares any run of 13 words with a bundled document is dropped. It calibrates nothing.
"""

import argparse
import bz2
import gzip
import hashlib
import html
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
BUNDLED = ROOT / "quantize" / "lowbit_quantize" / "quality" / "texts"
OUT = ROOT / "benchmarks" / "quantizers" / "texts" / "unseen.jsonl.gz"
SHARED_WORDS = 13
EXCERPT_CHARS = 2_400
TURNS = ("encyclopedia", "chat", "papers", "encyclopedia", "lexicon")  # in which the sources come
DOCUMENTS = 75
Excerpt = str | list[str]  # a text, or turns of user and assistant


def encyclopedia(unpacked: Path) -> Iterator[str]:
    """Long articles of the extract of English Wikipedia among gensim's test data."""
    (archive,) = unpacked.rglob("enwiki-latest-pages-articles1*shortened.bz2")
    dump = bz2.decompress(archive.read_bytes()).decode("utf-8", "ignore")
    for found in re.finditer(r"<text[^>]*>(.*?)</text>", dump, re.DOTALL):
        wikitext = html.unescape(found[1])
        if len(wikitext) > 6_000 and not wikitext.lower().startswith("#redirect"):
            yield without_wiki_markup(wikitext)


def without_wiki_markup(text: str) -> str:
    text = re.sub(r"<!--.*?-->|<ref[^>]*?/>|<ref.*?</ref>", "", text, flags=re.DOTALL)
    for _ in range(6):  # templates lie in templates
        text = re.sub(r"\{\{[^{}]*\}\}", "", text)
    text = re.sub(r"\{\|.*?\|\}", "", text, flags=re.DOTALL)
    text = re.sub(r"\[\[(?:File|Image|Category):(?:[^\[\]]|\[\[[^\[\]]*\]\])*\]\]", "", text)
    text = re.sub(r"\[\[[^\[\]|]*\|([^\[\]]*)\]\]|\[\[([^\[\]]*)\]\]", r"\1\2", text)
    text = re.sub(r"\[https?://\S+ ([^\]]*)\]", r"\1", text)
    text = html.unescape(re.sub(r"'''?|<[^>]+>", "", text)).replace("\xa0", " ")
    text = re.sub(r"^[*:;#|!].*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^=+\s*(.*?)\s*=+\s*$", r"\1", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def papers(unpacked: Path) -> Iterator[str]:
    """Prose of the papers that R packages carry as vignettes."""
    for path in sorted(unpacked.rglob("site-library/*/doc/*.Rnw")):
        _, begins, body = path.read_text(encoding="utf-8", errors="ignore").partition(r"\begin{document}")
        text = without_latex(body)
        if begins and len(text) > 4_000:
            yield text


def without_latex(text: str) -> str:
    text = re.sub(r"^<<.*?>>=.*?^@.*?$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"(?<!\\)%.*", "", text)
    left_out = (
        "figure|table|tabular|Schunk|Sinput|Soutput|CodeChunk|CodeInput|Code|Scode|verbatim|equation|align|eqnarray|"
        "displaymath|thebibliography"
    )
    text = re.sub(rf"\\begin\{{({left_out})\*?\}}.*?\\end\{{\1\*?\}}", "", text, flags=re.DOTALL)
    text = re.sub(r"\$\$.*?\$\$|\\\[.*?\\\]", "", text, flags=re.DOTALL)
    text = re.sub(r"\\(?:sub)*section\*?\{([^{}]*)\}", r"\n\n\1\n\n", text)
    silent = "label|bibliography|bibliographystyle|vspace|hspace|Sexpr|input|SweaveOpts|cite\\w*|ref|eqref"
    text = re.sub(rf"\\(?:{silent})\*?(?:\[[^\]]*\])*\{{[^{{}}]*\}}", "", text)
    for _ in range(4):
        text = re.sub(r"\\[a-zA-Z]+\*?(?:\[[^\]]*\])?\{([^{}]*)\}", r"\1", text)
    text = re.sub(r"\\(?:begin|end)\{[^{}]*\}|\\[a-zA-Z]+\*?", "", text)
    text = re.sub(r"[{}~]", " ", text).replace("\\", "")
    paragraphs = (re.sub(r"\s+", " ", part).strip() for part in text.split("\n\n"))
    return "\n\n".join(part for part in paragraphs if len(part) > 40)


def chat(unpacked: Path) -> Iterator[list[str]]:
    """Small talk and questions of chatterbot-corpus, several exchanges to a conversation."""
    conversations: list[list[str]] = []
    for path in sorted(unpacked.rglob("chatterbot_corpus/data/english/*.yml")):
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        conversations += [[str(turn).strip() for turn in one] for one in data["conversations"]]
    turns: list[str] = []
    for one in sorted(conversations, key=lambda one: digest("\n".join(one))):
        turns += one[: len(one) // 2 * 2]
        if sum(map(len, turns)) > EXCERPT_CHARS * 2 // 3:
            yield turns
            turns = []


def lexicon(unpacked: Path) -> Iterator[str]:
    """Entries of the Jargon File."""
    (archive,) = unpacked.rglob("jargon.dict.dz")
    text = gzip.decompress(archive.read_bytes()).decode("utf-8", "ignore")
    return (text[start : start + EXCERPT_CHARS] for start in range(200_000, len(text), 30_000))


SOURCES: dict[str, Callable[[Path], Iterator[Excerpt]]] = {
    "encyclopedia": encyclopedia,
    "papers": papers,
    "chat": chat,
    "lexicon": lexicon,
}


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def excerpt(document: Excerpt) -> Excerpt:
    """One stretch of a document, from the beginning of a paragraph where there is one."""
    if isinstance(document, list) or len(document) <= EXCERPT_CHARS:
        return document
    start = int(digest(document), 16) % (len(document) - EXCERPT_CHARS)
    paragraph = document.find("\n\n", start)
    start = paragraph + 2 if 0 <= paragraph <= len(document) - EXCERPT_CHARS else start
    return document[start : start + EXCERPT_CHARS]


def runs_of_words(text: str) -> set[str]:
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[at : at + SHARED_WORDS]) for at in range(len(words) - SHARED_WORDS + 1)}


def bundled_runs() -> set[str]:
    """Every run of words of the bundled calibration and held-out text."""
    found: set[str] = set()
    for name in ("calibration", "heldout"):
        with gzip.open(BUNDLED / f"{name}.jsonl.gz", "rt", encoding="utf-8") as lines:
            for line in lines:
                document = json.loads(line)
                turns = (
                    [document["text"]] if "text" in document else [m["content"] for m in document["messages"]]
                )
                found |= runs_of_words(" ".join(turns))
    return found


def to_json(domain: str, found: Excerpt) -> str:
    roles = ("user", "assistant")
    body = (
        {"text": found}
        if isinstance(found, str)
        else {"messages": [{"role": roles[at % 2], "content": turn} for at, turn in enumerate(found)]}
    )
    return json.dumps({"domain": domain, **body}, ensure_ascii=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("unpacked", type=Path)
    unpacked, bundled = parser.parse_args().unpacked, bundled_runs()
    waiting: dict[str, list[Excerpt]] = {}
    for domain, read in SOURCES.items():
        found = [excerpt(document) for document in read(unpacked)]
        found = [
            one
            for one in found
            if not runs_of_words(" ".join(one) if isinstance(one, list) else one) & bundled
        ]
        waiting[domain] = sorted(found, key=lambda one: digest(str(one)))
    lines = []
    for number in range(DOCUMENTS):
        domain = TURNS[number % len(TURNS)]
        lines.append(to_json(domain, waiting[domain].pop()))
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_bytes(gzip.compress("".join(f"{line}\n" for line in lines).encode(), mtime=0))
    print(f"{OUT}: {len(lines)} documents")


if __name__ == "__main__":
    main()
