"""What passes take out of the base's layers, for the manifest and for `--dry-run`."""

from collections.abc import Mapping

from lowbit_core.structure import StructureRecord
from lowbit_quantize.passes.prune_width import PruneWidth
from lowbit_quantize.plan import Plan


def structure_record(plan: Plan, scores: Mapping[int, float]) -> StructureRecord | None:
    """`scores` are what the model would lose by each layer of the base, where that was measured."""
    if plan.cut is None:
        return None
    narrowing = next((one for one in plan.passes if isinstance(one, PruneWidth)), None)
    dropping, depth = plan.dropping, len(plan.base.layers)
    return StructureRecord(
        layers=depth,
        kept_layers=list(dropping.kept if dropping and dropping.kept else range(depth)),
        sizes=narrowing.sizes if narrowing else {},
        layer_criterion=dropping.chosen_by if dropping else None,
        width_criterion=narrowing.recipe.criterion if narrowing else None,
        layer_scores=dict(scores),
    )


def structure_words(plan: Plan) -> str | None:
    """What a run will take out; of layers that are still to be measured, how many."""
    record = structure_record(plan, {})
    if record is None:
        return None
    parts = [str(record)] if str(record) else []
    if plan.dropping is not None and plan.dropping.kept is None:
        left, criterion = record.layers - plan.dropping.count, plan.dropping.chosen_by
        measured = f"{left} of {record.layers} layers by {criterion}, which the run measures"
        parts.insert(0, f"{measured}: sizes are at most these")
    return "; ".join(parts)
