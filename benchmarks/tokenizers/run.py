"""GGUF tokenizers against llama.cpp's published samples: how many texts of each vocabulary encode alike.

    python benchmarks/tokenizers/run.py DIR [--out FILE.json]

DIR holds llama.cpp's vocabularies as its repository has them in `models/`: `ggml-vocab-NAME.gguf`, texts in `….inp`,
the original tokenizer's ids in `….out`. (The source distribution of llama-cpp-python on PyPI has them in
`vendor/llama.cpp/models/`.) Each text is encoded twice: by the tokenizer that Lowbit builds, and by the files that it
writes for a checkpoint, as transformers opens them. For comparison: what transformers makes of the GGUF file itself.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer
from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer

from lowbit_core.errors import ModelError
from lowbit_quantize.model.sources.gguf_tokenizer import build_tokenizer, read_vocabulary
from lowbit_quantize.model.sources.tokenizer_files import write_tokenizer

BETWEEN = "\n__ggml_vocab_test__\n"
ARCHITECTURES = {"phi-3": "phi3"}  # the vocabulary files call themselves llama, whatever they are of

Encode = Callable[[str], list[int]]


def samples(file: Path) -> Iterator[tuple[str, list[int]]]:
    """Texts and the ids that the original tokenizer gives them."""
    texts = Path(f"{file}.inp").read_text(encoding="utf-8").split(BETWEEN)
    lines = Path(f"{file}.out").read_text(encoding="utf-8").splitlines()
    yield from zip(texts, ([int(number) for number in line.split()] for line in lines), strict=False)


def encoders(file: Path, architecture: str) -> dict[str, Encode]:
    """Lowbit's tokenizer, and the written one; raises ModelError where the vocabulary is refused."""
    vocabulary = read_vocabulary(file, architecture)
    tokenizer = build_tokenizer(vocabulary)
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(vocabulary, Path(directory))
        config = {"model_type": "llama", "transformers_version": transformers.__version__}
        (Path(directory) / "config.json").write_text(json.dumps(config))
        opened = AutoTokenizer.from_pretrained(directory)
    return {
        "lowbit": lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        "checkpoint": lambda text: list(opened(text, add_special_tokens=False).input_ids),
    }


def transformers_encoder(file: Path, architecture: str) -> Encode:
    """What transformers makes of the GGUF file."""
    _, tokens, _ = get_gguf_tokenizer(str(file))
    backend, _ = convert_gguf_tokenizer(architecture, tokens)
    return lambda text: list(backend.encode(text, add_special_tokens=False).ids)


def compare(file: Path) -> dict[str, Any]:
    """Counts of texts that encode alike, or why the vocabulary is refused."""
    name = file.name.removeprefix("ggml-vocab-").removesuffix(".gguf")
    architecture = ARCHITECTURES.get(name, "llama")
    pairs = list(samples(file))
    row: dict[str, Any] = {"vocabulary": name, "texts": len(pairs)}
    try:
        found = encoders(file, architecture)
    except ModelError as error:
        row["refused"] = str(error).partition(" is not reproduced: ")[2]
        found = {}
    try:
        found["transformers"] = transformers_encoder(file, architecture)
    except Exception as error:  # whatever a vocabulary makes of its code
        row["transformers_error"] = " ".join(str(error).split())[:200]
    return row | {who: sum(encode(text) == ids for text, ids in pairs) for who, encode in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode llama.cpp's published samples.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.directory.glob("ggml-vocab-*.gguf"))
    rows = []
    for file in (file for file in files if Path(f"{file}.out").is_file()):
        rows.append(compare(file))
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    if not rows:
        sys.exit(f"{arguments.directory} holds no ggml-vocab-*.gguf with .inp and .out beside it")
    if arguments.out:
        versions = {name: version(name) for name in ("transformers", "tokenizers", "gguf")}
        document = {"versions": versions, "vocabularies": rows}
        arguments.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
