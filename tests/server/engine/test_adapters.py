"""Which LoRA adapters are served: named ones, and those of one directory and of no other."""

import json
from pathlib import Path

import pytest

from lowbit_core.errors import ConfigError
from lowbit_server.config import ServeConfig
from lowbit_server.engine.adapters import Adapters, open_adapters


def adapter(path: Path, weights: str = "adapter_model.safetensors", **changes: object) -> Path:
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 8} | changes))
    (path / weights).write_bytes(b"")
    return path


def test_a_directory_gives_its_adapters_by_name_and_nothing_else(tmp_path: Path) -> None:
    adapter(tmp_path / "in" / "poet")
    adapter(tmp_path / "in" / "pickle", weights="adapter_model.bin")
    adapter(tmp_path / "out")
    (tmp_path / "in" / "link").symlink_to(tmp_path / "out")
    found = Adapters(directory=tmp_path / "in")
    assert found.path_of("poet") == tmp_path / "in" / "poet"
    for name in (
        "../out",
        "..",
        ".",
        "",
        "link",
        "pickle",
        "none",
        "poet/",
        str(tmp_path / "out"),
        "a" * 500,
    ):
        assert found.path_of(name) is None


def test_named_adapters_are_checked_before_the_engine_starts(tmp_path: Path) -> None:
    config = ServeConfig(tmp_path, lora_modules=(("poet", adapter(tmp_path / "poet")),))
    assert open_adapters(config, ("base",)).path_of("poet") == tmp_path / "poet"


@pytest.mark.parametrize(
    ("name", "weights", "changes", "words"),
    [
        ("base", "adapter_model.safetensors", {}, "the name is taken"),
        ("a b", "adapter_model.safetensors", {}, "holds other than letters"),
        ("big", "adapter_model.safetensors", {"r": 64}, "rank 64; raise --max-lora-rank"),
        ("pickle", "adapter_model.bin", {}, "adapter_model.safetensors"),
        ("ia3", "adapter_model.safetensors", {"peft_type": "IA3"}, "needs peft_type LORA"),
        ("rankless", "adapter_model.safetensors", {"r": None}, "is not an adapter's"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused(
    tmp_path: Path, name: str, weights: str, changes: dict[str, object], words: str
) -> None:
    config = ServeConfig(tmp_path, lora_modules=((name, adapter(tmp_path / "x", weights, **changes)),))
    with pytest.raises(ConfigError, match=f"--lora-modules {name}.*{words}"):
        open_adapters(config, ("base",))


def test_a_missing_directory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--lora-dir .* is not a directory"):
        open_adapters(ServeConfig(tmp_path, lora_dir=tmp_path / "none"), ("base",))
