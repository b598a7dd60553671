"""What `lowbit serve` refuses on CPUs is what quantize's table of processors has no CPU kernel for."""

import pytest

from lowbit_quantize.catalog import CATALOG
from lowbit_quantize.schemes.processors.kernels import AMX, AMX_FP8
from lowbit_quantize.schemes.processors.linears import LINEARS
from lowbit_quantize.schemes.scheme import Scheme
from lowbit_server.engine.cpu_linears import KINDS, groups_of, unfit_kind

PRESETS = {preset.name: preset.make(preset.group_size) for preset in CATALOG.presets}


def group_of(scheme: Scheme) -> dict[str, object]:
    """The group that a checkpoint has of a scheme, as its file says it."""
    parts = {key: value for key, value in scheme.quantization_args().items() if hasattr(value, "model_dump")}
    said: dict[str, object] = {key: value.model_dump(mode="json") for key, value in parts.items()}
    return {"targets": ["any"], "format": scheme.format, **said}


@pytest.mark.parametrize("name", PRESETS)
def test_a_scheme_is_refused_on_cpus_just_where_its_row_has_no_kernel_for_them(name: str) -> None:
    kernels, kind = LINEARS[name].on("cpu"), unfit_kind(group_of(PRESETS[name]))
    if not kernels:
        assert kind is not None
        assert not kind.needs_amx
    elif all(kernel.needs in (AMX, AMX_FP8) for kernel in kernels):
        assert kind is not None
        assert kind.needs_amx
    else:
        assert kind is None


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.what)
def test_what_is_offered_instead_runs_on_every_cpu(kind: object) -> None:
    for name in kind.instead.split(" or "):  # type: ignore[attr-defined]
        assert unfit_kind(group_of(PRESETS[name])) is None


def test_fp8_files_of_other_tools_are_told_by_their_blocks() -> None:
    assert [unfit_kind(group) for group in groups_of({"quant_method": "fp8"})] == []
    (group,) = groups_of({"quant_method": "fp8", "weight_block_size": [128, 128]})
    found = unfit_kind(group)
    assert found is not None
    assert found.needs_amx


def test_a_group_without_weights_is_no_kind() -> None:
    assert unfit_kind({"targets": ["any"], "input_activations": {"num_bits": 8, "type": "float"}}) is None
