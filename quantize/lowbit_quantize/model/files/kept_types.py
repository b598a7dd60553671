"""Tensors that keep a type of their own, whatever the model computes in, as transformers loads them.

transformers casts every float to the type that is asked for, but for three kinds: what a class lists in
`_keep_in_fp32_modules_strict` stays float32 beside bfloat16 and float16 (corrections of routers, A_log, sinks), what it
lists in `_keep_in_fp32_modules` beside float16 only, and what a module makes in a type of its own stays that (counters,
tables of ids).
"""

import re
from typing import Any

import torch
from torch import nn

from lowbit_quantize.model.files.published_names import PublishedNames


class KeptTypes:
    """Which type each tensor of a skeleton has, when the model computes in another one."""

    def __init__(self, skeleton: nn.Module, names: PublishedNames) -> None:
        model: Any = skeleton
        self._model, self._slices = model, names.slices
        made = {name: tensor.dtype for name, tensor in skeleton.state_dict().items()}
        self._own: dict[str, torch.dtype] = {
            name: dtype for name, dtype in made.items() if dtype != model.config.dtype
        }
        self._patterns: dict[torch.dtype, dict[re.Pattern[str], torch.dtype]] = {}

    def dtype(self, inner: str, computed: torch.dtype) -> torch.dtype:
        """The type of a tensor, where the model computes in `computed`."""
        part = self._slices.get(inner)
        name = part.stack if part else inner
        for pattern, dtype in self._plan(computed).items():
            if pattern.search(name):
                return dtype
        return self._own.get(inner, computed)

    def _plan(self, computed: torch.dtype) -> dict[re.Pattern[str], torch.dtype]:
        if computed not in self._patterns:
            plan = self._model._get_dtype_plan(computed)
            globs = {re.compile(glob.replace("*", ".*")): dtype for glob, dtype in plan.items()}
            self._patterns[computed] = globs
        return self._patterns[computed]
