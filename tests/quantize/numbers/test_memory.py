"""What a run holds at most, where Hessians are the most of it; and how their work is done without a third one."""

import json
from pathlib import Path

import pytest
import torch
from tests.quantize.small_runs import SMALL_FLAGS, recipe_of
from tests.quantize.stoppable import run
from tests.tiny_models import write_tiny_model

from lowbit_quantize.check.memory import memory_bound_bytes, working_bytes
from lowbit_quantize.device.factors import cholesky_in_place, divided, ordered
from lowbit_quantize.device.memory import KEPT_BYTES
from lowbit_quantize.model.reference import find_model
from lowbit_quantize.plan import make_plan

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
