"""Tokenizers that are written as GGUF, in llama.cpp itself: how many published texts of each vocabulary encode alike.

    python benchmarks/tokenizers/written.py DIR --python PYTHON [--out FILE.json]

DIR is that of run.py; PYTHON has llama-cpp-python (benchmarks/runtimes/run.py says how it is made). Of each vocabulary
that Lowbit reads, a checkpoint's tokenizer files are written, from these the keys of a GGUF file as `lowbit export
--to gguf` writes them, and a file with nothing else; llama.cpp opens it and encodes the texts. The ids are the original
tokenizer's, published beside the vocabulary.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from gguf import GGUFWriter

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.tokenizers.run import ARCHITECTURES, samples  # noqa: E402

from lowbit_core.errors import CheckpointError, ModelError  # noqa: E402
from lowbit_quantize.export.gguf.target import _add  # noqa: E402
from lowbit_quantize.export.gguf.vocabulary import vocabulary_keys  # noqa: E402
from lowbit_quantize.model.sources.gguf_tokenizer import read_vocabulary  # noqa: E402
from lowbit_quantize.model.sources.tokenizer_files import write_tokenizer  # noqa: E402

ENCODE = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.load(open(sys.argv[2], encoding="utf-8"))
print(json.dumps([model.tokenize(text.encode(), add_bos=False, special=False) for text in texts]))
"""


def compare(file: Path, python: str) -> dict[str, Any]:
    """Counts of texts that encode alike, or why the vocabulary is refused."""
    name = file.name.removeprefix("ggml-vocab-").removesuffix(".gguf")
    pairs = list(samples(file))
    row: dict[str, Any] = {"vocabulary": name, "texts": len(pairs)}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        try:
            keys = _keys(file, ARCHITECTURES.get(name, "llama"), work)
        except (ModelError, CheckpointError) as error:
            return {**row, "refused": str(error).replace(str(work), "DIR").replace(str(file), file.name)}
        _write(keys, work / "vocabulary.gguf")
        (work / "texts.json").write_text(json.dumps([text for text, _ in pairs]), encoding="utf-8")
        command = [python, "-c", ENCODE, str(work / "vocabulary.gguf"), str(work / "texts.json")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode:
            return {**row, "llama.cpp_error": ran.stderr.strip().splitlines()[-1]}
    found = json.loads(ran.stdout.splitlines()[-1])
    same = sum(ours == ids for ours, (_, ids) in zip(found, pairs, strict=True))
    return {**row, "pre": keys["tokenizer.ggml.pre"], "llama.cpp": same}


def _keys(file: Path, architecture: str, work: Path) -> dict[str, Any]:
    vocabulary = read_vocabulary(file, architecture)
    write_tokenizer(vocabulary, work)
    config = {"model_type": "llama", "transformers_version": transformers.__version__}
    (work / "config.json").write_text(json.dumps(config))
    return vocabulary_keys(work, "llama", SimpleNamespace(vocab_size=len(vocabulary.said["ggml.tokens"])))


def _write(keys: dict[str, Any], file: Path) -> None:
    """A file of llama's with keys and no tensors."""
    writer = GGUFWriter(file, "llama")
    for key, value in keys.items():
        _add(writer, key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="Encode published samples with llama.cpp by written keys.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--python", required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    files = sorted(arguments.directory.glob("ggml-vocab-*.gguf"))
    rows = []
    for file in (file for file in files if Path(f"{file}.out").is_file()):
        rows.append(compare(file, arguments.python))
        print(json.dumps(rows[-1], ensure_ascii=False), flush=True)
    if arguments.out:
        versions = {name: version(name) for name in ("transformers", "tokenizers", "gguf")}
        document = {"versions": versions, "vocabularies": rows}
        arguments.out.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
