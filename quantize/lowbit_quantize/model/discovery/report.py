"""What was found of an architecture, for a person and as JSON: `lowbit inspect --architecture MODEL`."""

import resource
import time
from collections import Counter
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from lowbit_quantize.model.architecture import Architecture, Fold, LayerKind
from lowbit_quantize.model.discovery.found import open_model
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.model.streams.form import StreamForm


def report(model: str) -> tuple[dict[str, Any], RenderableType]:
    """The same facts as data and as tables; raises ModelError where a model cannot be walked. Reads no weights."""
    began, reference = time.monotonic(), find_model(model)
    architecture, _ = open_model(reference)
    cost = {
        "seconds": round(time.monotonic() - began, 1),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    counts = Counter(architecture.kinds)
    facts = {key: value for key, value in asdict(architecture).items() if key != "kinds"}
    kinds = [{"layers": count, **asdict(kind)} for kind, count in counts.items()]
    data = {"model": reference.name, **facts, "kinds": kinds, "cost": cost}
    return data, Group(_summary(reference.name, architecture, cost), *map(_table, counts, counts.values()))


def _summary(name: str, architecture: Architecture, cost: dict[str, float]) -> Table:
    table = Table(show_header=False, title=name)
    form = architecture.logits
    rows = {
        "architecture": architecture.model_type,
        "known by": "tests of ours" if architecture.tested else "running it: found so, not among our tests",
        "layers": f"{len(architecture.kinds)} at {architecture.layers}",
        "embedding, norm, head": f"{architecture.embedding}, {architecture.final_norm}, {architecture.head}",
        "layers are called with": _stream_words(architecture.stream),
        "embedding times": f"{architecture.embedding_factor:g}",
        "logits": f"times {form.factor:g}" + (f", capped at {form.cap:g}" if form.cap else ""),
        "cache": "a latent" if architecture.latent_cache else "keys and values",
        "found in": f"{cost['seconds']} s, {cost['peak_mib']:.0f} MiB at most",
    }
    for row in rows.items():
        table.add_row(*row)
    return table


def _stream_words(stream: StreamForm) -> str:
    words = ["hidden states" if stream.copies == 1 else f"{stream.copies} copies of hidden states"]
    words += ["something of the tokens"] * bool(stream.told) + ["what others left"] * bool(stream.left)
    return ", ".join(words) + (", by the model's own code" if stream.around else "")


def _table(kind: LayerKind, layers: int) -> Table:
    parts = [f"attention {kind.attention}" if kind.attention else "no attention"]
    parts += [f"experts {kind.experts}, router {kind.router}"] if kind.experts else []
    columns = ("step", "linears", "a scale folds into", "also read by", "role")
    dropped = "\n".join(f"no fold: {line}" for line in kind.dropped)
    table = Table(*columns, title=f"{layers} layers: {'; '.join(parts)}", caption=dropped or None)
    for group in kind.groups:
        roles = ["makes keys or values"] * group.attended + ["adds to the stream"] * bool(group.residual)
        linears, others = "\n".join(group.linears), "\n".join(group.other_readers)
        table.add_row(str(group.stage), linears, _fold_words(group.fold), others, ", ".join(roles))
    return table


def _fold_words(fold: Fold | None) -> str:
    if fold is None:
        return ""
    spread = fold.spread
    words = [fold.producer + ("" if not fold.norm else " (1 + w)" if fold.offset else " (w)")]
    if not fold.norm and (spread.start or spread.rows != spread.heads * spread.width):
        words.append(
            f"channels from {spread.start}" + (f", each {spread.stride}" if spread.heads > 1 else "")
        )
    if spread.repeats > 1:
        words.append(f"each for {spread.repeats} heads")
    if fold.power != 1:
        words.append("by the root")
    return ", ".join(words)
