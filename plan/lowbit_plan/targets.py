"""What is asked of a served model: memory, context, streams, latency, closeness; and what of it cannot be meant."""

import math
import re
from dataclasses import dataclass

from lowbit_core.errors import ConfigError

UNITS = {"": 1, "B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


@dataclass(frozen=True)
class Targets:
    """Limits, None where there is none.

    `fit_bytes` hold weights, cache and runtime. `context` tokens, prompt and output together, are kept of each of
    `streams`; `itl_s` is the time between two tokens of a stream while all generate at that context, `ttft_s` until
    the first token of a prompt of `prompt` tokens where nothing else runs. `max_kld` is in nats a token.
    """

    fit_bytes: int
    context: int
    streams: int
    prompt: int
    itl_s: float | None = None
    ttft_s: float | None = None
    max_kld: float | None = None


def size_of(flag: str, text: str) -> int:
    """Bytes of `8GiB`, `900MB` or a plain number; raises ConfigError."""
    found = SIZE.fullmatch(text)
    if found is None or found[2].upper() not in UNITS or float(found[1]) == 0:
        raise ConfigError(
            f"{flag} {text}: give a number above 0 with KB, MB, GB, KiB, MiB or GiB, such as 8GiB"
        )
    return int(float(found[1]) * UNITS[found[2].upper()])


def check_targets(targets: Targets, positions: int | None) -> None:
    """Raise ConfigError where the numbers cannot be meant; `positions` are what the model has."""
    if targets.context < 3 or targets.streams < 1:
        raise ConfigError(
            f"--context {targets.context} --streams {targets.streams}: a context has 3 tokens or more, streams are 1 "
            "or more"
        )
    if positions is not None and targets.context > positions:
        raise ConfigError(
            f"--context {targets.context}: the model has {positions} positions; give {positions} at most"
        )
    if not 2 <= targets.prompt < targets.context:
        raise ConfigError(
            f"--prompt {targets.prompt}: of a context of {targets.context} tokens allowed are 2 to "
            f"{targets.context - 1}, for an output must fit too"
        )
    for flag, value in (
        ("--itl-ms", targets.itl_s), ("--ttft-ms", targets.ttft_s), ("--max-kld", targets.max_kld)
    ):  # fmt: skip
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(f"{flag}: give a number above 0, or leave it out")
