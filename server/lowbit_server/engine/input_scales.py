"""Proof that the running engine rounds inputs with the checkpoint's static scales.

A linear whose inputs are rounded by one calibrated scale (FP8) reads it from the file; an engine that dropped it would
clip or lose what was measured, and no line of the log would say so. As with KV scales, files and layers must agree.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lowbit_core.errors import EngineError
from lowbit_server.engine.stored_numbers import as_float32, stored_numbers

INPUT_SCALE = re.compile(r"^(.*)\.input_scale$")


def read_input_scales(directory: Path) -> dict[str, float]:
    """The scale of each linear's inputs in a checkpoint's files, by its name; empty where there are none."""
    return {match[1]: max(values) for match, values in stored_numbers(directory, INPUT_SCALE)}


def prove_input_scales(
    checkpoint: Mapping[str, float], engine: Sequence[Mapping[str, Any]], *, all_reported: bool = True
) -> int:
    """The number of linears that run with the checkpoint's scales; EngineError where one does not.

    Without `all_reported`, scales that no layer reports are passed over: engines rename and stack what other tools
    write (experts, models with pictures).

    `engine` has what each layer reports: the `linears` that it is made of, and its `scale`, the largest of theirs.
    """
    running = {name: layer["scale"] for layer in engine for name in layer["linears"]}
    fused = {name: layer["linears"] for layer in engine for name in layer["linears"]}
    for name, stored in checkpoint.items():
        if name not in running and not all_reported:
            continue
        if name not in running:
            raise EngineError(f"the engine reports no input scale for {name}, which the checkpoint has")
        expected = max(checkpoint.get(other, stored) for other in fused[name])
        if as_float32(expected) != as_float32(running[name]):
            raise EngineError(
                f"{name}: the engine divides inputs by {running[name]:.9g}, the checkpoint says {expected:.9g}; its "
                "quality would be lower than was measured, so it is not served"
            )
    return len(checkpoint.keys() & running.keys())
