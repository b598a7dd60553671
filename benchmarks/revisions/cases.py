"""What both revisions quantize: tiny models of five kinds of family by every recipe that fits, and the demo model."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.revisions.trees import SMALL, Setting, Tree

DENSE = ("llama", "gemma3_text", "phi3")
MIXTURES = ("qwen3_moe", "deepseek_v2")
DEMO, DEMO_RECIPES = "SmolLM2-135M", ("awq-g64", "gptq-g64")
# Recipes of the older formats: the recipe that an export starts from, and the export's target.
EXPORTED = {"awq-g64-autoawq": ("awq-g64", "autoawq"), "gptq-g64-autogptq": ("gptq-g64", "autogptq")}
SAME_AS_G64 = {
    "awq": "awq-g64",
    "gptq": "gptq-g64",
}  # they differ in group size and samples, which are set here
PLAIN_CACHE = Setting("kv_cache.dtype=none", "kv_cache.dtype=none")
ASYMMETRIC = Setting("weights.symmetric=false", "modules.0.scheme=W4A16_ASYM")
EIGHT_BITS = Setting("weights.bits=8", "modules.0.scheme=W8A16")
WHOLE_ROWS = Setting("weights.group_size=channel", "modules.0.group_size=channel")
DISTILLED = Setting(
    "experts.router_distillation=true",
    "passes=[{prune_experts: {prune_ratio: 0.25, criterion: reap}}, distill_router, quantize]",
)


@dataclass(frozen=True)
class Case:
    """A model, a recipe, and settings that both revisions take, each under its own names."""

    model: str
    recipe: str
    settings: tuple[Setting, ...] = ()
    variant: str = ""

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.model, self.recipe, self.variant)))

    def commands(self, tree: Tree, model: Path, out: Path) -> list[list[str]]:
        """The command lines of `lowbit` that make the case's checkpoint in `out`."""
        if self.recipe in EXPORTED and self.recipe not in tree.recipes:
            recipe, target = EXPORTED[self.recipe]
            between = out.with_name(f"{out.name}-compressed-tensors")
            settings = (*self.settings, PLAIN_CACHE)
            return [
                _quantize(tree, model, recipe, settings, between),
                ["export", str(between), "--to", target, "--out", str(out)],
            ]
        return [_quantize(tree, model, self.recipe, self.settings, out)]


def _quantize(tree: Tree, model: Path, recipe: str, settings: tuple[Setting, ...], out: Path) -> list[str]:
    command = ["quantize", "--model", str(model), "--recipe", recipe, "--out", str(out)]
    return [*command, *tree.spelled(settings)]


def tiny_cases(old: Tree) -> Iterator[Case]:
    """The old revision's recipes on each family that they fit, and variants that no recipe has."""
    for model in (*DENSE, *MIXTURES):
        for recipe in old.recipes:
            experts = recipe.startswith("reap") or "experts" in recipe
            if recipe not in SAME_AS_G64 and (model in MIXTURES or not experts):
                yield Case(model, recipe, SMALL[1:] if recipe == "reap25" else SMALL)
    for recipe in DEMO_RECIPES:
        yield Case("llama", recipe, (*SMALL, ASYMMETRIC), "asymmetric")
    yield Case("llama", "gptq-g64", (*SMALL, EIGHT_BITS), "8 bits")
    yield Case("phi3", "rtn-g64", (*SMALL, WHOLE_ROWS), "a scale a row")
    yield Case("qwen3_moe", "reap25-awq-g64", (*SMALL, DISTILLED), "routers distilled")


def demo_cases() -> list[Case]:
    """The demo model by the two recipes that the demo's texts speak of."""
    return [Case(DEMO, recipe) for recipe in DEMO_RECIPES]
