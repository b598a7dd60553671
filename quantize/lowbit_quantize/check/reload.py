"""The finished files, opened as transformers opens them, before a manifest vouches for them.

transformers loads a model whose tensors are on the meta device: it makes the model of the configuration, renames,
unpacks and stacks as it would for a reader, and says which names are missing, too many or of another shape. Nothing is
read but headers. What it does not open (int8 experts, integers across words) is opened by another reader
(unopened.py); transformers is then given the same linears unquantized. The tokenizer must answer as the base's does.
"""

import io
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lowbit_core.errors import NumericsError
from lowbit_quantize.check.unopened import unpacking_problem
from lowbit_quantize.model.files.unopened_linears import without_linears
from lowbit_quantize.model.skeleton import model_class
from lowbit_quantize.model.weights import INDEX_NAME
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.run.journal import UnopenedLinear

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
KV_SCALES = (".k_scale", ".v_scale")
SAMPLES = 4  # held-out sequences that both tokenizers are asked about
WORDS = ("Hello world", " two  spaces", "naïve café 北京 🙂\n\ttab", "<s>[INST] 12345.67 [/INST]</s>")
CONVERSATION = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4."}]
AGAIN = "this is a fault of Lowbit or of the base's configuration, please report it; no manifest is written"


@dataclass(frozen=True)
class TokenizerAnswers:
    """What a tokenizer makes of some samples and of a conversation, and its special ids."""

    ids: dict[str, list[int]]
    rendered: tuple[Any, ...]
    special: dict[str, int | None]


def answers_of(tokenizer: Any, text: TokenText) -> TokenizerAnswers:
    """The answers of the base's tokenizer, taken while it is there: to make it again can cost seconds."""
    return _answers(tokenizer, [*WORDS, *(tokenizer.decode(row) for row in text.ids[:SAMPLES])])


def check_reload(
    out: Path,
    carried: Collection[str],
    base: TokenizerAnswers,
    unopened: Mapping[str, UnopenedLinear],
    *,
    trust_remote_code: bool,
) -> None:
    """Raises NumericsError where readers would open another model or tokenizer than was measured.

    `unopened` are the linears that plain transformers does not open, by their published names.
    """
    with _quiet():
        problem = _names_problem(out, carried, unopened)
        problem = problem or (unpacking_problem(out, unopened) if unopened else None)
        problem = problem or _tokenizer_problem(out, base, trust_remote_code)
    if problem:
        raise NumericsError(f"the checkpoint in {out} is not what was measured: {problem}; {AGAIN}")


def _names_problem(out: Path, carried: Collection[str], unopened: Mapping[str, UnopenedLinear]) -> str | None:
    config = AutoConfig.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    tensors = {name: tensor for name, tensor in _headers(out) if name not in carried}
    if unopened:
        config.quantization_config = without_linears(config.quantization_config, unopened.keys())
        if config.quantization_config is None:
            del config.quantization_config
        tensors = _unquantized(tensors, unopened, config.dtype)
    try:
        model, found = model_class(config).from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            dtype=config.dtype,
        )
    except Exception as error:  # whatever an odd checkpoint makes of transformers' code
        return f"transformers does not open it ({' '.join(str(error).split())[:300]})"
    tied = getattr(model, "all_tied_weights_keys", {})
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(one) for one in found[kind])
        names = [name for name in names if name not in tied and not name.endswith(KV_SCALES)]
        if names:
            return f"{len(names)} {kind.replace('_', ' ')}, the first is {names[0]}"
    return None


def _unquantized(
    tensors: Mapping[str, Tensor], linears: Mapping[str, UnopenedLinear], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The same tensors, where these linears are stored as plain weights."""
    plain = {
        f"{name}.weight": torch.empty(linear.shape, dtype=dtype, device="meta")
        for name, linear in linears.items()
    }
    others = {
        n: one for n, one in tensors.items() if n.rpartition(".")[0] not in linears or n.endswith(".bias")
    }
    return others | plain


def _headers(out: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the checkpoint, without its numbers."""
    index = json.loads((out / INDEX_NAME).read_text(encoding="utf-8"))
    for file in sorted(set(index["weight_map"].values())):
        with safe_open(out / file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a dict)
                view = opened.get_slice(name)
                # An expert's shape is read as numbers, which meta tensors have not; without it, it is made of the rest.
                empty = ".experts." in name and name.endswith(".weight_shape")
                shape = [0] if empty else view.get_shape()
                yield name, torch.empty(shape, dtype=DTYPES[view.get_dtype()], device="meta")


def _tokenizer_problem(out: Path, base: TokenizerAnswers, trust_remote_code: bool) -> str | None:
    tokenizer = AutoTokenizer.from_pretrained(out, local_files_only=True, trust_remote_code=trust_remote_code)
    ours = _answers(tokenizer, base.ids)
    for sample, ids in base.ids.items():
        if ours.ids[sample] != ids:
            return f"its tokenizer reads {sample[:40]!r} otherwise than the base's"
    if ours.rendered != base.rendered:
        return "its chat template answers otherwise than the base's"
    for name, token in base.special.items():
        if ours.special[name] != token:
            return f"its tokenizer has the {name} {ours.special[name]}, the base's {token}"
    return None


def _answers(tokenizer: Any, samples: Iterable[str]) -> TokenizerAnswers:
    ids = {sample: tokenizer(sample)["input_ids"] for sample in samples}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return TokenizerAnswers(ids, tuple(_rendered(tokenizer)), special)


def _rendered(tokenizer: Any) -> Sequence[Any]:
    """A conversation by the template, or the name of what it raises; templates are the base's own programs."""
    answers: list[Any] = [tokenizer.chat_template]
    for prompt in (False, True):
        try:
            answers.append(
                tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt)
            )
        except Exception as error:
            answers.append(type(error).__name__)
    return answers


@contextmanager
def _quiet() -> Iterator[None]:
    """Libraries' bars and reports of names are for people who load a model."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)
