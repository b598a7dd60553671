"""What an adapter is trained on: token ids, and which of them count.

Of a conversation only the assistant's answers count (with the mark that ends each), found as what the chat template
adds to the conversation before them; of plain text every token does. Held-out examples are those that training never
sees: a conversation that asks what a training example asks is left out of them.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lowbit_core.errors import ConfigError, RecipeError
from lowbit_core.log import get_logger
from lowbit_core.text_file import quote
from lowbit_quantize.quality.document import Document
from lowbit_quantize.quality.sources import find_documents
from lowbit_quantize.quality.templates import encode, is_conversation, render
from lowbit_quantize.recipe import Text

log = get_logger("recover")

IGNORED = -100  # in place of a token that does not count


@dataclass(frozen=True)
class Example:
    """Token ids of one document, and for each whether the loss is of it."""

    ids: tuple[int, ...]
    counts: tuple[bool, ...]


@dataclass(frozen=True)
class Batch:
    """(examples, tokens) each: ids and a mask of what is no padding; `targets` has `IGNORED` where nothing counts."""

    ids: Tensor
    mask: Tensor
    targets: Tensor


def load_examples(
    data: str, heldout: str | None, tokenizer: Any, longest: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples of files, folders or hub data sets; of one source every fifth is held out.

    Raises RecipeError or ConfigError where either is empty.
    """
    ours = Text(dataset=_known(data, "--data"), max_seq_length=longest, seed=seed)
    theirs = Text(dataset=_known(heldout or data, "--heldout"), max_seq_length=longest, seed=seed)
    training, held = find_documents(ours, "calibration", theirs), find_documents(theirs, "heldout", ours)
    if not training:
        raise ConfigError(f"--data {data} has no rows to train on; give a file with some (docs/lora.md)")
    asked = {_asked(one) for one in training}
    apart = [one for one in held if _asked(one) not in asked]
    if lost := len(held) - len(apart):
        log.warning(
            "%d of %d held-out examples ask what a training example asks, and are left out", lost, len(held)
        )
    if not apart:
        source = (
            f"--heldout {heldout}" if heldout else f"--data {data}, of which every fifth row is held out,"
        )
        raise ConfigError(
            f"{source} has no row that training does not have too ({len(held)} read); held-out loss would say nothing: "
            "give --heldout FILE with other rows"
        )
    return _fitting(training, tokenizer, longest, "--data"), _fitting(apart, tokenizer, longest, "held-out")


def example_of(document: Document, tokenizer: Any) -> Example:
    """A document's tokens and which count; raises RecipeError."""
    if not document.messages:
        ids = encode(document, tokenizer)
        return Example(tuple(ids), (True,) * len(ids))
    if not is_conversation(document, tokenizer):
        raise RecipeError(
            f"text {document.place}: it is a conversation, and the model has no chat template that tells answers from "
            "the rest; save one as chat_template.jinja in the model's directory, or give plain text"
        )
    text = render(document, tokenizer)
    spans = _answers(document, tokenizer, text)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = tuple(any(a <= start and end <= b for a, b in spans) for start, end in found["offset_mapping"])
    return Example(tuple(found["input_ids"]), counts)


def batches(
    examples: Sequence[Example], size: int, padding: int, order: random.Random | None = None
) -> Iterator[Batch]:
    """Examples `size` at a time, in the order that `order` draws, or as they lie; rows are filled up on the right."""
    places = list(range(len(examples)))
    if order is not None:
        order.shuffle(places)
    for start in range(0, len(places), size):
        yield batch_of([examples[place] for place in places[start : start + size]], padding)


def batch_of(examples: Sequence[Example], padding: int) -> Batch:
    """Some examples as one batch."""
    longest = max(len(one.ids) for one in examples)
    ids = torch.full((len(examples), longest), padding, dtype=torch.int64)
    mask, targets = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for row, one in enumerate(examples):
        tokens = torch.tensor(one.ids)
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
        targets[row, : len(tokens)] = torch.where(torch.tensor(one.counts), tokens, IGNORED)
    return Batch(ids, mask, targets)


def _known(source: str, flag: str) -> str:
    """A source, whose missing file is refused by the flag's name."""
    if not source or (source.startswith(("/", ".", "~")) and not Path(source).expanduser().exists()):
        raise ConfigError(
            f"{flag} {source!r} does not exist; give a file, a folder or hub:NAME (docs/texts.md)"
        )
    return str(Path(source).expanduser()) if source.startswith("~") else source


def _asked(document: Document) -> str:
    """What a document asks: all before its last answer; all of it where that is not an assistant's."""
    messages = document.messages
    if messages and messages[-1]["role"] == "assistant":
        messages = messages[:-1]
    asked = "\n".join(f"{one['role']}: {one['content']}" for one in messages) or document.words
    return " ".join(asked.lower().split())


def _answers(document: Document, tokenizer: Any, text: str) -> list[tuple[int, int]]:
    """Where in its text the assistant's answers begin and end; raises RecipeError where that cannot be told."""
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError(
            "the model's tokenizer does not say where tokens lie in a text, so that answers cannot be told; give a "
            "model with a tokenizer.json"
        )
    spans, messages = [], document.messages
    last = max((place for place, one in enumerate(messages) if one["role"] == "assistant"), default=None)
    if last is None:
        raise RecipeError(
            f"text {document.place}: the conversation has no answer of the assistant to learn; leave it out"
        )
    for place, one in enumerate(messages):
        if one["role"] != "assistant" or place == 0:
            continue
        before = _written(document, tokenizer, place, prompt=True)
        after = _written(document, tokenizer, place + 1, prompt=False)
        if text.startswith(after) and after.startswith(before):
            spans.append((len(before), len(after)))
        elif place == last:
            raise RecipeError(
                f"text {document.place}: the chat template writes what comes before the last answer otherwise than "
                f"with it ({quote(before[-40:])}), so that the answer cannot be told; mend the template"
            )
    return spans


def _written(document: Document, tokenizer: Any, messages: int, *, prompt: bool) -> str:
    """The first messages of a conversation as the template writes them, with `prompt` ready for an answer."""
    tools = {"tools": list(document.tools)} if document.tools else {}
    some = list(document.messages[:messages])
    try:
        return str(tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=prompt, **tools))
    except Exception as error:  # a template may raise anything
        raise RecipeError(
            f"text {document.place}: the model's chat template refuses the first {messages} messages: "
            f"{type(error).__name__}: {quote(str(error))}; leave the conversation out"
        ) from error


def _fitting(documents: Sequence[Document], tokenizer: Any, longest: int, what: str) -> list[Example]:
    """Examples of no more than `longest` tokens in which something counts beyond the first token."""
    made = [example_of(one, tokenizer) for one in documents]
    found = [one for one in made if len(one.ids) <= longest and any(one.counts[1:])]
    if lost := len(made) - len(found):
        log.warning("%d of %d %s examples have more than %d tokens or no answer, and are left out",
                    lost, len(made), what, longest)  # fmt: skip
    if not found:
        raise ConfigError(
            f"none of {len(made)} {what} examples has an answer within {longest} tokens; raise --max-seq-length"
        )
    return found
