"""The tokenizer that a GGUF file describes, as Hugging Face's `tokenizers` writes it down.

The file has the vocabulary and says how it is used: the kind of model, whether BOS and EOS are added and a space before
the text, which tokens are looked for in the text as they are. Each of these is held to; what a file cannot say, the
rule that a byte-level vocabulary cuts text by, is known by its name or refused. What the keys mean: llama.cpp's
`src/llama-vocab.cpp`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from lowbit_core.errors import ModelError
from lowbit_quantize.model.sources.gguf_header import read_metadata
from lowbit_quantize.model.sources.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer

PREFIX = "tokenizer."
LISTS = ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
SPACE = "▁"  # how sentencepiece spells a space
SENTENCEPIECE_IDS = {"bos": 1, "eos": 2, "unknown": 0}  # where the file does not say
KEEP_SPACE = ("<unk>", "<s>", "<|endoftext|>")  # Phi-3's control tokens that leave the space after them


@dataclass(frozen=True)
class Vocabulary:
    """What the file says of its tokenizer, by llama.cpp's keys without their prefix."""

    path: Path
    said: dict[str, Any]
    architecture: str

    @property
    def model(self) -> str:
        return str(self.said.get("ggml.model"))

    @cached_property
    def tokens(self) -> list[str]:
        found: list[str] = self.said.get("ggml.tokens") or []
        if not found:
            raise self.error("it holds no tokens")
        return found

    @cached_property
    def types(self) -> Sequence[int]:
        found: list[int] | None = self.said.get("ggml.token_type")
        return found or [TokenType.NORMAL] * len(self.tokens)

    @cached_property
    def ids(self) -> dict[str, int]:
        return {token: number for number, token in enumerate(self.tokens)}

    def special(self, role: str) -> str | None:
        """The token that is `bos`, `eos`, `unknown` or `padding`."""
        default = SENTENCEPIECE_IDS.get(role) if self.model == "llama" else None
        number: int | None = self.said.get(f"ggml.{role}_token_id", default)
        if number is None:
            return None
        if not 0 <= number < len(self.tokens):
            raise self.error(f"its {role} token has the id {number}, and there are {len(self.tokens)} tokens")
        return self.tokens[number]

    def flag(self, name: str, default: bool) -> bool:
        return bool(self.said.get(f"ggml.{name}", default))

    def of_type(self, *kinds: TokenType) -> Iterator[str]:
        return (token for token, kind in zip(self.tokens, self.types, strict=True) if kind in kinds)

    def error(self, reason: str) -> ModelError:
        return ModelError(
            f"the tokenizer of {self.path} is not reproduced: {reason}; give the original model's directory"
        )


def read_vocabulary(path: Path, architecture: str) -> Vocabulary:
    """The vocabulary of a GGUF file; raises ModelError where it contradicts itself."""
    metadata, _ = read_metadata(path, LISTS)
    said = {key.removeprefix(PREFIX): value for key, value in metadata.items() if key.startswith(PREFIX)}
    vocabulary = Vocabulary(path, said, architecture)
    tokens = vocabulary.tokens
    for name in ("token_type", "scores"):
        found = vocabulary.said.get(f"ggml.{name}")
        if found is not None and len(found) != len(tokens):
            raise vocabulary.error(f"it has {len(tokens)} tokens and {len(found)} of ggml.{name}")
    if len(vocabulary.ids) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocabulary.ids[token] != number)
        raise vocabulary.error(f"the token {twice!r} is there twice")
    return vocabulary


def build_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The tokenizer; raises ModelError where it would not be the file's."""
    if vocabulary.model == "llama":
        tokenizer = _sentencepiece(vocabulary)
    elif vocabulary.model == "gpt2":
        tokenizer = _byte_level(vocabulary, _pre_tokenizer(vocabulary))
    else:
        raise vocabulary.error(f"it is of type {vocabulary.model!r}, and only llama and gpt2 are")
    _add_whole_tokens(tokenizer, vocabulary)
    _add_ends(tokenizer, vocabulary)
    return tokenizer


def _pre_tokenizer(vocabulary: Vocabulary) -> PreTokenizer:
    name = vocabulary.said.get("ggml.pre")
    if name is None:
        raise vocabulary.error("it has no tokenizer.ggml.pre, which says how text is cut")
    if name not in PRE_TOKENIZERS:
        raise vocabulary.error(
            f"its tokenizer.ggml.pre is {name!r}, whose rule is not known here; "
            f"known are {', '.join(sorted(PRE_TOKENIZERS))}"
        )
    return PRE_TOKENIZERS[name]


def _byte_level(vocabulary: Vocabulary, cut: PreTokenizer) -> Tokenizer:
    if vocabulary.flag("add_space_prefix", False):
        raise vocabulary.error("it is byte-level and adds a space before the text (add_space_prefix)")
    tokenizer = Tokenizer(_bpe(vocabulary, _stored_merges(vocabulary), ignore_merges=cut.ignore_merges))
    if cut.normalizer:
        tokenizer.normalizer = cut.normalizer
    tokenizer.pre_tokenizer = cut.pieces
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _stored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    merges = vocabulary.said.get("ggml.merges")
    if merges is None:
        raise vocabulary.error("it has no merges")
    cuts = [(merge, merge.find(" ", 1)) for merge in merges]  # a token may begin with a space
    return [(merge[:cut], merge[cut + 1 :]) for merge, cut in cuts]


def _bpe(vocabulary: Vocabulary, merges: list[tuple[str, str]], **options: Any) -> BPE:
    try:
        return BPE(vocabulary.ids, merges, **options)
    except Exception as error:  # whatever its Rust code raises, as on a merge of what is no token
        raise vocabulary.error(str(error)) from error


def _sentencepiece(vocabulary: Vocabulary) -> Tokenizer:
    """sentencepiece's BPE merges what has the best score, the leftmost first; here each merge has a rank."""
    if vocabulary.flag("remove_extra_whitespaces", False):
        raise vocabulary.error("it merges spaces (remove_extra_whitespaces)")
    unknown = vocabulary.special("unknown")
    tokenizer = Tokenizer(
        _bpe(vocabulary, _scored_merges(vocabulary), unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spelled = normalizers.Replace(" ", SPACE)
    plain = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if vocabulary.flag("add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spelled])
        tokenizer.decoder = decoders.Sequence([*plain, decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.normalizer = spelled
        tokenizer.decoder = decoders.Sequence(plain)
    return tokenizer


def _scored_merges(vocabulary: Vocabulary) -> list[tuple[str, str]]:
    """Every way to put a token together out of two, the token with the best score first."""
    scores = vocabulary.said.get("ggml.scores")
    if scores is None:
        raise vocabulary.error("it has no scores")
    ids = vocabulary.ids
    made = vocabulary.of_type(TokenType.NORMAL, TokenType.USER_DEFINED, TokenType.UNUSED)
    merges = [
        (-scores[ids[token]], ids[token], ids[token[:cut]], ids[token[cut:]])
        for token in made
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    tokens = vocabulary.tokens
    return [(tokens[left], tokens[right]) for _, _, left, right in sorted(merges)]


def _add_whole_tokens(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    """Control tokens, and the ones that the model's makers added, are found in the text before anything else."""
    strips = vocabulary.architecture == "phi3" and vocabulary.model == "llama"
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True, rstrip=strips and token not in KEEP_SPACE)
            for token in vocabulary.of_type(TokenType.CONTROL, TokenType.UNKNOWN)
        ]
    )
    tokenizer.add_tokens(
        [AddedToken(token, normalized=False) for token in vocabulary.of_type(TokenType.USER_DEFINED)]
    )


def _add_ends(tokenizer: Tokenizer, vocabulary: Vocabulary) -> None:
    cut = PRE_TOKENIZERS.get(vocabulary.said.get("ggml.pre", ""))
    adds_bos = cut.adds_bos if vocabulary.model == "gpt2" and cut else vocabulary.model == "llama"
    ends = {"bos": vocabulary.flag("add_bos_token", adds_bos), "eos": vocabulary.flag("add_eos_token", False)}
    added = {role: vocabulary.special(role) for role, wanted in ends.items() if wanted}
    for role, token in added.items():
        if token is None:
            raise vocabulary.error(f"it adds {role.upper()} to a text and names no such token")
    begin, end = added.get("bos"), added.get("eos")
    if not added:
        return

    def around(text: str, kind: int) -> list[str]:
        return [f"{part}:{kind}" for part in (begin, text, end) if part]

    tokenizer.post_processor = processors.TemplateProcessing(
        single=around("$A", 0),
        pair=[*around("$A", 0), *around("$B", 1)],
        special_tokens=[(token, vocabulary.ids[token]) for token in added.values() if token],
    )
