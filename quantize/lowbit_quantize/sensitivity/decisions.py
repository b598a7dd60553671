"""What is decided about a model: a scheme for each set of linears that engines fuse, a type for each layer's cache."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from lowbit_core.errors import ConfigError, RecipeError
from lowbit_quantize.cache_layers import layers_in_fp8
from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.model.architecture import linear_of
from lowbit_quantize.plan import Plan, fused_sets, table_of
from lowbit_quantize.recipe import NONE, KVCache, MethodStep, Recipe, Rule
from lowbit_quantize.rules import DEFAULT_METHODS
from lowbit_quantize.sensitivity.report import CACHE, HEAD, Candidate
from lowbit_quantize.walk.module_plan import ModulePlan, Modules


@dataclass(frozen=True)
class Decision:
    """Linears that share a scheme, by their names in the skeleton; `layer` is None for the head.

    The cache of a layer is one too, of no linears.
    """

    name: str
    layer: int | None
    kind: str
    linears: tuple[str, ...]


def parse_candidates(text: str, recipe: Recipe) -> tuple[Candidate, ...]:
    """`SCHEME[:GROUP_SIZE][:METHOD+METHOD]` one after the other; raises ConfigError.

    What is not said is as in the recipe's first rule with a scheme; `none` are weights as they are.
    """
    found = tuple(_candidate(one.strip(), recipe) for one in text.split(",") if one.strip())
    names = [one.name for one in found]
    if not found or len(set(names)) < len(names):
        raise ConfigError(
            f"--candidates {text}: give different schemes with commas between them, such as W4A16,W8A8 or "
            "W4A16:64:awq+gptq"
        )
    return found


def _candidate(text: str, recipe: Recipe) -> Candidate:
    scheme, *rest = text.split(":")
    rule = next((one for one in recipe.modules if one.scheme != NONE), None)
    if scheme == NONE:
        if rest:
            raise ConfigError(f"--candidates {text}: none has neither group size nor methods")
        return Candidate(name=NONE, scheme=NONE)
    fixed = {preset.name for preset in CATALOG.presets if preset.fixed_size}
    size = rule.group_size if rule and scheme not in fixed else None
    methods = rule.methods if rule and rule.methods else DEFAULT_METHODS
    for part in rest:
        if part.isdigit() or part == "channel":
            size = "channel" if part == "channel" else int(part)
        elif part:
            methods = tuple(MethodStep.model_validate(name) for name in part.split("+"))
        else:
            raise ConfigError(
                f"--candidates {text}: allowed is SCHEME[:GROUP_SIZE][:METHOD+METHOD], such as W4A16:64:awq+gptq"
            )
    return Candidate(name=text, scheme=scheme, group_size=size, methods=methods)


def decisions_of(plan: Plan) -> tuple[Decision, ...]:
    """Every set of linears that the plan quantizes, the head where it is no embedding, and the layers' caches."""
    architecture, found = plan.architecture, []
    for names in fused_sets(plan.skeleton, architecture):
        if names[0] in plan.modules:
            layer = int(names[0].removeprefix(f"{architecture.layers}.").partition(".")[0])
            kind = _kind(plan, [name.removeprefix(f"{architecture.layers}.{layer}.") for name in names])
            found.append(Decision(f"{layer}.{kind}", layer, kind, tuple(names)))
    if not plan.tied:
        found.append(Decision(HEAD, None, HEAD, (architecture.head,)))
    if not architecture.latent_cache and architecture.kv_scales:
        layers = sorted(layers_in_fp8(KVCache(dtype="fp8"), architecture, plan.config))
        found += [Decision(f"{layer}.{CACHE}", layer, CACHE, ()) for layer in layers]
    return tuple(found)


def _kind(plan: Plan, names: Sequence[str]) -> str:
    """`self_attn.q_proj+k_proj+v_proj`, or the experts' own name."""
    if plan.architecture.in_experts(names[0]):
        return plan.architecture.experts
    parent, _, first = names[0].rpartition(".")
    rest = [name.removeprefix(f"{parent}.") for name in names[1:]]
    return "+".join([f"{parent}.{first}" if parent else first, *rest])


def entries_of(plan: Plan, candidates: Sequence[Candidate]) -> dict[str, Modules]:
    """The table that each candidate by itself makes of the model, by its name; raises RecipeError where it has none.

    The head is in those tables whose scheme it can have.
    """
    found: dict[str, Modules] = {}
    for one in candidates:
        if one.scheme == NONE:
            continue
        try:
            table = dict(_table(plan, one, "*"))
        except RecipeError as error:
            raise RecipeError(f"--candidates {one.name}: {error}") from None
        if not plan.tied:
            head = plan.names.published(plan.architecture.head)
            with suppress(RecipeError):
                table[plan.architecture.head] = _table(plan, one, head)[plan.architecture.head]
        found[one.name] = table
    return found


def _table(plan: Plan, candidate: Candidate, match: str) -> Modules:
    rule = Rule(
        match=(match,), scheme=candidate.scheme, group_size=candidate.group_size, methods=candidate.methods
    )
    recipe = plan.recipe.model_copy(update={"modules": (rule,)})
    return table_of(plan.skeleton, plan.architecture, recipe, CATALOG, plan.dtype)[0]


def stored_bytes(plan: Plan, decision: Decision, entry: ModulePlan | None) -> int:
    """Bytes of a decision's linears in the checkpoint."""
    shapes = [linear_of(plan.skeleton, name).weight.shape for name in decision.linears]
    if entry is None:
        return sum(outputs * inputs * plan.dtype.itemsize for outputs, inputs in shapes)
    return sum(entry.scheme.bytes(outputs, inputs)[0] for outputs, inputs in shapes)


def weights_of(plan: Plan, decision: Decision) -> int:
    """Numbers of a decision's linears."""
    return sum(linear_of(plan.skeleton, name).weight.numel() for name in decision.linears)
