"""Distillation from end to end on tiny models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lowbit_core.cli import Parser
from lowbit_core.errors import InputError, OutputError
from lowbit_core.manifest import Manifest, read_manifest
from lowbit_evaluate.loaded_model import load_model
from lowbit_quantize.model.reference import find_model
from lowbit_recover.distill.distill import distill, prepare
from lowbit_recover.distill.settings import Settings, Train
from lowbit_recover.distill.tensor_patch import patch_tensors
from lowbit_recover.distill.trainee import build_trainee
from lowbit_recover.distill_cli import command

CPU = torch.device("cpu")
QUICK = Settings(
    "scales", tokens=32 * 64, row_tokens=64, batch=4, micro_batch=2, epochs=2, set_aside=4, evaluate_every=4, top_k=32,
    learning_rate=5e-3, precision="float32",
)  # fmt: skip


def tensors_of(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    return found


def distilled(checkpoint: Path, base: Path, out: Path, settings: Settings) -> Manifest:
    return distill(prepare(str(checkpoint), str(base), ["default"], settings), out, CPU)


@pytest.mark.parametrize(
    ("family", "scheme"),
    [("llama", "W4A16"), ("qwen2", "W4A16_ASYM"), ("qwen3_moe", "W4A16"), ("llama", "W3A16")],
)
def test_scales_and_norms_alone_become_others_and_the_checkpoint_comes_closer(
    tiny_model: Callable[[str], Path],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    scheme: str,
) -> None:
    source, out = checkpoint(family, scheme), tmp_path / "out"
    manifest = distilled(source, tiny_model(family), out, QUICK)
    before, after = tensors_of(source), tensors_of(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert before.keys() == after.keys()
    assert changed
    assert all(name.endswith("weight_scale") or "norm" in name for name in changed)
    step = manifest.steps[-1]
    assert step.kld_before is not None
    assert manifest.quality.mean_kld == step.mean_kld < step.kld_before
    sizes = [sum(path.stat().st_size for path in one.glob("*.safetensors")) for one in (source, out)]
    assert sizes[0] == sizes[1]
    assert 0 < (step.changed_bytes or 0) <= 2 * (step.trained_parameters or 0)


@pytest.mark.parametrize(("family", "prune"), [("llama", False), ("qwen3_moe", True)])
def test_all_weights_train_under_the_checkpoints_own_rounding_or_in_16_bits(
    tiny_model: Callable[[str], Path],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    family: str,
    prune: bool,
) -> None:
    source = checkpoint(family, prune=prune)
    settings = replace(QUICK, train="weights", learning_rate=2e-3, precision="bf16")
    manifest = distilled(source, tiny_model(family), tmp_path / "out", settings)
    step, after = manifest.steps[-1], tensors_of(tmp_path / "out")
    assert step.mean_kld < (step.kld_before or 0)
    assert [one.step for one in manifest.steps] == ["quantize", "distill"]
    before = tensors_of(source)
    assert before.keys() == after.keys()
    assert not torch.equal(before["model.embed_tokens.weight"], after["model.embed_tokens.weight"])
    assert read_manifest(tmp_path / "out") == manifest


@pytest.mark.parametrize(
    ("family", "scheme"), [("llama", "W4A16_ASYM"), ("qwen3_moe", "W4A16"), ("llama", "W5A16")]
)
def test_codes_that_move_are_those_that_readers_of_the_files_find(
    checkpoint: Callable[..., Path], tmp_path: Path, family: str, scheme: str
) -> None:
    source = checkpoint(family, scheme)
    trainee = build_trainee(find_model(str(source)), "weights", CPU, "float32", checkpointing=False)
    latents = {name: one for name, one in trainee.trained.items() if name.endswith(".latent")}
    learned = trainee.parameters()
    generator = torch.Generator().manual_seed(0)
    for name, one in latents.items():
        learned[name] = one.detach() + 0.2 * one.detach().std() * torch.randn(one.shape, generator=generator)
    trainee.take(learned)
    shutil.copytree(source, tmp_path / "copy")
    before = tensors_of(source)
    for path in (tmp_path / "copy").glob("*.safetensors"):
        patch_tensors(path, trainee.tensors())
    after = tensors_of(tmp_path / "copy")
    assert all(
        not torch.equal(before[name], after[name]) for name in before if name.endswith("weight_packed")
    )
    again = build_trainee(find_model(str(tmp_path / "copy")), "scales", CPU, "float32", checkpointing=False)
    ids = torch.randint(0, 512, (2, 16), generator=generator)
    with torch.no_grad():
        torch.testing.assert_close(again.hidden(ids), trainee.hidden(ids))


def test_untrained_it_is_the_checkpoint_that_plain_transformers_opens(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path]
) -> None:
    for family in ("llama", "qwen3_moe"):
        reference = find_model(str(checkpoint(family)))
        ids = torch.randint(0, 512, (2, 32), generator=torch.Generator().manual_seed(1))
        plain = load_model(reference, CPU, torch.float32).hidden(ids)
        trains: tuple[Train, ...] = ("scales", "weights")
        for train in trains:
            trainee = build_trainee(reference, train, CPU, "float32", checkpointing=True)
            with torch.no_grad():
                away = (trainee.hidden(ids) - plain).abs().amax(-1)  # (sequences, tokens)
            # The reader's weights are bfloat16 numbers: a token now and then is routed otherwise.
            assert float((away < 5e-2).float().mean()) > 0.9


def test_a_finished_training_is_reused_and_another_is_refused_and_a_second_one_adds_its_step(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, base, quick = checkpoint("llama"), tiny_model("llama"), replace(QUICK, epochs=1)
    first = distilled(source, base, tmp_path / "out", quick)
    assert distilled(source, base, tmp_path / "out", quick) == first
    with pytest.raises(OutputError, match=r"holds another checkpoint \(data, seed, set_aside_rows\)"):
        distilled(source, base, tmp_path / "out", replace(quick, seed=7))
    second = distilled(tmp_path / "out", base, tmp_path / "again", replace(quick, temperature=2.0, alpha=0.2))
    assert [one.step for one in second.steps] == ["quantize", "distill", "distill"]
    assert second.steps[:2] == first.steps


def run(arguments: list[str]) -> int:
    parser = Parser()
    command.add_arguments(parser)
    return command.run(parser.read(arguments))


def test_a_dry_run_forecasts_what_trains_and_the_optimizer_and_writes_nothing(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for train in ("scales", "weights"):
        source = checkpoint("llama")
        before = sorted(source.iterdir())
        given = [str(source), "--base", str(tiny_model("llama")), "--data", "default", "--train", train]
        assert run([*given, "--dry-run", "--tokens", "4096", "--row-tokens", "64", "--set-aside", "4"]) == 0
        report = json.loads(capsys.readouterr().out)
        trainee = build_trainee(find_model(str(source)), train, CPU, "bf16", checkpointing=True)
        count = sum(one.numel() for one in trainee.trained.values())
        assert report["trained_parameters"] == count
        assert report["memory_bytes"]["optimizer"] == 8 * count
        assert report["disk_bytes"]["teacher"] == 64 * 63 * (64 * 8 + 4)
        assert report["steps"] == 8
        assert sorted(source.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dry-run"], "give --out DIR for a checkpoint, or --dry-run"),
        (["--batch", "6", "--micro-batch", "4"], "--batch 6 is no multiple of --micro-batch 4"),
        (["--temperature", "0"], "--temperature 0: allowed is above 0"),
        (["--alpha", "1.5"], r"--alpha 1.5: allowed is 0 \(the base alone\) to 1"),
        (["--learning-rate", "nan"], "--learning-rate nan: allowed is above 0"),
        (["--tokens", "0"], "--tokens 0: allowed is 1 or more"),
        (["--data", "/nowhere.jsonl"], "'/nowhere.jsonl' is not an existing file or folder"),
    ],
)
def test_wrong_flags_are_refused_in_a_line_and_nothing_is_written(
    tiny_model: Callable[[str], Path],
    checkpoint: Callable[..., Path],
    tmp_path: Path,
    flags: list[str],
    message: str,
) -> None:
    given = [str(checkpoint("llama")), "--base", str(tiny_model("llama")), "--data", "default"]
    with pytest.raises(InputError, match=message) as refused:
        run([*given, "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_trained_is_refused_in_a_line(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path]
) -> None:
    base = str(tiny_model("llama"))
    for directory, settings, message in (
        (
            checkpoint("llama", "FP8_DYNAMIC", "channel"),
            QUICK,
            "is stored as float-quantized, which is not trained",
        ),
        (tiny_model("llama"), QUICK, r"has no lowbit.json; give a checkpoint that `lowbit quantize` wrote"),
        (
            checkpoint("qwen3_moe", prune=True),
            QUICK,
            "is not quantized, it has no scales to train",
        ),
    ):
        with pytest.raises(InputError, match=message) as refused:
            prepare(str(directory), base, ["default"], settings)
        assert "\n" not in str(refused.value)
