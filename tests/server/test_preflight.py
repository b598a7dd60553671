"""4-bit experts on a CPU that cannot run them are refused before the engine starts."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from lowbit_core.errors import CheckpointError
from lowbit_server.config import Checkpoint, ServeConfig, open_checkpoint
from lowbit_server.preflight import refuse_unfit_machine

if TYPE_CHECKING:
    from tests.server.conftest import MakeCheckpoint


@pytest.fixture
def mixture(make_checkpoint: "MakeCheckpoint") -> Checkpoint:
    """A checkpoint whose manifest lists one 4-bit expert."""
    checkpoint = open_checkpoint(ServeConfig(make_checkpoint()))
    assert checkpoint.manifest is not None
    expert = checkpoint.manifest.modules[0].model_copy(
        update={"name": "model.layers.0.mlp.experts.3.down_proj"}
    )
    return replace(checkpoint, manifest=checkpoint.manifest.model_copy(update={"modules": [expert]}))


@pytest.fixture
def cpuinfo(tmp_path: Path) -> Path:
    return tmp_path / "cpuinfo"


def test_int4_experts_need_amx_or_zentorch(mixture: Checkpoint, cpuinfo: Path) -> None:
    cpuinfo.write_text("vendor_id : GenuineIntel\nflags : avx2 avx512f\n")
    with pytest.raises(
        CheckpointError, match="has 4-bit experts, and this CPU has neither AMX nor AMD's zentorch"
    ):
        refuse_unfit_machine(mixture, "cpu", cpuinfo)


def test_amx_and_gpus_run_int4_experts(mixture: Checkpoint, cpuinfo: Path) -> None:
    cpuinfo.write_text("vendor_id : GenuineIntel\nflags : avx512f amx_tile amx_int8\n")
    refuse_unfit_machine(mixture, "cpu", cpuinfo)
    cpuinfo.write_text("flags : avx2\n")
    refuse_unfit_machine(mixture, "gpu", cpuinfo)


def test_dense_model_runs_on_any_cpu(make_checkpoint: "MakeCheckpoint", cpuinfo: Path) -> None:
    cpuinfo.write_text("flags : avx2\n")
    refuse_unfit_machine(open_checkpoint(ServeConfig(make_checkpoint())), "cpu", cpuinfo)
