"""Random damage to a base's files is refused or harmless, never a traceback."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.quantize.tiny_gguf import write_tiny_gguf

from lowbit_core.errors import InputError
from lowbit_quantize.model.gguf_file import GgufFile
from lowbit_quantize.model.reference import ModelReference, find_model
from lowbit_quantize.plan import make_plan
from lowbit_quantize.recipe import load_recipe

NAMES = (
    "config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
    "adapter_config.json", "adapter_model.safetensors", "model_index.json", "pytorch_model.bin", "params.json",
    "a.gguf", "a-00001-of-00002.gguf", "a-00002-of-00002.GGUF", "mmproj-a.gguf", "model.onnx", "onnx/model.onnx",
    "sub/config.json",
    "snapshots/x/config.json", "weights.safetensors", "consolidated.safetensors", "training_args.bin", "README.md",
)  # fmt: skip
CONTENTS = (
    "",
    "{}",
    "[]",
    "null",
    '{"model_type": "llama"}',
    '{"quantization": 4}',
    "\ud7ff\ufeff{",
    "GGUF",
    "\0" * 64,
)


def read_whole(reference: ModelReference) -> None:
    """What a run reads of a base before it walks."""
    plan = make_plan(reference, load_recipe("rtn-g64"))
    reference.tokenizer()
    if reference.kind == "gguf":
        GgufFile(reference, plan.skeleton)


def refused(model: Path) -> bool:
    """Whether it is refused; what is raised otherwise is a fault."""
    try:
        read_whole(find_model(str(model)))
    except InputError:
        return True
    return False


def test_random_bytes_in_a_gguf_files_header_are_refused_or_harmless(tmp_path: Path) -> None:
    file = write_tiny_gguf(tmp_path / "m")
    whole, drawn = file.read_bytes(), random.Random(1)
    header = whole.index(b"output_norm.weight")  # behind it little but tensors
    count = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(drawn.choice((1, 1, 2, 8))):
            damaged[drawn.randrange(header)] = drawn.randrange(256)
        file.write_bytes(damaged[: drawn.choice((len(damaged), len(damaged), drawn.randrange(len(damaged))))])
        count += refused(file)
    assert 20 < count < 60


def test_random_files_in_a_directory_are_refused_in_refused(tmp_path: Path) -> None:
    drawn = random.Random(2)
    for number in range(300):
        directory = tmp_path / str(number)
        directory.mkdir()
        for name in drawn.sample(NAMES, drawn.randint(0, 7)):
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(drawn.choice(CONTENTS))
        assert refused(directory)
        shutil.rmtree(directory)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_json_file_of_another_shape_is_refused_in_refused(
    file: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = shutil.copytree(tiny_model("llama"), tmp_path / "m")
    for content in (
        *CONTENTS,
        '{"auto_map": 3}',
        '{"auto_map": [null, 7]}',
        '{"tokenizer_class": 5}',
        '{"model_type": []}',
    ):
        (directory / file).write_text(content)
        assert refused(directory) or content.startswith("{"), content
