"""What a step takes beside products and attention, measured on a narrow twin of the model that is really served.

The twin has the model's classes, layers, vocabulary and tokenizer, and few channels, so that of its time little is
products: the rest are the engine's steps, norms and activations, and the way from and to the client. What its own
kernels take is measured like any other's and subtracted. Weights are random: nobody reads what it says.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lowbit_core.errors import EngineError
from lowbit_core.log import get_logger
from lowbit_plan.latency import first_token, inter_token
from lowbit_plan.processes import Load, first_token_s, inter_token_s, load, serving
from lowbit_plan.profile import Measured, Profile, Wishes, beside_name
from lowbit_plan.sections import planned
from lowbit_plan.targets import Targets
from lowbit_plan.work import Work, work_of
from lowbit_quantize.model.discovery.narrow import SIZES, narrowed
from lowbit_quantize.model.reference import ModelReference, find_model
from lowbit_quantize.model.skeleton import model_class

log = get_logger("plan")

PROMPT, OUTPUT = 32, 32  # tokens of the load by which the time between tokens is measured
WAVES = 2  # of its streams
PROMPTS = 4  # by which the time to the first token is measured, one after the other
KEPT = (*(name for name in SIZES if name.endswith(("vocab_size", "_token_id"))), "sliding_window")
SEED = 0
SLACK = 16  # tokens: a text is not always cut to a token
LOG = "twin-serve.log"  # beside the profile


def add_beside(profile: Profile, reference: ModelReference, targets: Targets, wishes: Wishes) -> str:
    """Measure `wishes` and what goes beside them, as far as `profile` lacks it; returns the twin's name."""
    with tempfile.TemporaryDirectory(prefix="lowbit-plan-") as folder:
        twin, work = write_twin(reference, Path(folder) / "twin")
        inter_token(work, wishes, targets.streams, PROMPT + OUTPUT // 2)
        first_token(work, wishes, targets.prompt)
        profile.measure(wishes.kernels)
        lacking = [
            name
            for name in (
                beside_name(twin, targets.streams, 1),
                beside_name(twin, 1, targets.prompt),
            )
            if name not in profile.beside
        ]
        if lacking:
            log.info("serving a narrow twin of the model, to measure what a step takes beside its kernels")
            _measure(profile, twin, work, targets, Path(folder))
            profile.keep()
    return twin


def _measure(profile: Profile, twin: str, work: Work, targets: Targets, folder: Path) -> None:
    longest = str(max(targets.prompt, PROMPT + OUTPUT) + SLACK)
    log_file = folder / LOG if profile.file is None else profile.file.with_name(LOG)
    with _told(log_file), serving(folder / "twin", log_file, "--max-model-len", longest) as url:
        load(url, Load(targets.streams, targets.streams, PROMPT, 4, seed=3), folder)  # what happens once
        streams = Load(targets.streams, WAVES * targets.streams, PROMPT, OUTPUT)
        itl_s = inter_token_s(load(url, streams, folder))
        prompts = Load(1, PROMPTS, targets.prompt, 1, seed=2)
        ttft_s = first_token_s(load(url, prompts, folder))
    names = beside_name(twin, targets.streams, 1), beside_name(twin, 1, targets.prompt)
    kernels = Measured(replace(profile, file=None, beside=dict.fromkeys(names, 0.0)), twin)
    itl = inter_token(work, kernels, targets.streams, PROMPT + OUTPUT // 2).total
    ttft = first_token(work, kernels, targets.prompt).total
    profile.beside |= {names[0]: max(0.0, itl_s - itl), names[1]: max(0.0, ttft_s - ttft)}


@contextmanager
def _told(log_file: Path) -> Iterator[None]:
    """An error of the server says where its log is."""
    try:
        yield
    except EngineError as error:
        raise EngineError(
            f"a narrow twin of the model, served to be measured: {error}; its log is {log_file}"
        ) from error


def write_twin(reference: ModelReference, out: Path) -> tuple[str, Work]:
    """A checkpoint of the twin in a new directory; returns its name, which its configuration gives, and its work."""
    config = twin_config(reference.config)
    torch.manual_seed(SEED)
    model = model_class(config)(config).to(torch.bfloat16)
    config.dtype = "bfloat16"
    model.save_pretrained(out)
    reference.tokenizer().save_pretrained(out)
    written = json.loads((out / "config.json").read_text(encoding="utf-8"))
    written.pop("transformers_version", None)
    digest = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()[:12]
    return f"{config.model_type} {digest}", work_of(planned(find_model(str(out)))[1])


def twin_config(config: Any) -> Any:
    """The narrow configuration, with the vocabulary and the windows of the model's own tokenizer."""
    twin, real = narrowed(config).get_text_config(), config.get_text_config()
    for name in KEPT:
        if getattr(real, name, None) is not None:
            setattr(twin, name, getattr(real, name))
    return twin
