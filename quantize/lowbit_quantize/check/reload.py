"""The finished files, opened as transformers opens them, before a manifest vouches for them.

transformers loads a model whose tensors are on the meta device: it makes the model of the configuration, renames,
unpacks and stacks as it would for a reader, and says which names are missing, too many or of another shape. Nothing is
read but headers. The tokenizer must answer as the base's does.
"""

import io
import json
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from lowbit_core.errors import NumericsError
from lowbit_quantize.model.reference import ModelReference
from lowbit_quantize.model.weights import INDEX_NAME
from lowbit_quantize.quality.dataset import TokenText

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


def check_reload(out: Path, carried: Collection[str], reference: ModelReference, text: TokenText) -> None:
    """Raises NumericsError where plain transformers would open another model or tokenizer than was measured."""
    with _quiet():
        problem = _names_problem(out, carried)
        problem = problem or _tokenizer_problem(out, reference, text)
    if problem:
        raise NumericsError(f"the checkpoint in {out} is not what was measured: {problem}; {AGAIN}")


def _names_problem(out: Path, carried: Collection[str]) -> str | None:
    config = AutoConfig.from_pretrained(out, local_files_only=True, trust_remote_code=False)
    tensors = {name: tensor for name, tensor in _headers(out) if name not in carried}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        _, found = model_class.from_pretrained(
            None,
            config=config,
            state_dict=tensors,
            device_map={"": "meta"},
            output_loading_info=True,
            dtype=config.dtype,
        )
    except Exception as error:  # whatever an odd checkpoint makes of transformers' code
        return f"transformers does not open it ({' '.join(str(error).split())[:300]})"
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = sorted(str(one) for one in found[kind])
        names = [name for name in names if name not in tied and not name.endswith(KV_SCALES)]
        if names:
            return f"{len(names)} {kind.replace('_', ' ')}, the first is {names[0]}"
    return None


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


def _tokenizer_problem(out: Path, reference: ModelReference, text: TokenText) -> str | None:
    base = reference.tokenizer()
    ours = AutoTokenizer.from_pretrained(
        out, local_files_only=True, trust_remote_code=reference.trust_remote_code
    )
    samples = [*WORDS, *(base.decode(row) for row in text.ids[:SAMPLES])]
    for sample in samples:
        if ours(sample)["input_ids"] != base(sample)["input_ids"]:
            return f"its tokenizer reads {sample[:40]!r} otherwise than the base's"
    if _rendered(ours) != _rendered(base):
        return "its chat template answers otherwise than the base's"
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(ours, name) != getattr(base, name):
            return f"its tokenizer has the {name} {getattr(ours, name)}, the base's {getattr(base, name)}"
    return None


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
