"""One entry of the table that everything reads: how a linear is stored, and how its numbers are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from lowbit_core.errors import NumericsError
from lowbit_quantize.methods.method import Method
from lowbit_quantize.methods.pruner import Pruner
from lowbit_quantize.schemes.dense import FORMAT as DENSE
from lowbit_quantize.schemes.scheme import Quantized, Scheme


@dataclass(frozen=True)
class ModulePlan:
    """A linear's scheme, and its methods in order, of which the last one quantizes."""

    scheme: Scheme
    methods: tuple[Method, ...]

    @property
    def quantizer(self) -> Method:
        return self.methods[-1]

    @property
    def pruner(self) -> Pruner | None:
        """The method that sets weights to zero, if one does; it may be the quantizer itself."""
        return next((method for method in self.methods if isinstance(method, Pruner)), None)

    @property
    def input_scalers(self) -> tuple[Method, ...]:
        """Methods that may scale the inputs."""
        return tuple(method for method in self.methods if method.scales_inputs)

    @property
    def samples_inputs(self) -> bool:
        """Whether some of the inputs are kept, token by token."""
        quantizer = self.scheme.input_quantizer
        calibrated = quantizer is not None and quantizer.static
        return calibrated or any("input_range" in method.needs for method in self.methods)

    @property
    def compensates(self) -> bool:
        """Whether the weight is aimed at what makes up for earlier errors, for which the base model walks too."""
        return any("base_stream" in method.needs for method in self.methods)

    @property
    def compressed(self) -> bool:
        """Whether it is stored otherwise than the base's weights are."""
        return self.scheme.format != DENSE

    def quantized(self, weight: Tensor, hessian: Tensor) -> Quantized:
        """A weight (out, in), or several of one shape at once, pruned and quantized; raises NumericsError."""
        pruner = self.pruner
        if pruner is None or pruner is self.quantizer:
            return self.quantizer.quantize(weight, hessian, self.scheme)
        pruned = pruner.prune(weight, hessian)
        found = self.quantizer.quantize(pruned.weight, hessian, self.scheme, pruned.mask)
        if found.dequantize().masked_select(~pruned.mask).any():
            raise NumericsError(
                f"{self.quantizer.name} in {self.scheme.name} gives numbers to weights that {pruner.name} has set to "
                "zero; this is a fault of Lowbit, please report it"
            )
        return found


# What is quantized, by name; a linear that is not there stays as it is. Names are full, or relative to a decoder layer.
Modules = Mapping[str, ModulePlan]
