"""Several ranks make the very files of one, whatever a model is, and whichever of them dies on the way."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.quantize.runs.test_resume import command, contents
from tests.tiny_models import write_tiny_model

from lowbit_core.manifest import MANIFEST_NAME
from lowbit_core.server_process import free_port
from lowbit_quantize.device.ranks import _packed, _unpacked
from lowbit_quantize.run.directory import STATE
from lowbit_quantize.run.launch import HOME
from lowbit_quantize.statistics.hessian import SYMMETRIC_BLOCKS, _evenly

WIDE: Any = {
    "hidden_size": 1024,
    "intermediate_size": 1152,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
}
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
LOWBIT = Path(sys.executable).with_name("lowbit")
WITHIN_S = 300


def started(arguments: Sequence[str], log: Path, ranks: int) -> "subprocess.Popen[bytes]":
    """`lowbit quantize` as so many ranks of one thread each."""
    flags = [*arguments, "--ranks", str(ranks)]
    with log.open("wb") as output:
        return subprocess.Popen([str(LOWBIT), *flags], env=ONE_THREAD, stdout=output, stderr=output)


def made(arguments: Sequence[str], log: Path, ranks: int) -> None:
    assert started(arguments, log, ranks).wait(WITHIN_S) == 0, log.read_text()[-3000:]


@pytest.mark.parametrize(
    ("family", "sizes", "recipe", "ranks"),
    [
        ("llama", WIDE, "gptq-g64", 2),  # wide enough for a Hessian's blocks to be dealt
        ("llama", WIDE, "awq-g64", 3),
        ("llama", {}, "gptq-tuned-3bit", 2),
        ("gemma3_text", {}, "gptq-g64", 3),
        ("qwen3_moe", {}, "gptq-g64", 2),
        ("llama", WIDE, "sparse24-gptq-g64", 2),
        ("qwen3_moe", {}, "sparse24-gptq-g64", 3),
        ("deepseek_v2", {}, "awq-g64", 2),
        ("gemma3n_text", {}, "gptq-g64", 2),
    ],
)
def test_ranks_write_the_files_of_one(
    family: str, sizes: Any, recipe: str, ranks: int, tmp_path: Path
) -> None:
    model = write_tiny_model(tmp_path / "model", family, **sizes)
    outs = {count: tmp_path / f"of-{count}" for count in (1, ranks)}
    for count, out in outs.items():
        made(command(model, out, recipe=recipe), tmp_path / f"log-{count}", count)
    assert contents(outs[ranks]) == contents(outs[1])


def test_a_rank_that_is_killed_ends_the_run_with_one_line_and_any_number_goes_on(tmp_path: Path) -> None:
    model = write_tiny_model(tmp_path / "model", "qwen3_moe", num_hidden_layers=6)
    whole, out, log = tmp_path / "whole", tmp_path / "out", tmp_path / "log"
    made(command(model, whole), tmp_path / "log-1", 1)
    drawn = random.Random(5)
    for finished, (victim, ranks) in enumerate([(1, 2), (0, 2), (2, 3)]):
        process = started(command(model, out), log, ranks)
        while not (out / STATE / "walk" / f"layer-0000{finished}.json").exists():
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        time.sleep(drawn.uniform(0, 0.2))
        os.kill(_ranks_of(process.pid)[victim], signal.SIGKILL)
        assert process.wait(60) == 1
        lines = [line for line in log.read_text().splitlines() if line.startswith("lowbit: error")]
        assert len(lines) == 1
        assert f"rank {victim} ended by SIGKILL" in lines[0]
        assert not (out / MANIFEST_NAME).exists()
    made(command(model, out), log, 1)
    assert contents(out) == contents(whole)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--model": "nowhere"}, "nowhere"),
        ({"--recipe": "gptq-g65"}, "gptq-g65"),
        ({"--ranks": "0"}, "allowed is 1 or more"),
        ({"--set": "modules.0.group_size=100"}, "multiples of 32"),
        ({"--heldout": "missing.jsonl"}, "missing.jsonl"),
    ],
)
def test_what_is_refused_is_refused_once(change: dict[str, str], says: str, tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "model"), tmp_path / "out"
    flags = {"--model": str(model), "--recipe": "gptq-g64", "--out": str(out), "--ranks": "2"} | change
    done = subprocess.run(
        [str(LOWBIT), "quantize", *(part for pair in flags.items() for part in pair)],
        env=ONE_THREAD, capture_output=True, text=True, timeout=WITHIN_S, check=False,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if line.startswith("lowbit: error")]
    assert (done.returncode, len(lines)) == (2, 1), done.stderr
    assert says in lines[0]
    assert not out.exists()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGKILL])
def test_ending_the_command_ends_its_ranks(by: signal.Signals, tmp_path: Path) -> None:
    model, out = write_tiny_model(tmp_path / "model", num_hidden_layers=6), tmp_path / "out"
    process = started(command(model, out), tmp_path / "log", 2)
    while not (out / STATE / "walk" / "layer-00000.json").exists():
        assert process.poll() is None, (tmp_path / "log").read_text()
        time.sleep(0.01)
    ranks = _ranks_of(process.pid)
    assert len(ranks) == 2
    process.send_signal(by)
    assert process.wait(30) == (128 + by if by == signal.SIGTERM else -by)
    until = time.monotonic() + 30
    while any(_runs(one) for one in ranks.values()) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(_runs(one) for one in ranks.values())


def _runs(process: int) -> bool:
    """Whether there is such a process that has not ended; one that nobody waits for stays as a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ranks_of(parent: int) -> dict[int, int]:
    """Process ids of the ranks, by number."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if int((entry / "stat").read_text().rpartition(")")[2].split()[1]) == parent:
                variables = (entry / "environ").read_bytes().split(b"\0")
                number = next(one for one in variables if one.startswith(b"RANK="))
                found[int(number[5:])] = int(entry.name)
        except (OSError, StopIteration):
            continue
    return found


MEETS = """
import torch
from lowbit_quantize.device import ranks
with ranks.joined():
    for _ in range(3):
        ranks.exchange([torch.randn(200, 200) for _ in range(20)], 0, torch.device("cpu"))
"""


def test_ranks_that_have_ended_end_well() -> None:
    """Each of these processes would have ended by SIGABRT in one of five runs, were its threads left to the end."""
    ports = [{"MASTER_PORT": str(free_port())} for _ in range(5)]
    pairs = [(port, rank) for port in ports for rank in range(2)]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", MEETS],
            env=ONE_THREAD | HOME | port | {"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for port, rank in pairs
    ]
    assert [process.wait(WITHIN_S) for process in running] == [0] * len(running)


def test_what_is_exchanged_arrives_as_it_was() -> None:
    large = torch.randn(64, 64)
    sent: dict[str, Any] = {
        "a view": large[3:5, ::2],
        "whole": torch.randn(256, 256),
        "turned": large.T[:2],
        "types": [torch.arange(3).to(kind) for kind in (torch.int8, torch.bool, torch.float64)],
        "halves": (large[0].bfloat16(), large[0].half(), large[0].to(torch.float8_e4m3fn)),
        "nothing": torch.empty(0, 4),
        "a number": torch.tensor(2.5),
        "plain": (None, 1.5, "text", {"set"}),
    }
    head, *apart = _packed(sent)
    assert len(head) < 4096  # of the large tensor no more than what is shown
    assert [part.data_ptr() for part in apart] == [sent["whole"].data_ptr()]  # is not copied
    arrived = _unpacked([head, *(part.clone() for part in apart)], torch.device("cpu"))
    assert torch.equal(arrived["whole"], sent["whole"])
    assert torch.equal(arrived["a view"], sent["a view"])
    assert torch.equal(arrived["turned"], large.T[:2])
    for name in ("types", "halves"):
        for one, other in zip(arrived[name], sent[name], strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one.float(), other.float())
    assert arrived["nothing"].shape == (0, 4)
    assert float(arrived["a number"]) == 2.5
    assert arrived["plain"] == sent["plain"]


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7])
def test_the_blocks_of_a_hessian_are_dealt_about_evenly(count: int) -> None:
    for among in (1, 2, 3, 8):
        dealt = _evenly(range(count), among)
        assert sorted(dealt) == list(range(count))
        if count == SYMMETRIC_BLOCKS and among <= 3:
            shares = [sum(count - block for block in dealt[rank::among]) for rank in range(among)]
            assert max(shares) - min(shares) <= 1
