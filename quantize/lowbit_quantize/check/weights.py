"""Whether a model's files hold what its configuration asks for, from their headers alone."""

from typing import TYPE_CHECKING

import torch

from lowbit_core.errors import ModelError
from lowbit_quantize.model.weights import WeightFiles
from lowbit_quantize.plan import Plan

if TYPE_CHECKING:
    from lowbit_quantize.model.gguf_file import GgufFile

FLOATS = ("BF16", "F16", "F32")


def stored_weights(plan: Plan) -> "WeightFiles | GgufFile":
    """The weights as they were given."""
    if plan.reference.kind == "gguf":
        from lowbit_quantize.model.gguf_file import GgufFile  # other models do without its imports

        return GgufFile(plan.reference, plan.skeleton)
    return WeightFiles(plan.reference.path)


def check_weights(plan: Plan, weights: "WeightFiles | GgufFile") -> None:
    """Check, from the headers alone, that every weight is there in its shape; raises ModelError.

    A head that is tied may be absent; if it is stored, it must equal the embedding.
    """
    name, head = plan.reference.name, f"{plan.architecture.head}.weight"
    tied = bool(plan.reference.config.tie_word_embeddings)
    for inner, parameter in plan.skeleton.state_dict().items():
        weight = plan.architecture.published_name(inner)
        if weight not in weights:
            if weight == head and tied:
                continue
            raise ModelError(f"{name} lacks the tensor {weight}, which its configuration asks for")
        shape, dtype = weights.shape(weight), weights.dtype(weight)
        if shape != tuple(parameter.shape):
            raise ModelError(
                f"{name}: {weight} has shape {shape}, its configuration asks for {tuple(parameter.shape)}"
            )
        if dtype not in FLOATS:
            raise ModelError(
                f"{name}: {weight} is stored as {dtype}; give the unquantized model ({', '.join(FLOATS)})"
            )
    embedding = f"{plan.architecture.embedding}.weight"
    if tied and head in weights and not torch.equal(weights.read(head), weights.read(embedding)):
        raise ModelError(
            f"{name} says that its embeddings are tied and stores another {head}; set one of them right"
        )
