"""A GGUF file's tokenizer, held against the obvious slow algorithm on small vocabularies that are trained here."""

import json
import random
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tests.quantize.plain_tokenizer import ALPHABET, PlainBytePairs, PlainPieces
from tests.quantize.tiny_gguf import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    write_tiny_gguf,
    write_vocabulary,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

from lowbit_core.errors import ModelError
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.sources.gguf_model import GgufModel
from lowbit_quantize.model.sources.gguf_tokenizer import build_tokenizer, read_vocabulary
from lowbit_quantize.model.sources.pre_tokenizers import PRE_TOKENIZERS
from lowbit_quantize.quality.sources import find_documents
from lowbit_quantize.recipe import Text

CHARACTERS = (
    *"aeinorstT WHL's'll 're 0123456789 ,.!?()[]{}<>|/\\\"#$%&*+-=_~`^@:; \n\r\n\t ",
    *"éüßñçøÀÉ e\u0301 a\u0308 пРивет мИр Ωλ 你好世界。，日本語カタ 한국어 ภาษา हिन्दी עברית العربية ",
    *"🙂🦙👩\u200d🔬 \u00a0\u2003 ½²Ⅷ㍿ ﬁ",
    "  ", "   ", "\n\n", "'s", "'LL", "1234", " the", " and", "ing", "<|end|>", "<think>", "<|end|> x",
)  # fmt: skip
WHOLE = {"<|end|>": CONTROL, "<think>": USER_DEFINED}
TEXTS = 60


def texts(seed: int) -> Iterator[str]:
    """Random texts of letters, digits, signs, spaces and scripts, and of tokens that are found as they are."""
    drawn = random.Random(seed)
    for _ in range(TEXTS):
        yield "".join(drawn.choice(CHARACTERS) for _ in range(drawn.randint(1, 40)))


@cache
def sample() -> tuple[str, ...]:
    documents = [document.words for document in find_documents(Text(), "heldout", Text())[:20]]
    return (*documents, *texts(1))


@cache
def byte_vocabulary(pattern: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Tokens and merges of a byte-level vocabulary that was trained on text cut so, and then the whole tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pattern].pieces
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=list(ALPHABET.values()), show_progress=False
    )
    tokenizer.train_from_iterator(sample(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return [*tokens, *WHOLE], [(left, right) for left, right in model["merges"]]


@cache
def pieces() -> tuple[list[str], list[float], list[int]]:
    """Tokens, scores and types of a sentencepiece vocabulary: merges over spaces too, in the order of training."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    trainer = trainers.BpeTrainer(vocab_size=400, limit_alphabet=90, show_progress=False)
    tokenizer.train_from_iterator([text.replace(" ", "▁")[:2000] for text in sample()], trainer)
    learned = json.loads(tokenizer.to_str())["model"]
    special = ["<unk>", "<s>", "</s>", *WHOLE]
    letters = [token for token in learned["vocab"] if len(token) == 1 and token != "\n"]
    joined = [left + right for left, right in learned["merges"]]
    merged = [token for token in joined if "\n" not in token and token not in special]
    data = [f"<0x{byte:02X}>" for byte in range(256)]
    tokens = [*special, *data, *dict.fromkeys(merged), *letters]
    scores = [0.0] * (len(special) + 256) + [-float(rank) for rank in range(len(tokens) - len(special) - 256)]
    types = [UNKNOWN, CONTROL, CONTROL, *WHOLE.values(), *[BYTE] * 256]
    return tokens, scores, [*types, *[NORMAL] * (len(tokens) - len(types))]


def byte_level(pre: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """What a GGUF file says of a byte-level tokenizer."""
    tokens, merges = byte_vocabulary(pre if pre in PRE_TOKENIZERS else "gpt-2")
    types = [WHOLE.get(token, NORMAL) for token in tokens]
    end = tokens.index("<|end|>")
    said = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": types, "bos_token_id": end}
    return {**said, "eos_token_id": end, "merges": [" ".join(pair) for pair in merges], **changes}


def sentencepiece(**changes: Any) -> dict[str, Any]:
    """What a GGUF file says of a sentencepiece tokenizer."""
    tokens, scores, types = pieces()
    said = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    return {**said, "bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, **changes}


KINDS: dict[str, Callable[..., dict[str, Any]]] = {"bytes": byte_level, "pieces": sentencepiece}


def built(directory: Path, said: dict[str, Any], architecture: str = "llama") -> Tokenizer:
    file = write_vocabulary(directory / "v.gguf", said, architecture)
    return build_tokenizer(read_vocabulary(file, architecture))


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_bytes_are_merged_as_by_the_plain_algorithm(pre: str, tmp_path: Path) -> None:
    tokens, merges = byte_vocabulary(pre)
    cut = PRE_TOKENIZERS[pre]
    ids = {token: number for number, token in enumerate(tokens)}
    plain = PlainBytePairs(ids, merges, cut.patterns, tuple(WHOLE), cut.ignore_merges, cut.composed)
    tokenizer = built(tmp_path, byte_level(pre))
    for text in texts(2):
        assert tokenizer.encode(text, add_special_tokens=False).ids == plain.encode(text), text


@pytest.mark.parametrize("space_first", [True, False])
def test_pieces_are_merged_as_by_the_plain_algorithm(space_first: bool, tmp_path: Path) -> None:
    tokens, scores, types = pieces()
    ids = {token: number for number, token in enumerate(tokens)}
    whole = tuple(token for token, kind in zip(tokens, types, strict=True) if kind not in (NORMAL, BYTE))
    plain = PlainPieces(ids, scores, whole, space_first)
    tokenizer = built(tmp_path, sentencepiece(add_space_prefix=space_first))
    for text in [*texts(3), " one space", "  two", "a\n b", "<s> x </s>y", "aaaaaaaaaa"]:
        assert tokenizer.encode(text, add_special_tokens=False).ids == plain.encode(text), text


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["It", "'s", " 12345", " WE", "'", "LL", " go"]),
        ("smollm", ["It", "'s", " ", "1", "2", "3", "4", "5", " WE", "'", "LL", " go"]),
        ("llama-bpe", ["It", "'s", " ", "123", "45", " WE", "'LL", " go"]),
        ("qwen2", ["It", "'s", " ", "1", "2", "3", "4", "5", " WE", "'LL", " go"]),
        ("tekken", ["It", "'s", " ", "1", "2", "3", "4", "5", " WE", "'LL", " go"]),
        ("gpt-4o", ["It's", " ", "123", "45", " WE'LL", " go"]),
        ("deepseek-v3", ["It", "'s", " ", "123", "45", " WE", "'LL", " go"]),
        ("deepseek-coder", ["It", "'", "s", " ", "1", "2", "3", "4", "5", " WE", "'", "LL", " go"]),
        ("falcon", ["It", "'", "s", " ", "123", "45", " WE", "'", "LL", " go"]),
    ],
)
def test_text_is_cut_as_the_models_own_tokenizers_cut_it(pre: str, pieces: list[str]) -> None:
    cut = PRE_TOKENIZERS[pre].pieces.pre_tokenize_str("It's 12345 WE'LL go")
    assert [piece.replace("Ġ", " ") for piece, _ in cut] == pieces


@pytest.mark.parametrize(
    ("kind", "flags", "ends"),
    [
        ("pieces", {}, (True, False)),
        ("pieces", {"add_bos_token": False}, (False, False)),
        ("pieces", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
        ("bytes", {}, (False, False)),
        ("bytes", {"pre": "llama-bpe"}, (True, False)),
        ("bytes", {"pre": "llama-bpe", "add_bos_token": False}, (False, False)),
        ("bytes", {"add_bos_token": True, "add_eos_token": True}, (True, True)),
    ],
)
def test_bos_and_eos_are_added_where_the_file_says_so(
    kind: str, flags: dict[str, Any], ends: tuple[bool, bool], tmp_path: Path
) -> None:
    said = KINDS[kind](**flags)
    tokenizer = built(tmp_path, said)
    plain = tokenizer.encode("Hello you", add_special_tokens=False).ids
    bos, eos = ([said[f"{role}_token_id"]] * added for role, added in zip(("bos", "eos"), ends, strict=True))
    assert tokenizer.encode("Hello you").ids == [*bos, *plain, *eos]


def test_phi_3s_control_tokens_take_the_spaces_after_them(tmp_path: Path) -> None:
    spaced, bare = "<|end|>  \nthe", "<|end|>the"
    tokenizer = built(tmp_path, sentencepiece(), "phi3")
    assert tokenizer.encode(spaced).ids == tokenizer.encode(bare).ids
    tokenizer = built(tmp_path, sentencepiece())
    assert tokenizer.encode(spaced).ids != tokenizer.encode(bare).ids


@pytest.mark.parametrize(
    ("kind", "changes", "reason"),
    [
        ("bytes", {"pre": None}, "has no tokenizer.ggml.pre"),
        ("bytes", {"pre": "kimi-k2"}, "is 'kimi-k2', whose rule is not known here; known are command-r, dbrx"),
        ("bytes", {"merges": None}, "has no merges"),
        ("bytes", {"merges": ["zzz y"]}, "Token `zzz` out of vocabulary"),
        ("bytes", {"bos_token_id": None, "add_bos_token": True}, "adds BOS to a text and names no such token"),
        ("bytes", {"eos_token_id": 70000}, "its eos token has the id 70000"),
        ("bytes", {"token_type": [1, 1]}, "2 of ggml.token_type"),
        ("bytes", {"add_space_prefix": True}, "adds a space before the text"),
        ("pieces", {"scores": None}, "has no scores"),
        ("pieces", {"tokens": ["<unk>", "a", "a"], "scores": [0.0] * 3, "token_type": [2, 1, 1]}, "'a' is there twice"),
        ("pieces", {"remove_extra_whitespaces": True}, "remove_extra_whitespaces"),
        ("pieces", {"tokens": None}, "holds no tokens"),
        *(("pieces", {"model": model}, f"of type {model!r}") for model in ("bert", "t5", "rwkv", "plamo2", "none")),
    ],
)  # fmt: skip
def test_what_is_not_reproduced_is_refused_by_what_it_is(
    kind: str, changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    said = dict.fromkeys(byte_level()) | KINDS[kind]() | changes
    with pytest.raises(ModelError, match="give the original model's directory") as refused:
        find_model(str(write_tiny_gguf(tmp_path, said=said))).tokenizer()
    assert reason in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "flags", "family"),
    [
        ("pieces", {"add_bos_token": True}, "llama"),
        ("bytes", {"pre": "llama-bpe"}, "llama"),
        ("bytes", {"pre": "qwen2"}, "qwen2"),
        ("bytes", {"pre": "qwen2"}, "qwen3"),
        ("pieces", {}, "phi3"),
    ],
)
def test_the_files_of_a_checkpoint_open_to_the_same_tokens(
    kind: str, flags: dict[str, Any], family: str, tmp_path: Path
) -> None:
    templates = {"chat_template": "{{ 1 }}", "chat_template.tool_use": "{{ 2 }}"}
    said: dict[str, Any] = {**dict.fromkeys(byte_level()), **KINDS[kind](**flags), **templates}
    file = write_tiny_gguf(tmp_path / "model", family, said=said, vocab_size=len(said["tokens"]))
    GgufModel(file).write_tokenizer(tmp_path / "written")
    (tmp_path / "written" / "config.json").write_text(json.dumps({"model_type": family}))
    settings = json.loads((tmp_path / "written" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "extra_special_tokens" not in settings  # a list there stops transformers 4
    opened = AutoTokenizer.from_pretrained(tmp_path / "written")
    ours = find_model(str(file)).tokenizer()
    tokenizer = built(tmp_path, said, family)
    for text in texts(4):
        assert opened(text).input_ids == ours(text).input_ids == tokenizer.encode(text).ids
    assert (opened.bos_token_id, opened.eos_token_id) == (said["bos_token_id"], said["eos_token_id"])
    assert opened.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}"}


def test_a_tokenizer_that_transformers_opens_otherwise_for_its_model_is_refused(tmp_path: Path) -> None:
    said = byte_level("smollm")
    file = write_tiny_gguf(tmp_path, "qwen2", said=said, vocab_size=len(said["tokens"]))
    with pytest.raises(ModelError, match="transformers opens it as Qwen2Tokenizer, which encodes otherwise"):
        find_model(str(file)).tokenizer()
