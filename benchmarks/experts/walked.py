"""The walk of `lowbit quantize` by itself: given token ids, no FP8 cache, no trial of passes, no run to go on from.

`lowbit quantize` refuses texts that share runs of tokens; here their rows are counted and reported (run.py).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lowbit_quantize.catalog import CATALOG, Catalog
from lowbit_quantize.check.weights import base_of
from lowbit_quantize.model.decoder import Decoder
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.pipeline import write_rest
from lowbit_quantize.plan import make_plan
from lowbit_quantize.quality.dataset import TokenText
from lowbit_quantize.recipe import parse_recipe
from lowbit_quantize.run.clock import Clock
from lowbit_quantize.run.directory import RunDirectory
from lowbit_quantize.run.hidden_states import MEMORY_BYTES
from lowbit_quantize.run.writer import CheckpointWriter
from lowbit_quantize.walk.forward import Walk, Work

BARE = {"kv_cache": {"dtype": "none"}, "quality": {"isolate": False}}


def walked(
    model: Path,
    keys: Mapping[str, Any],
    texts: tuple[TokenText, TokenText],
    out: Path,
    catalog: Catalog = CATALOG,
) -> Walk:
    """Compress `model` into the new directory `out` by a recipe of these keys; all is written but a manifest."""
    reference = find_model(str(model))
    plan = make_plan(reference, parse_recipe({**BARE, **keys}, "of the benchmark"), catalog)
    base = base_of(plan, WeightFiles(reference.path))
    decoder = Decoder(
        reference.config, plan.architecture, base.weights, torch.device("cpu"), plan.skeleton, plan.dtype
    )
    work = Work(plan.modules, plan.passes, plan.paired, plan.fp8_layers, baselines={})
    shutil.rmtree(out, ignore_errors=True)
    run = RunDirectory(out)
    run.scratch.mkdir(parents=True)
    shards = decoder.depth + plan.quantizes_head + 1 + len(base.carried_shards)
    writer = CheckpointWriter(out, shards, scratch=run.scratch)
    walk = Walk(decoder, work, texts, writer, run.journal("walk"), MEMORY_BYTES, Clock())
    walk.run()
    write_rest(plan, base, walk, run)
    return walk


def kept_experts(walk: Walk) -> dict[int, list[int]]:
    """The numbers of the experts that stay, by layer."""
    return {record.layer: record.kept_experts for record in walk.layers if record.kept_experts is not None}


def absorbed_by(walk: Walk) -> dict[int, dict[int, int]]:
    """Which of the experts that stay absorbed each of the others, by layer, where experts were merged."""
    return {record.layer: record.absorbed_by for record in walk.layers if record.absorbed_by is not None}
