"""A checkpoint's tokenizer in GGUF's keys, held against the checkpoint's own before it is written.

The keys are read back by what reads GGUF bases (model/sources/gguf_tokenizer.py): where text would be encoded
otherwise, or no rule that llama.cpp has by a name cuts text as this tokenizer does, nothing is exported.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from lowbit_core.errors import CheckpointError, ModelError
from lowbit_quantize.export.gguf import published
from lowbit_quantize.model.sources.gguf_tokenizer import PREFIX, SPACE, Vocabulary, build_tokenizer
from lowbit_quantize.model.sources.pre_tokenizers import PRE_TOKENIZERS
from lowbit_quantize.model.sources.tokenizer_files import PROBE

FILE = "tokenizer.json"
PROBES = (
    PROBE,
    published.PROBE,
    "a",
    " a",
    "  two spaces",
    "end ",
    "",
    "\n",
    "x=1;\r\n\tif (y) {\n        z();\n}",
)
ENDS = ("eot", "eom")  # what else ends a turn
ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "unknown": "unk_token_id", "padding": "pad_token_id"}


def vocabulary_keys(directory: Path, architecture: str, config: Any) -> dict[str, Any]:
    """Keys of the tokenizer and their values; `config` is the model's. Raises CheckpointError."""
    file = directory / FILE
    if not file.exists():
        raise CheckpointError(f"{directory} has no {FILE}, which the tokenizer of a GGUF file is made of")
    try:
        opened = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        tokenizer: Tokenizer = opened.backend_tokenizer
    except Exception as error:  # whatever an odd file makes of its code
        raise CheckpointError(f"the tokenizer of {directory} cannot be opened: {error}") from error
    data = json.loads(tokenizer.to_str())
    for said in _candidates(data, opened, config):
        vocabulary = Vocabulary(directory, said, architecture)
        try:
            again = build_tokenizer(vocabulary)
        except ModelError:
            continue
        if _encodes_alike(again, tokenizer, opened):
            return {f"{PREFIX}{key}": value for key, value in {**said, **_templates(opened)}.items()}
    kind = "cut" if _is_byte_level(data) else "spell"
    raise CheckpointError(
        f"its tokenizer is not written as GGUF: no rule that llama.cpp knows by a name ({', '.join(PRE_TOKENIZERS)}) "
        f"would {kind} text as it does"
    )


def _candidates(data: dict[str, Any], opened: Any, config: Any) -> Iterator[dict[str, Any]]:
    """What a file could say of the tokenizer, by llama.cpp's keys without their prefix."""
    model = data["model"]
    if model.get("type") != "BPE":
        raise CheckpointError(
            f"its tokenizer is of type {model.get('type')}, and only BPE is written as GGUF"
        )
    tokens, types = _tokens(data, config.vocab_size)
    ids = {role: _id(getattr(opened, key), getattr(config, key, None)) for role, key in ROLES.items()}
    said: dict[str, Any] = {"ggml.tokens": tokens, "ggml.token_type": types}
    said |= {f"ggml.{role}_token_id": number for role, number in ids.items() if number is not None}
    said |= {
        f"ggml.{end}_token_id": number
        for end, number in zip(ENDS, _other_ends(opened, ids["eos"]), strict=False)
    }
    encoded = opened("a").input_ids
    said["ggml.add_bos_token"] = bool(encoded) and encoded[0] == ids["bos"]
    said["ggml.add_eos_token"] = len(encoded) > 1 and encoded[-1] == ids["eos"]
    merges = [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]
    ]
    if _is_byte_level(data):
        said |= {"ggml.model": "gpt2", "ggml.merges": [" ".join(merge) for merge in merges]}
        known = published.published_name(opened)
        for name in sorted(PRE_TOKENIZERS, key=lambda name: name != known):
            yield {**said, "ggml.pre": name}
    else:
        said |= {"ggml.model": "llama", "ggml.pre": "default", "ggml.scores": _scores(tokens, merges)}
        for spaced in (True, False):
            yield {**said, "ggml.add_space_prefix": spaced}


def _other_ends(opened: Any, eos: int | None) -> list[int]:
    """What the generation settings say ends a text, beside the tokenizer's own token."""
    path = Path(opened.name_or_path) / "generation_config.json"
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    found = said.get("eos_token_id") if isinstance(said, dict) else None
    return [
        one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int) and one != eos
    ]


def _id(of_tokenizer: int | None, of_model: Any) -> int | None:
    if of_tokenizer is not None:
        return of_tokenizer
    return of_model if isinstance(of_model, int) else None


def _is_byte_level(data: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([data.get("pre_tokenizer"), data.get("decoder")])


def _tokens(data: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Every token of the model by its id, and its type; ids that nothing has are filled."""
    words = {number: token for token, number in data["model"]["vocab"].items()}
    types = dict.fromkeys(words, TokenType.NORMAL)
    if data["model"].get("byte_fallback"):
        types |= {number: TokenType.BYTE for number, word in words.items() if _is_byte(word)}
    for added in data.get("added_tokens", []):
        words[added["id"]] = added["content"]
        types[added["id"]] = TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED
    unknown = data["model"].get("unk_token")
    types |= {number: TokenType.UNKNOWN for number, word in words.items() if unknown and word == unknown}
    if max(words) >= size:
        raise CheckpointError(f"its tokenizer has the id {max(words)}, and the model {size} tokens")
    every = range(size)
    return (
        [words.get(number, f"[PAD{number}]") for number in every],
        [int(types.get(number, TokenType.UNUSED)) for number in every],
    )


def _is_byte(word: str) -> bool:
    return len(word) == 6 and word.startswith("<0x") and word.endswith(">")


def _scores(tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> list[float]:
    """sentencepiece merges what scores best; the token of an earlier merge scores more."""
    made: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        made.setdefault("".join(merge), rank)
    return [float(-made[token]) if token in made else 0.0 for token in tokens]


def _encodes_alike(again: Tokenizer, tokenizer: Tokenizer, opened: Any) -> bool:
    if any(again.encode(text).ids != opened(text).input_ids for text in PROBES):
        return False
    tokens = [tokenizer.id_to_token(number) or "" for number in range(tokenizer.get_vocab_size())]
    words = [token.replace(SPACE, " ") for token in tokens]
    plain = {"add_special_tokens": False}
    return [one.ids for one in again.encode_batch(words, **plain)] == [
        one.ids for one in tokenizer.encode_batch(words, **plain)
    ]


def _templates(opened: Any) -> dict[str, str]:
    template = opened.chat_template
    if template is None:
        return {}
    if isinstance(template, str):
        return {"chat_template": template}
    return {
        ("chat_template" if name == "default" else f"chat_template.{name}"): text
        for name, text in template.items()
    }
