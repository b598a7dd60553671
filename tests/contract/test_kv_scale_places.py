"""Which of vLLM's models have a place for the scales of an FP8 cache, read from the installed vLLM's source.

An attention layer that is made without the quantization's configuration has none, and refuses to load a checkpoint that
holds some.
"""

import ast
from pathlib import Path

import pytest
import vllm
from transformers import AutoConfig
from vllm.model_executor.models.registry import ModelRegistry

from lowbit_quantize.model.families import FACTS, OTHERS
from lowbit_quantize.model.skeleton import model_class

MODELS = Path(vllm.__file__).parent / "model_executor" / "models"


def module_of(model_type: str) -> str | None:
    """vLLM's file for a family, if it has one of its own."""
    architecture = model_class(AutoConfig.for_model(model_type)).__name__
    found = ModelRegistry.models.get(architecture)
    module = "" if found is None else str(found.module_name).rpartition(".")[2]
    return module if (MODELS / f"{module}.py").is_file() else None


def makes_attention_without_configuration(module: str) -> bool:
    tree = ast.parse((MODELS / f"{module}.py").read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "Attention"]
    return any(not {None, "quant_config"} & {keyword.arg for keyword in node.keywords} for node in made)


@pytest.mark.parametrize("model_type", sorted(FACTS | OTHERS))
def test_the_table_says_of_each_family_what_its_file_does(model_type: str) -> None:
    module = module_of(model_type)
    if module is None:
        pytest.skip("served by vLLM's Transformers backend")
    assert (FACTS | OTHERS)[model_type].kv_scales != makes_attention_without_configuration(module)


def test_no_file_without_a_place_is_missing_from_the_table() -> None:
    without = {path.stem for path in MODELS.glob("*.py") if makes_attention_without_configuration(path.stem)}
    known = {module_of(model_type) for model_type, facts in (FACTS | OTHERS).items() if not facts.kv_scales}
    assert without - known == {"bailing_moe", "plamo3", "step3_text"}  # which transformers has not
