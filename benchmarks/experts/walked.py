"""The walk of `lowbit quantize` by itself: given token ids, no FP8 cache, no trial of passes, no run to go on from.

`lowbit quantize` refuses texts that share runs of tokens; here their rows are counted and reported (run.py).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.pipeline import write_rest
from lowbit_quantize.plan import make_plan
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.recipe import parse_recipe
from lowbit_quantize.run.hidden_states import MEMORY_BYTES
from lowbit_quantize.run.journal import Journal
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.walk.forward import Walk, Work

BARE = {"kv_cache": {"dtype": "none"}, "quality": {"isolate": False}}


def walked(model: Path, keys: Mapping[str, Any], texts: tuple[TokenText, TokenText], out: Path) -> Walk:
    """Compress `model` into the new directory `out` by a recipe of these keys; all is written but a manifest."""
    reference = find_model(str(model))
    plan = make_plan(reference, parse_recipe({**BARE, **keys}, "of the benchmark"))
    files = WeightFiles(reference.path)
    decoder = Decoder(reference.config, plan.architecture, files, torch.device("cpu"), plan.skeleton)
    work = Work(plan.modules, plan.passes, plan.paired, plan.fp8_cache, baselines={})
    shutil.rmtree(out, ignore_errors=True)
    records = out / "records"
    records.mkdir(parents=True)
    writer = CheckpointWriter(out, decoder.depth + 1)
    walk = Walk(decoder, work, texts, writer, Journal(records, records), MEMORY_BYTES)
    walk.run()
    write_rest(plan, walk)
    return walk


def kept_experts(walk: Walk) -> dict[int, list[int]]:
    """The numbers of the experts that stay, by layer."""
    return {record.layer: record.kept_experts for record in walk.layers if record.kept_experts is not None}
