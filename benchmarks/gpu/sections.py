"""All sections in the order in which they matter: right before fast, whole layers before their parts."""

from benchmarks.gpu.agreement import CASES, SAME_TWICE, agreement
from benchmarks.gpu.kernels import SCHEMES, kernel
from benchmarks.gpu.layers import SHAPES, layer
from benchmarks.gpu.parts import EXPERTS, hessian, machine, operations, quantizing
from benchmarks.gpu.place import Place
from benchmarks.gpu.report import Section

__all__ = ["Place", "sections"]


def sections(place: Place) -> list[Section]:
    """What is run at this place; on a CPU a run is held against a second one, and one or two of each kind do."""
    cases = CASES if place.cuda else SAME_TWICE
    alike = [Section(case.name, 15, case_of) for case in cases for case_of in [agreement(case)]]
    return [
        Section("machine", 0, machine),
        Section("Hessian", 20, hessian),
        *(Section(f"the kernels of {name}", 15, kernel(name)) for name in SCHEMES),
        *alike[:3],
        *(Section(f"a layer of {shape.name}", shape.seconds, layer(shape)) for shape in SHAPES),
        *(Section(f"an expert of {name}", 30, quantizing(name)) for name in EXPERTS),
        Section("operations of an expert", 20, operations),
        *alike[3:],
    ]
