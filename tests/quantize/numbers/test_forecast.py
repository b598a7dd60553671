"""What a dry run says of a run's products and memory is about what a run computes and holds."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.quantize.small_runs import CPU, SMALL_FLAGS, recipe_of
from tests.quantize.stoppable import run
from tests.tiny_models import write_tiny_model
from torch.utils.flop_counter import FlopCounterMode

from lowbit_quantize.check.effort import GPU_SHARE, GPUS, Effort, effort, rate
from lowbit_quantize.check.memory import memory_bound_bytes, working_bytes
from lowbit_quantize.device.factors import cholesky_in_place, divided, ordered
from lowbit_quantize.device.memory import KEPT_BYTES
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.plan import make_plan
from lowbit_quantize.quality.dataset import load_texts


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads of a pool do not see who counts."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v2"])
@pytest.mark.parametrize("recipe", ["gptq-g64", "rtn-g64", "w8a8"])
def test_products_are_counted(
    family: str, recipe: str, tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    model, asked = tiny_model(family), recipe_of(recipe)
    with one_thread(), FlopCounterMode(display=False) as counted:
        quantize(str(model), asked, tmp_path / "out", CPU)
    reference = find_model(str(model))
    plan = make_plan(reference, asked)
    texts = load_texts(asked.calibration, asked.quality, reference.tokenizer(), plan.config.vocab_size)
    found = effort(plan, *texts)
    assert 0.5 < (found.forward + found.exact) / counted.get_total_flops() < 2


def test_time_is_that_of_both_kinds_of_products() -> None:
    found = Effort(forward=6e9, exact=1e9)
    assert found.seconds(3e9, 0.5e9) == 4.0
    forward, exact = GPUS["H100"]
    assert found.seconds_on("H100") == pytest.approx(6e9 / (GPU_SHARE * forward) + 1e9 / (GPU_SHARE * exact))
    assert 1e9 < rate(torch.float32) < 1e14


NARROW, WIDE = 256, 7168


@pytest.mark.parametrize("recipe", ["gptq-g64", "awq-g64"])
def test_hessians_of_a_wide_network_are_held_no_more_often_than_forecast(recipe: str, tmp_path: Path) -> None:
    peaks, works = [], []
    for width in (NARROW, WIDE):
        model = write_tiny_model(tmp_path / f"model-{width}", intermediate_size=width, num_hidden_layers=1)
        log = tmp_path / f"log-{width}"
        out = tmp_path / f"out-{width}"
        command = ["quantize", "--model", str(model), "--recipe", recipe, "--out", str(out), *SMALL_FLAGS]
        status, said = run(command, log)
        assert status == 0, said
        peaks.append(json.loads(said.splitlines()[-1])["peak_rss_bytes"])
        plan = make_plan(find_model(str(model)), recipe_of(recipe))
        works.append(working_bytes(plan))
        assert peaks[-1] < memory_bound_bytes(plan, streams=0)
    more, square = peaks[1] - peaks[0], 4 * WIDE**2
    held = round((works[1] - works[0]) / square)
    assert held == (2 if recipe == "gptq-g64" else 3)
    assert 1.5 * square < more < (held + 1) * square + KEPT_BYTES  # what was freed may not be given back yet


def test_a_matrix_is_factored_where_it_lies() -> None:
    rows = torch.randn(2, 40, 24)
    matrix = rows.mT @ rows + torch.eye(24)
    expected = torch.linalg.cholesky(matrix)
    place = matrix.data_ptr()
    lower, failed = cholesky_in_place(matrix)
    assert lower.data_ptr() == place
    assert not failed.any()
    assert torch.equal(lower, expected)
    assert cholesky_in_place(-torch.eye(3))[1]


def test_orders_and_divisors_of_many_rows_are_those_of_one_expression() -> None:
    matrix, order, scale = torch.randn(2500, 2500), torch.randperm(2500), torch.rand(2500) + 0.5
    found = ordered(matrix.unsqueeze(0), order.unsqueeze(0))
    assert torch.equal(found[0], matrix[order.unsqueeze(1), order])
    assert torch.equal(divided(matrix, scale), matrix / torch.outer(scale, scale))
