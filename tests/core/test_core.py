"""The command line, the error tree, and the manifest."""

import json
from collections.abc import Iterator
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from lowbit_core import errors
from lowbit_core.cli import main
from lowbit_core.errors import CheckpointError, LowbitError
from lowbit_core.inspection import describe
from lowbit_core.manifest import (
    MANIFEST_NAME,
    PROGRESS_NAME,
    FileRecord,
    Manifest,
    read_manifest,
    write_manifest,
)
from lowbit_core.manifest_files import record_files, verify_files
from lowbit_core.model_shape import shape_from_config


def example(files: dict[str, object]) -> Manifest:
    text = {
        "dataset": "default",
        "num_samples": 2,
        "max_seq_length": 4,
        "tokens": 8,
        "seed": 0,
        "sha256": "ab",
    }
    base = {"name": "m", "kind": "directory", "revision": None, "model_type": "llama", "dtype": "bfloat16"}
    quality = {
        "heldout": text, "predictions": 6, "mean_kld": 0.1, "kld_stderr": 0.01, "kld_p99": 1.0, "kld_max": 2.0,
        "top1_agreement": 0.9, "top1_stderr": 0.01, "perplexity_base": 9.0, "perplexity": 10.0,
        "perplexity_ratio": 1.1, "kv_cache_included": True,
        "domains": {
            "code": {"sequences": 2, "mean_kld": 0.1, "top1_agreement": 0.9, "perplexity_base": 9, "perplexity": 10}
        },
    }  # fmt: skip
    return Manifest.model_validate(
        {
            "created": "2026-01-01T00:00:00+00:00",
            "base": {**base, "sha256": {"model.safetensors": "cd"}},
            "recipe": {},
            "size": {
                "parameters": 10, "base_bytes": 20, "bytes": 8, "quantized_parameters": 8,
                "linear_bits_per_weight": 4.25,
            },
            "modules": [
                {
                    "name": name, "scheme": scheme, "bits": bits, "group_size": size, "symmetric": True,
                    "methods": methods, "error": 0.01, "alpha": 0.2,
                }
                for name, scheme, bits, size, methods in (
                    ("q_proj", "W4A16", 4, 64, ["awq", "gptq"]), ("up_proj", "W8A16", 8, None, ["rtn"]),
                )
            ],
            "unquantized": ["o_proj"],
            "kv_cache": None,
            "calibration": text,
            "quality": quality,
            "gate": {"limits": {}, "accepted": True, "reasons": []},
            "files": files,
            "versions": {},
            "run": {"device": "cpu", "seconds": 1, "cpu_seconds": 1, "peak_rss_bytes": 1},
        }
    )  # fmt: skip


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "config.json").write_text("{}")
    write_manifest(tmp_path, example({k: v.model_dump() for k, v in record_files(tmp_path).items()}))
    return tmp_path


def test_a_manifest_reads_back_as_it_was_written_and_verifies(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    assert set(manifest.files) == {"model.safetensors", "config.json"}
    verify_files(checkpoint, manifest, hashes=True)
    assert not list(checkpoint.glob("*.tmp"))


def damage_missing(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def damage_size(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"weight")


def damage_content(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes(b"wEights")


def test_a_file_that_cannot_be_read_is_refused_by_name(checkpoint: Path) -> None:
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors").symlink_to("/proc/self/mem")  # not even root reads its first byte
    unreadable = {"model.safetensors": FileRecord(sha256="0" * 64, bytes=0)}
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: .*; let the user"):
        verify_files(checkpoint, manifest.model_copy(update={"files": unreadable}), hashes=True)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "config.json is missing"),
        (damage_size, "has 6 bytes"),
        (damage_content, "does not match its SHA-256"),
    ],
)
def test_every_change_to_a_file_is_found(checkpoint: Path, damage, message: str) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001
    manifest = read_manifest(checkpoint)
    assert manifest is not None
    damage(checkpoint)
    with pytest.raises(CheckpointError, match=message):
        verify_files(checkpoint, manifest, hashes=True)


def test_no_manifest_is_unknown_but_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None
    (tmp_path / PROGRESS_NAME).write_text("{}")
    with pytest.raises(CheckpointError, match="unfinished run"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", ["{", '{"format_version": 2}', "[]", "\udcff"])
def test_an_unreadable_manifest_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / MANIFEST_NAME).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match="is not a version 2 manifest") as caught:
        read_manifest(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("version", "advice"), [(1, "quantize the model again"), (3, "install a newer Lowbit")]
)
def test_a_manifest_of_another_version_is_refused_with_what_to_do(
    tmp_path: Path, version: int, advice: str
) -> None:
    data = {**example({}).model_dump(mode="json"), "format_version": version}
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
    with pytest.raises(CheckpointError, match=f"version {version} manifest.*{advice}"):
        read_manifest(tmp_path)


def test_fields_that_a_newer_lowbit_adds_are_passed_over(tmp_path: Path) -> None:
    data = {**example({}).model_dump(mode="json"), "carbon": {"grams": 3}}
    data["quality"]["tail"] = 0.5
    data["modules"][0]["rotation"] = "hadamard"
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(data))
    assert read_manifest(tmp_path) == example({})


def test_inspect_prints_the_facts_and_its_json_is_the_manifest(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(checkpoint), "--verify"]) == 0
    shown = capsys.readouterr().out
    for fact in (
        "llama",
        "W4A16 in groups of 64 by awq, then gptq",
        "1 linears: o_proj",
        "4.25 in quant",
        "0.1000 ± 0.0100",
        "every hash verified",
        "code",
    ):
        assert fact in shown
    assert main(["inspect", str(checkpoint), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((checkpoint / MANIFEST_NAME).read_text())


def test_inspect_shows_each_figure_with_its_error_and_what_is_measured_by_itself(tmp_path: Path) -> None:
    alone = {
        "sequences": 4, "predictions": 12, "mean_kld": 0.00072, "kld_stderr": 0.00004, "kld_p99": 0.01,
        "kld_p99_stderr": 0.001, "kld_max": 0.02, "kld_max_stderr": 0.002, "top1_agreement": 0.99,
        "top1_stderr": 0.001, "perplexity_ratio": 1.0, "perplexity_ratio_stderr": 0.0002,
    }  # fmt: skip
    manifest, page = example({}), StringIO()
    console = Console(width=140, file=page)
    errors = {"kld_p99_stderr": 0.25, "kld_max_stderr": 0.5, "perplexity_ratio_stderr": 0.03}
    quality = {**manifest.quality.model_dump(), **errors, "noise_floor": alone}
    measured = Manifest.model_validate({**manifest.model_dump(), "quality": quality})
    write_manifest(tmp_path, measured)
    assert read_manifest(tmp_path) == measured
    console.print(describe(measured, verified=False))
    shown = page.getvalue()
    for fact in ("1.000 ± 0.250", "2.000 ± 0.500", "ratio 1.1000 ± 0.0300", "mean KL 0.00072 ± 0.00004"):
        assert fact in shown
    assert "not measured" in shown  # the FP8 cache alone


def test_inspect_refuses_what_is_no_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path)]) == 2
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def test_an_unknown_command_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantise"]) == 2
    commands = (
        "allocate, compare, compose, distill, evaluate, export, frontier, inspect, key, loadtest, lora, plan, "
        "quantize, sensitivity, "
    )
    assert f"commands are: {commands}serve, usage" in capsys.readouterr().err


def subclasses(error: type[LowbitError]) -> Iterator[type[LowbitError]]:
    yield error
    for child in error.__subclasses__():
        yield from subclasses(child)


def test_every_error_is_drawn_in_the_tree_of_the_module() -> None:
    drawn = errors.__doc__ or ""
    known = [error for error in subclasses(LowbitError) if error.__module__ == errors.__name__]
    assert len(known) >= 9
    assert all(error.__name__ in drawn for error in known)
    assert {error.exit_status for error in known} == {1, 2, 3}


@pytest.mark.parametrize(
    ("kinds", "caching"),
    [
        (None, 4),
        (["linear_attention", "linear_attention", "linear_attention", "full_attention"], 1),
        (["sliding_attention", "full_attention", "sliding_attention", "chunked_attention"], 4),
        (["conv", "full_attention", "conv", "full_attention"], 2),
        (["mamba", "attention", "mlp", "moe"], 1),
        (["mamba", "hybrid", "mamba", "hybrid"], 2),
        (["mamba", "hybrid"], 4),  # of another number of layers: not believed
    ],
)
def test_layers_without_attention_cache_no_token(kinds: list[str] | None, caching: int) -> None:
    config = {"num_hidden_layers": 4, "num_attention_heads": 4, "hidden_size": 64, "num_key_value_heads": 2}
    for key in ("layer_types", "layers_block_type"):
        shape = shape_from_config(config | ({key: kinds} if kinds else {}))
        assert shape.kv_bytes_per_token("fp8") == caching * 2 * 2 * 16
