"""One entry of the table that everything reads: how a linear is stored, and how its numbers are chosen."""

from collections.abc import Mapping
from dataclasses import dataclass

from lowbit_quantize.methods.method import Method
from lowbit_quantize.schemes.scheme import Scheme


@dataclass(frozen=True)
class ModulePlan:
    """A linear's scheme, and its methods in order, of which the last one quantizes."""

    scheme: Scheme
    methods: tuple[Method, ...]

    @property
    def quantizer(self) -> Method:
        return self.methods[-1]

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


# What is quantized, by name; a linear that is not there stays as it is. Names are full, or relative to a decoder layer.
Modules = Mapping[str, ModulePlan]
