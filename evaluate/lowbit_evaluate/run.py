"""The story of an evaluation: MODEL and its base answer the same items and read the same text.

In process, everything is found and checked before the first model is loaded. With a target, MODEL is asked through
its endpoint and only the base is loaded here. torch is imported only where a model is loaded.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lowbit_core.errors import ConfigError
from lowbit_core.evals.items import Item
from lowbit_core.evals.results import Answers
from lowbit_core.progress import track
from lowbit_evaluate.endpoint import Endpoint, find_connect
from lowbit_evaluate.report import read_base
from lowbit_evaluate.settings import FROM_MANIFEST, Evaluation

if TYPE_CHECKING:
    from lowbit_quantize.model.reference import ModelReference


@dataclass(frozen=True)
class Outcome:
    """Both models' answers, the comparison on held-out text, and what was found out about the model."""

    answers: Answers
    base: Answers | None
    text: dict[str, Any] | None = None
    found: dict[str, Any] = field(default_factory=dict)


def evaluate(asked: Evaluation) -> Outcome:
    """Run an evaluation; ConfigError or ModelError before any model is loaded where it cannot be done."""
    return _through_endpoint(asked, asked.target) if asked.target else _in_process(asked)


def _in_process(asked: Evaluation) -> Outcome:
    _check_torch()
    from lowbit_evaluate import in_process

    in_process.check_device(asked.settings)
    model = in_process.find(asked.model, asked.settings)
    reference, known = _base(asked)
    text = None
    if asked.text is not None:
        if reference:
            in_process.check_same_tokens(model, reference)
        text = in_process.text_of(None if asked.text == FROM_MANIFEST else asked.text, model)
    base = in_process.run_model(reference, asked.items, text, asked.settings, "base") if reference else None
    ours = in_process.run_model(model, asked.items, text, asked.settings, "model")
    return Outcome(
        ours.answers,
        base.answers if base else known,
        in_process.text_document(base, ours, text, model) if text else None,
        {"fp8_cache": ours.fp8_cache},
    )


def _through_endpoint(asked: Evaluation, url: str) -> Outcome:
    """The endpoint is asked before the base is loaded: whether it is there shows at once."""
    endpoint = find_connect()(url, asked.model, asked.access)
    reference, base = _base(asked)
    answers = _ask(endpoint, asked.items)
    if reference:
        from lowbit_evaluate import in_process

        base = in_process.run_model(reference, asked.items, None, asked.settings, "base").answers
    return Outcome(answers, base, found={"served": endpoint.model})


def _ask(endpoint: Endpoint, items: Sequence[Item]) -> Answers:
    found = {one.key: one for one in track(endpoint.answers(items), len(items), f"{endpoint.model}: items")}
    return {item.key: found[item.key] for item in items}


def _base(asked: Evaluation) -> tuple["ModelReference | None", Answers | None]:
    """The base as a model to run, or its answers from a file."""
    if asked.base is None:
        return None, None
    if asked.base.endswith(".json"):
        return None, read_base(Path(asked.base).expanduser(), asked.items)
    _check_torch()
    from lowbit_evaluate import in_process

    in_process.check_device(asked.settings)
    return in_process.find(asked.base, asked.settings), None


def _check_torch() -> None:
    if find_spec("torch") is None or find_spec("transformers") is None:
        raise ConfigError(
            "running a model in process needs torch and transformers; run `pip install 'lowbit[cpu]'` or [gpu], or "
            "give --target URL of a served endpoint"
        )
