"""Router distillation: after pruning, a layer's router is fitted anew to what the unpruned layer gave.

Router KD (arXiv 2603.02217) trains only the routers of a pruned model on unlabelled text. Here it is done layer by
layer: with x a sample of the block's inputs on the calibration text, the rows of the kept experts minimize
‖block(x) − base block(x)‖². Experts do not change, so their outputs are computed once; the router is the block's own
module, with its top-k, groups and normalization, on a float32 copy of its weight. A quarter of the sample is not
fitted to: a router that does not lower the error there stays as it was.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lowbit_quantize.model.architecture import Architecture, kind_of
from lowbit_quantize.model.experts.linears import expert_outputs
from lowbit_quantize.model.experts.routing import Routing, routed_sum_of
from lowbit_quantize.model.experts.visited import RoutedCall
from lowbit_quantize.passes.kind import NoOptions, PlainPass
from lowbit_quantize.statistics.sample import Sample
from lowbit_quantize.walk.layer import LayerContext

SAMPLE_TOKENS = 8192
SAMPLE_VALUES = 1 << 28  # tokens · experts · hidden that are held at once
STEPS = 300
BATCH_TOKENS = 512
RELATIVE_RATE = 0.02  # Adam's step, relative to the root mean square of the router's weight
CHECK_EVERY = 4  # every fourth token checks


def bounded(inputs: Tensor, experts: int) -> Tensor:
    """As many of a sample's rows, spread evenly, as outputs of all experts can be held for."""
    most = max(CHECK_EVERY, min(SAMPLE_TOKENS, SAMPLE_VALUES // (experts * inputs.shape[1])))
    return inputs[:: -(-len(inputs) // most)]


def distill_router(layer: nn.Module, architecture: Architecture, inputs: Tensor, target: Tensor) -> bool:
    """Fit a pruned layer's router so that its block gives `target` for `inputs`, both (tokens, hidden).

    Returns whether the error on the tokens that were not fitted to fell; if not, the router is left as it was.
    """
    routing = Routing(layer, kind_of(layer))
    outputs = expert_outputs(layer.get_submodule(architecture.experts), _called(routing, inputs).hidden)  # type: ignore[arg-type]
    check = torch.arange(len(inputs), device=inputs.device) % CHECK_EVERY == CHECK_EVERY - 1

    def error() -> float:
        mixed = routed_sum_of(_called(routing, inputs[check]), outputs[check])
        return float((mixed - target[check]).square().sum())

    before, fitted = error(), _fitted(routing, inputs[~check], outputs[~check], target[~check])
    routing.router.weight.data.copy_(fitted)
    if not error() < before:
        return False
    router: Any = layer.get_submodule(architecture.router)
    router.weight = routing.router.weight
    return True


def _called(routing: Routing, inputs: Tensor) -> RoutedCall:
    with torch.no_grad():
        called: RoutedCall = routing(inputs)
    return called


def _fitted(routing: Routing, inputs: Tensor, outputs: Tensor, target: Tensor) -> Tensor:
    """The router's weight, float32, after `STEPS` of Adam down the squared error."""
    wide = copy.deepcopy(routing).float()
    weight: Tensor = wide.router.weight.requires_grad_(True)
    optimizer = torch.optim.Adam([weight], lr=RELATIVE_RATE * float(weight.detach().square().mean().sqrt()))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    generator = torch.Generator().manual_seed(0)
    power = target.float().square().mean().clamp(min=1e-20)
    for _ in range(STEPS):
        rows = torch.randint(len(inputs), (min(BATCH_TOKENS, len(inputs)),), generator=generator)
        rows = rows.to(inputs.device)
        given = routed_sum_of(wide(inputs[rows].float()), outputs[rows])
        loss = (given - target[rows].float()).square().mean() / power
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return weight.detach()


class DistillRouter(PlainPass):
    """Fits the router of each layer whose experts were pruned; kept only if held-out KL falls."""

    name = "distill_router"
    on_trial = True

    def __init__(self, architecture: Architecture) -> None:
        self._architecture = architecture

    def run(self, layer: nn.Module, context: LayerContext) -> None:
        if context.result.kept_experts is None:
            return
        seen, router = Sample(SAMPLE_TOKENS), self._architecture.router
        context.decoder.observe(
            layer, context.index, context.calibration, {router: seen.add}, None, stop=True
        )
        inputs = bounded(seen.rows(), len(context.result.kept_experts))
        base: Any = context.base_layer()
        with torch.no_grad():
            call = Routing(base, kind_of(base))(inputs)
            experts = base.get_submodule(self._architecture.experts)
            target = experts(call.hidden, call.chosen, call.gates)
        distill_router(layer, self._architecture, inputs, target)


class DistillRouterKind:
    """It has no options; what it makes up for is pruning, which must stand before it."""

    name = DistillRouter.name
    options = NoOptions
    after = ("prune_experts",)

    def make(self, options: NoOptions, config: Any, architecture: Architecture, model: str) -> DistillRouter:
        return DistillRouter(architecture)
