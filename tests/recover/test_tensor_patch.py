"""Files that are patched in place."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit_core.errors import NumericsError
from lowbit_recover.distill.tensor_patch import patch_tensors


def written(path: Path) -> Path:
    tensors = {
        "a": torch.arange(6, dtype=torch.int32).view(2, 3),
        "b": torch.tensor([1.0, 2.0], dtype=torch.bfloat16),
        "c": torch.tensor(3.5),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def test_only_the_bytes_of_the_tensor_that_changes_become_others(tmp_path: Path) -> None:
    file = written(tmp_path / "model.safetensors")
    before = file.read_bytes()
    changed = patch_tensors(
        file, {"b": torch.tensor([1.0, 2.5], dtype=torch.bfloat16), "elsewhere": torch.ones(3)}
    )
    after = file.read_bytes()
    assert changed == 1  # 2.0 and 2.5 in bfloat16 differ in one of their bytes
    assert sum(one != other for one, other in zip(before, after, strict=True)) == changed
    assert load_file(file)["b"].tolist() == [1.0, 2.5]


def test_another_shape_or_type_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    file = written(tmp_path / "model.safetensors")
    before = file.read_bytes()
    for tensor in (torch.zeros(3, 2, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64)):
        with pytest.raises(ValueError, match="another"):
            patch_tensors(file, {"a": tensor})
    assert file.read_bytes() == before


def test_what_is_not_finite_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path / "model.safetensors")
    with pytest.raises(NumericsError, match="the tensor c is not finite"):
        patch_tensors(file, {"c": torch.tensor(float("nan"))})
