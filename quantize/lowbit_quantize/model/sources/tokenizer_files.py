"""A GGUF file's tokenizer as the files of a model directory, which transformers 4 and 5 open to the same tokens."""

import json
import tempfile
from pathlib import Path
from typing import Any

import transformers
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lowbit_quantize.model.sources.gguf_tokenizer import Vocabulary, build_tokenizer

ROLES = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
CLASS = "PreTrainedTokenizerFast"  # transformers 5 writes TokenizersBackend, which version 4 does not know
KEPT = ("clean_up_tokenization_spaces", *ROLES)
TEMPLATE = "chat_template"
PROBE = (
    " Hello  world, it's 1234567 o'clock;\tWE'LL see:\n\n  don't\r\n   \u00e9 e\u0301 \u00df \u4f60\u597d\u3002 "
    "\u043f\u0440\u0438\u0432\u0435\u0442 \u0e2a\u0e27\u0e31\u0e2a \uac00\ub098 \U0001f642 == foo_bar(x)[0]  "
)


def write_tokenizer(vocabulary: Vocabulary, directory: Path) -> Tokenizer:
    """Write the tokenizer and its chat templates, and return it."""
    tokenizer = build_tokenizer(vocabulary)
    named = {role: vocabulary.special(key) for role, key in ROLES.items()}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **named)
    fast.chat_template = _templates(vocabulary)
    fast.save_pretrained(directory)
    path = directory / "tokenizer_config.json"
    written = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: written[key] for key in KEPT if key in written} | {"tokenizer_class": CLASS}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return tokenizer


def open_tokenizer(vocabulary: Vocabulary, model_type: str) -> Any:
    """The tokenizer as transformers opens it; raises ModelError where it opens another for models of this type."""
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        tokenizer = write_tokenizer(vocabulary, directory)
        config = {"model_type": model_type, "transformers_version": transformers.__version__}
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        opened = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    if opened(PROBE).input_ids != tokenizer.encode(PROBE).ids:
        raise vocabulary.error(f"transformers opens it as {type(opened).__name__}, which encodes otherwise")
    return opened


def _templates(vocabulary: Vocabulary) -> str | dict[str, str] | None:
    """The chat template; several by their names, where the file has more than one."""
    default = vocabulary.said.get(TEMPLATE)
    others = {
        key.removeprefix(f"{TEMPLATE}."): value
        for key, value in vocabulary.said.items()
        if key.startswith(f"{TEMPLATE}.")
    }
    if not others:
        return default
    return others if default is None else {"default": default, **others}
