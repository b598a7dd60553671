"""What a dry run says of a run's products is about what a run computes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from tests.quantize.small_runs import CPU, recipe_of
from torch.utils.flop_counter import FlopCounterMode

from lowbit_quantize.check.effort import GPU_SHARE, GPUS, Effort, effort, rate
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
