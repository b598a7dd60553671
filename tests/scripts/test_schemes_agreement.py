"""benchmarks/schemes/agreement.py sees a token that a reader would not choose, and a scale that is not in force."""

from pathlib import Path

import pytest
import torch
from benchmarks.schemes.agreement import (
    TIE,
    agrees,
    compared,
    log_probabilities,
    mean_loss,
    plain,
    readers_of,
    rounded,
    scales_in_force,
)
from tests.quantize.small_runs import CPU, recipe_with
from tests.tiny_models import CONTEXT, SENTENCES, write_tiny_model
from torch import Tensor

from lowbit_core.errors import EngineError
from lowbit_quantize.pipeline import quantize
from lowbit_server.engine.input_scales import read_input_scales
from lowbit_server.engine.kv_scales import read_checkpoint_scales

PROMPTS, ANSWERS = SENTENCES[:, :CONTEXT].tolist(), SENTENCES[:, CONTEXT:].tolist()


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("taught") / "base", sentences=SENTENCES)


def test_both_readers_say_what_was_taught_and_nothing_else(taught: Path, tmp_path: Path) -> None:
    rule = {"match": "*", "scheme": "W8A8", "methods": ["rtn"]}
    quantize(str(taught), recipe_with(rule, kv_cache={"dtype": "fp8"}), tmp_path / "out", CPU)
    others = [[token + 1 for token in answer] for answer in ANSWERS]
    assert set(readers_of(tmp_path / "out").values()) == {plain, rounded}
    for reader in (plain, rounded):
        logits = reader(tmp_path / "out")
        right, wrong = (compared(logits, PROMPTS, texts) for texts in (ANSWERS, others))
        assert right["same"] == right["tokens"] == sum(map(len, ANSWERS))
        assert (right["largest_gap"], right["whole_texts_same"]) == (0.0, len(ANSWERS))
        assert wrong["largest_gap"] > TIE
        assert wrong["whole_texts_same"] == 0
    stored = read_checkpoint_scales(tmp_path / "out")
    running = [
        {"layer": one.layer, "k_scale": one.k_scale, "v_scale": one.v_scale} for one in stored.values()
    ]
    engine = {"kv_scales": running, "input_scales": []}
    assert scales_in_force(tmp_path / "out", engine) == {"stored": 6, "in_force": 6}
    unit = {"kv_scales": [one | {"k_scale": 1.0} for one in running[:1]] + running[1:], "input_scales": []}
    assert scales_in_force(tmp_path / "out", unit) == {"stored": 6, "in_force": 4}


def test_static_scales_of_inputs_count_as_well(taught: Path, tmp_path: Path) -> None:
    quantize(str(taught), recipe_with({"match": "*.down_proj", "scheme": "FP8"}), tmp_path / "out", CPU)
    layers = [{"linears": [name], "scale": one} for name, one in read_input_scales(tmp_path / "out").items()]
    engine = {"kv_scales": [], "input_scales": layers}
    assert scales_in_force(tmp_path / "out", engine) == {"stored": 3, "in_force": 3}
    layers[0]["scale"] = 1.0
    with pytest.raises(EngineError, match="divides inputs by 1"):
        scales_in_force(tmp_path / "out", engine)


def test_a_near_tie_agrees_and_a_clear_choice_does_not() -> None:
    def logits(ids: Tensor) -> Tensor:
        return torch.tensor([0.0, 0.9, 2.5]).expand(ids.shape[1], 3)

    near, far = (compared(logits, [[0, 0]], [answer]) for answer in ([2, 2, 1], [2, 0, 1]))
    assert near == {"tokens": 3, "same": 2, "largest_gap": 1.6, "texts": 1, "whole_texts_same": 0}
    scales = {"stored": 2, "in_force": 2}
    tied = near | {"largest_gap": 0.9}
    assert agrees({"scales": scales, "readers": {"one": tied}})
    assert not agrees({"scales": scales, "readers": {"one": tied, "two": far}})
    assert not agrees({"scales": scales | {"in_force": 1}, "readers": {"one": tied}})


def test_the_loss_is_that_of_each_token_by_the_one_before_it() -> None:
    table = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.25, 0.25], [0.3, 0.3, 0.4]]).log()

    def logits(ids: Tensor) -> Tensor:
        return table[ids[0]] + 3.0

    texts = [log_probabilities(logits, [0, 2, 2]), log_probabilities(logits, [1, 0])]
    expected = -torch.tensor([0.7, 0.4, 0.5]).log().mean()
    assert mean_loss(texts) == pytest.approx(float(expected), abs=1e-5)
