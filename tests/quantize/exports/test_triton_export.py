"""A model repository for Triton: the checkpoint lies in it whole, and vLLM is asked for what `lowbit serve` asks."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import write_tiny_model

from lowbit_core.cli import main
from lowbit_core.errors import CheckpointError, ConfigError
from lowbit_core.manifest import read_manifest
from lowbit_quantize.export.exporter import export
from lowbit_quantize.export.triton import Triton
from lowbit_quantize.pipeline import quantize
from lowbit_server.checkpoint import open_checkpoint
from lowbit_server.config import ServeConfig
from lowbit_server.engine.arguments import derive_engine_arguments

RULE: dict[str, Any] = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}
PLAIN = {"match": "*", "scheme": "none"}
CACHES: dict[str, dict[str, Any]] = {
    "plain cache": {"dtype": "none"},
    "FP8 cache": {"dtype": "fp8"},
    "FP8 cache of some layers": {"dtype": "fp8", "skip_layers": [0, 2]},
}


def checkpoint_of(place: Path, rule: dict[str, Any] = RULE, cache: str = "plain cache") -> Path:
    base = write_tiny_model(place / "base", "llama")
    sections = {"kv_cache": CACHES[cache], **({"passes": []} if rule == PLAIN else {})}
    quantize(str(base), recipe_with(rule, **sections), place / "checkpoint", CPU)
    return place / "checkpoint"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("rule", [RULE, {"match": "*", "scheme": "W8A8"}, PLAIN])
def test_vllm_is_asked_for_what_serve_asks_it_for(rule: dict[str, Any], cache: str, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path, rule, cache)
    export(checkpoint, Triton(model_name="tiny"), tmp_path / "out")
    asked = json.loads((tmp_path / "out" / "tiny" / "1" / "model.json").read_text())
    config = ServeConfig(checkpoint)
    serve = derive_engine_arguments(config, open_checkpoint(config), "gpu")
    names = ("dtype", "kv_cache_dtype", "kv_cache_dtype_skip_layers", "load_format")
    assert {name: asked.get(name) for name in names} == {name: serve.get(name) for name in names}
    assert ("kv_cache_dtype_skip_layers" in asked) == (cache == "FP8 cache of some layers")
    assert asked.get("quantization") == (
        None if (rule, cache) == (PLAIN, "plain cache") else "compressed-tensors"
    )
    assert set(asked) <= {*names, "model", "quantization"}


def test_the_checkpoint_lies_in_it_whole_and_its_own_manifest_vouches_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, out = checkpoint_of(tmp_path), tmp_path / "repository"
    capsys.readouterr()
    assert main(["export", str(checkpoint), "--to", "triton", "--out", str(out), "--model-name", "tiny"]) == 0
    said, manifest = json.loads(capsys.readouterr().out.splitlines()[-1]), read_manifest(checkpoint)
    assert manifest is not None
    assert (said["to"], said["left_out"], said["bytes"]) == ("triton", [], manifest.size.bytes)
    assert sorted(path.name for path in out.iterdir()) == ["tiny"]
    assert sorted(path.name for path in (out / "tiny").iterdir()) == ["1", "config.pbtxt"]
    place = out / "tiny" / "1" / "checkpoint"
    assert main(["inspect", str(place), "--verify"]) == 0
    for name in (*manifest.files, "lowbit.json"):
        assert (place / name).read_bytes() == (checkpoint / name).read_bytes()
        assert (place / name).samefile(checkpoint / name) == name.endswith(".safetensors")
    monkeypatch.chdir(out)  # where tritonserver is started
    assert Path(json.loads(Path("tiny/1/model.json").read_text())["model"]).samefile(place)


def test_the_path_is_that_of_the_mount_and_the_name_the_base_models(tmp_path: Path) -> None:
    checkpoint = checkpoint_of(tmp_path)
    export(checkpoint, Triton(mount="/models"), tmp_path / "out")
    asked = json.loads((tmp_path / "out" / "base" / "1" / "model.json").read_text())
    assert asked["model"] == "/models/base/1/checkpoint"
    assert 'backend: "vllm"' in (tmp_path / "out" / "base" / "config.pbtxt").read_text()


def test_what_triton_could_not_find_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    for wrong, says in (({"model_name": "a/b"}, "letters, digits"), ({"mount": "models"}, "absolute path")):
        with pytest.raises(ConfigError, match=says):
            Triton(**wrong)
    checkpoint = checkpoint_of(tmp_path)
    shard = next(checkpoint.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match="SHA-256"):
        export(checkpoint, Triton(), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "checkpoint"]
