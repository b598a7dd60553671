"""`--run`: the chosen recipe is made, served and load-tested, and what came is held beside what was predicted.

A run that is started again goes on: a checkpoint that is there is not made again. Latency between tokens
is measured on outputs that end at the context, that of a first token on prompts that come one after the other.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lowbit_core.errors import OutputError
from lowbit_core.kv_cache import GIB, tokens_of_blocks
from lowbit_core.log import get_logger
from lowbit_core.manifest import read_manifest
from lowbit_plan import processes
from lowbit_plan.outcome import Outcome
from lowbit_plan.page import as_html
from lowbit_plan.place import Place
from lowbit_plan.processes import Load
from lowbit_plan.recipe_file import recipe_text, serve_flags
from lowbit_plan.targets import Targets
from lowbit_plan.twin import PROMPTS, WAVES
from lowbit_plan.verdict import Verdict

log = get_logger("plan")

RECIPE, CHECKPOINT, REPORT, PAGE = "recipe.yaml", "checkpoint", "plan-report.json", "plan-report.html"
OUTPUT = 32  # tokens of each output of the load
SLACK = 4
WARM_PROMPT, WARM_OUTPUT = 32, 4  # of a first load, for what happens once


def verify(
    model: str,
    chosen: Verdict,
    targets: Targets,
    place: Place,
    folder: Path,
    *,
    closeness: str,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Run the plan in `folder`; returns the report, which is written there too. Raises what the programs fail with."""
    recipe, checkpoint = folder / RECIPE, folder / CHECKPOINT
    folder.mkdir(parents=True, exist_ok=True)
    text = recipe_text(model, chosen, targets, place, closeness=closeness)
    if recipe.exists() and checkpoint.exists() and _rules(recipe.read_text(encoding="utf-8")) != _rules(text):
        raise OutputError(f"--run {folder} holds the run of another recipe; give another directory")
    recipe.write_text(text, encoding="utf-8")
    log.info("1/3 lowbit quantize into %s", checkpoint)
    processes.quantize(model, recipe, checkpoint, folder / "quantize.log", *_set(overrides))
    outcomes = list(_measured(chosen, targets, place, folder))
    for one in outcomes:
        log.info("%s", one)
    report = {
        "kind": "lowbit.plan.run",
        "candidate": chosen.candidate.name,
        "targets": asdict(targets),
        "outcomes": [asdict(one) | {"off": one.off, "met": one.met} for one in outcomes],
        "met": all(one.met is not False for one in outcomes),
    }
    (folder / REPORT).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    latencies = {"between tokens": chosen.itl, "to the first token": chosen.ttft}
    shown = as_html(model, chosen.candidate.name, outcomes, latencies, closeness)
    (folder / PAGE).write_text(shown, encoding="utf-8")
    return report


def _set(overrides: Sequence[str]) -> list[str]:
    """Flags of `lowbit quantize`."""
    return [part for one in overrides for part in ("--set", one)]


def load_of(targets: Targets) -> Load:
    """Streams that end at the context, or a few tokens before: a text is not always cut to a token."""
    output = max(2, min(OUTPUT, targets.context // 4))
    prompt = max(1, targets.context - output - SLACK)
    return Load(targets.streams, WAVES * targets.streams, prompt, output)


def _measured(chosen: Verdict, targets: Targets, place: Place, folder: Path) -> Iterator[Outcome]:
    """Each thing, in the order of the targets."""
    checkpoint = folder / CHECKPOINT
    yield Outcome("weights", "bytes", chosen.weights_bytes, processes.weight_bytes(checkpoint))
    manifest = read_manifest(checkpoint)
    if manifest is not None:
        yield Outcome("mean KL", "nats", chosen.candidate.kl, manifest.quality.mean_kld, targets.max_kld)
    flags = serve_flags(chosen, targets, place)
    log.info("2/3 lowbit serve %s", " ".join(flags))
    with processes.serving(checkpoint, folder / "serve.log", *flags) as url:
        facts = processes.engine_facts(url)
        kv_gib = float(flags[flags.index("--kv-cache-gib") + 1])
        tokens = tokens_of_blocks(int(kv_gib * GIB), chosen.kv_bytes_per_token)
        yield Outcome("KV tokens", "tokens", tokens, facts["kv_tokens"])
        log.info("3/3 lowbit loadtest")
        one = load_of(targets)
        processes.load(url, Load(one.streams, one.streams, WARM_PROMPT, WARM_OUTPUT, seed=3), folder)
        itl_s = processes.inter_token_s(processes.load(url, one, folder))
        yield Outcome("inter-token latency", "s", chosen.itl.total, itl_s, targets.itl_s)
        prompts = Load(1, PROMPTS, targets.prompt, 1, seed=2)
        ttft_s = processes.first_token_s(processes.load(url, prompts, folder))
        yield Outcome("time to first token", "s", chosen.ttft.total, ttft_s, targets.ttft_s)


def _rules(recipe: str) -> list[str]:
    """A recipe without its comments, which hold figures that are measured again."""
    return [line for line in recipe.splitlines() if not line.startswith("#")]
