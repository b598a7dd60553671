"""Models that were saved without a head: told by the class in their configuration, measured through their embedding."""

import json
from pathlib import Path

import pytest
from tests.e2e.embedding_model import write_embedding_model
from tests.tiny_models import write_tiny_model

from lowbit_quantize.model.sources.directory import ModelDirectory


def tied(directory: Path, classes: object) -> bool:
    """Whether the configuration says that the embedding is the head, with other classes named in its file."""
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": classes}))
    return bool(ModelDirectory("x", directory, False).config.tie_word_embeddings)


@pytest.mark.parametrize(
    ("classes", "headless"),
    [
        (["Qwen3Model"], True),
        (["Qwen3ForCausalLM"], False),
        ([], False),
        (None, False),
        ("Qwen3Model", False),
    ],
)
def test_the_class_of_the_layers_alone_is_a_model_without_a_head(
    tmp_path: Path, classes: object, headless: bool
) -> None:
    assert tied(write_embedding_model(tmp_path / "m", "headless"), classes) is headless


def test_a_model_with_a_head_keeps_it(tmp_path: Path) -> None:
    assert tied(write_tiny_model(tmp_path / "m", "mistral"), ["MistralForCausalLM"]) is False
