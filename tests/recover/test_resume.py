"""Trainings that end early: killed, out of disk, or with numbers that are none."""

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit_core.errors import NumericsError, OutputError
from lowbit_core.manifest import MANIFEST_NAME, read_manifest
from lowbit_quantize.model.reference import find_model
from lowbit_recover.distill.distill import distill, prepare
from lowbit_recover.distill.settings import Settings
from lowbit_recover.distill.state import BEST, LAST, training_in
from lowbit_recover.distill.trainee import build_trainee
from lowbit_recover.distill.trainer import Trainer, batch_of

CPU = torch.device("cpu")
SETTINGS = Settings(
    "scales", tokens=32 * 64, row_tokens=64, batch=4, micro_batch=2, epochs=3, set_aside=4, evaluate_every=2, top_k=16,
    learning_rate=3e-3, precision="float32",
)  # fmt: skip
PROGRAM = (
    "import sys; from lowbit_core.cli import Parser; from lowbit_recover.distill_cli import command\n"
    + ("parser = Parser(); command.add_arguments(parser); sys.exit(command.run(parser.read(sys.argv[1:])))")
)


def flags(checkpoint: Path, base: Path, out: Path) -> list[str]:
    given = {
        "--base": base, "--data": "default", "--out": out, "--tokens": SETTINGS.tokens, "--row-tokens": 64,
        "--batch": 4, "--micro-batch": 2, "--epochs": 3, "--set-aside": 4, "--evaluate-every": 2, "--top-k": 16,
        "--learning-rate": 3e-3, "--precision": "float32",
    }  # fmt: skip
    return [str(checkpoint), *(str(part) for pair in given.items() for part in pair)]


@contextmanager
def files_of_at_most(count: int) -> Iterator[None]:
    """As on a full disk: whatever would make a file larger than `count` bytes ends in an error of the system."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_training_that_is_killed_goes_on_to_the_same_curve_and_the_same_bytes(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, base = checkpoint("llama"), tiny_model("llama")
    threads = {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "MKL_NUM_THREADS": str(torch.get_num_threads()),
    }
    killed = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *flags(source, base, tmp_path / "killed")],
        env={**os.environ, **threads},
        stderr=(tmp_path / "stderr").open("w"),
    )
    last = tmp_path / "killed" / ".run" / LAST
    deadline = time.monotonic() + 120
    seen: set[float] = set()
    while len(seen) < 3 and killed.poll() is None and time.monotonic() < deadline:  # saved three times
        if last.is_file():
            seen.add(last.stat().st_mtime)
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL, (tmp_path / "stderr").read_text()[-2000:]
    assert not (tmp_path / "killed" / MANIFEST_NAME).exists()
    step = torch.load(last, weights_only=True)["progress"]["step"]
    assert 0 < step < 24
    made = [
        distill(prepare(str(source), str(base), ["default"], SETTINGS), tmp_path / name, CPU)
        for name in ("killed", "whole")
    ]
    assert made[0].steps[-1].curve == made[1].steps[-1].curve
    assert len(made[0].steps[-1].curve) == 13
    assert made[0].steps[-1].cpu_seconds > made[0].run.cpu_seconds  # what the killed process did counts
    assert made[1].steps[-1].cpu_seconds == made[1].run.cpu_seconds
    weights = [
        {name: one.sha256 for name, one in found.files.items() if name.endswith(".safetensors")}
        for found in made
    ]
    assert weights[0] == weights[1]
    assert not (tmp_path / "killed" / ".run").exists()


ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
LOWBIT = Path(sys.executable).with_name("lowbit")


def started(given: list[str], ranks: int, log: Path) -> "subprocess.Popen[bytes]":
    with log.open("wb") as output:
        return subprocess.Popen(
            [str(LOWBIT), "distill", *given, "--ranks", str(ranks)],
            env=ONE_THREAD,
            stdout=output,
            stderr=output,
        )


@pytest.mark.parametrize("train", ["scales", "weights"])
def test_ranks_train_what_one_trains_and_any_number_goes_on_where_one_was_killed(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path, train: str
) -> None:
    """To the last bit: three ranks of five parts, so that the last round is not full."""
    source, base = checkpoint("llama"), tiny_model("llama")
    extra = ["--train", train, "--batch", "5", "--micro-batch", "1"]
    outs = {ranks: tmp_path / f"of-{ranks}" for ranks in (1, 3)}
    given = {ranks: [*flags(source, base, out), *extra] for ranks, out in outs.items()}
    assert started(given[1], 1, tmp_path / "log-1").wait(300) == 0, (tmp_path / "log-1").read_text()[-2000:]
    last, log = outs[3] / ".run" / LAST, tmp_path / "log-3"
    process = started(given[3], 3, log)
    while not last.is_file():
        assert process.poll() is None, log.read_text()[-2000:]
        time.sleep(0.005)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert process.wait(60) == 1
    errors = [line for line in log.read_text().splitlines() if line.startswith("lowbit: error")]
    assert len(errors) == 1
    assert "run the same command again" in errors[0]
    assert not (outs[3] / MANIFEST_NAME).exists()
    assert started(given[3], 3, log).wait(300) == 0, log.read_text()[-2000:]
    found = {ranks: read_manifest(out) for ranks, out in outs.items()}
    for one in found.values():
        assert one is not None
    steps = {ranks: one.steps[-1] for ranks, one in found.items() if one is not None and one.steps}
    assert steps[1].curve == steps[3].curve
    for path in sorted(outs[1].glob("*.safetensors")):
        assert path.read_bytes() == (outs[3] / path.name).read_bytes()


def test_a_training_told_otherwise_does_not_go_on_in_the_same_directory(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source, base = str(checkpoint("llama")), str(tiny_model("llama"))
    task = prepare(source, base, ["default"], SETTINGS)
    with pytest.raises(RuntimeError), training_in(tmp_path / "out", task.identity, overwrite=False):
        raise RuntimeError("stands for whatever ends a process")
    other = prepare(source, base, ["default"], replace(SETTINGS, learning_rate=1e-3))
    with pytest.raises(OutputError, match=r"unfinished training that was told otherwise \(learning_rate\)"):
        distill(other, tmp_path / "out", CPU)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match="holds something else"):
        distill(task, tmp_path / "mine", CPU)
    assert [one.name for one in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("size", [1000, 100_000, 160_000])
def test_a_full_disk_ends_in_a_line_and_the_training_goes_on_when_there_is_room(
    tiny_model: Callable[[str], Path], checkpoint: Callable[..., Path], tmp_path: Path, size: int
) -> None:
    settings = replace(SETTINGS, epochs=1)
    task = prepare(str(checkpoint("llama")), str(tiny_model("llama")), ["default"], settings)
    with (
        pytest.raises(OutputError, match="remove the cause and run the same command again") as refused,
        files_of_at_most(size),
    ):
        distill(task, tmp_path / "out", CPU)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    assert distill(task, tmp_path / "out", CPU) == read_manifest(tmp_path / "out")


def test_a_loss_and_a_judge_that_are_no_numbers_end_in_a_line_and_the_last_good_state_stays(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    trainee = build_trainee(
        find_model(str(checkpoint("llama"))), "scales", CPU, "float32", checkpointing=False
    )
    settings = replace(SETTINGS, alpha=1.0)
    rows = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(0))
    with (
        pytest.raises(
            NumericsError, match="the KL of the set-aside rows is nan after step 0; lower --learning-rate"
        ),
        training_in(tmp_path / "judge", {}, overwrite=False) as directory,
    ):
        Trainer(trainee, settings, rows, None, lambda: float("nan"), directory).run()

    def judge() -> float:  # after the first judgement training goes wrong
        trainee.take({name: torch.full_like(one, torch.nan) for name, one in trainee.trained.items()})
        return 1.0

    with (
        pytest.raises(NumericsError, match="the loss of step 1 is nan; lower --learning-rate"),
        training_in(tmp_path / "loss", {}, overwrite=False) as directory,
    ):
        Trainer(trainee, settings, rows, None, judge, directory).run()
    saved = torch.load(tmp_path / "loss" / ".run" / BEST, weights_only=True)["parameters"]
    assert all(
        bool(torch.isnan(one).all()) for one in saved.values()
    )  # saved as the judge left it, before the step


def test_training_ends_when_nothing_is_gained_and_the_best_parameters_are_kept(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    trainee = build_trainee(
        find_model(str(checkpoint("llama"))), "scales", CPU, "float32", checkpointing=True
    )
    rows = torch.randint(0, 512, (64, 64), generator=torch.Generator().manual_seed(0))
    told, seen = iter([5.0, 4.0, 4.5, 4.6, 4.7, 4.8, 1.0]), []

    def judge() -> float:
        seen.append(trainee.parameters())
        return next(told)

    settings = replace(SETTINGS, alpha=1.0, patience=3)
    with training_in(tmp_path / "out", {}, overwrite=False) as directory:
        progress = Trainer(trainee, settings, rows, None, judge, directory).run()
    assert (progress.best_step, progress.best, len(progress.curve)) == (2, 4.0, 5)
    kept = trainee.parameters()
    assert all(torch.equal(kept[name], one) for name, one in seen[1].items())
    assert not all(torch.equal(kept[name], one) for name, one in seen[-1].items())


def test_an_optimizer_on_disk_gives_the_same_numbers_and_goes_on_with_them(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    rows = torch.randint(0, 512, (16, 64), generator=torch.Generator().manual_seed(0))
    settings = replace(SETTINGS, alpha=1.0, epochs=1, learning_rate=1e-2)
    learned = []
    for name, on_disk in (("memory", False), ("disk", True)):
        trainee = build_trainee(
            find_model(str(checkpoint("llama"))), "scales", CPU, "float32", checkpointing=False
        )
        with training_in(tmp_path / name, {}, overwrite=False) as directory:
            moments = directory.moments(0) if on_disk else None
            for told in (
                iter([5.0]),
                iter([4.0, 3.0]),
            ):  # the first ends in its second judgement, as if killed
                trainer = Trainer(trainee, settings, rows, None, told.__next__, directory, moments=moments)
                with suppress(StopIteration):
                    trainer.run()
            sizes = {path.stat().st_size for path in directory.moments(0).glob("*")}
        assert trainer.progress.curve[-1][:2] == (4, 3.0)
        learned.append(trainee.parameters())
        assert sizes == ({4 * sum(one.numel() for one in trainee.trained.values())} if on_disk else set())
    assert all(torch.equal(one, learned[1][name]) for name, one in learned[0].items())


def test_each_epoch_takes_every_row_once_in_an_order_of_its_own() -> None:
    settings = replace(SETTINGS, batch=4)
    epochs = [
        torch.cat([batch_of(step, 12, settings) for step in range(3 * epoch, 3 * epoch + 3)]).tolist()
        for epoch in range(3)
    ]
    assert all(sorted(one) == list(range(12)) for one in epochs)
    assert len({tuple(one) for one in epochs}) == 3
