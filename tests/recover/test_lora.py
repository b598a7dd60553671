"""LoRA on a quantized checkpoint: which tokens count, what is written, what a kill costs, and what is refused."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.quantize.small_runs import CPU, recipe_with
from tests.recover.lora_runs import SMALL, kill_when, lora, rows, start, write_rows
from tests.tiny_models import write_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from lowbit_core.errors import ConfigError, NumericsError, OutputError, RecipeError
from lowbit_quantize.model.logits import LogitsForm
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.quality.document import Document
from lowbit_recover.lora_examples import IGNORED, Example, batch_of, example_of
from lowbit_recover.lora_objectives import AnswerLoss, Divergence, Predictor
from lowbit_recover.lora_state import STATE

peft = pytest.importorskip("peft")

W4 = {"match": "*", "scheme": "W4A16", "group_size": 64, "methods": ["rtn"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture(scope="module")
def checkpoint(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checkpoint") / "w4"
    quantize(str(base), recipe_with(W4), out, CPU)
    return out


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows(40))


def record_of(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "lora.json").read_text())
    return found


def test_the_assistants_answers_count_and_nothing_else(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    said = [
        ("system", "be short"),
        ("user", "one?"),
        ("assistant", "two."),
        ("user", "more?"),
        ("assistant", "3"),
    ]
    messages = tuple({"role": role, "content": content} for role, content in said)
    found = example_of(Document("text", messages=messages), tokenizer)
    kept = tokenizer.decode([one for one, counts in zip(found.ids, found.counts, strict=True) if counts])
    others = tokenizer.decode(
        [one for one, counts in zip(found.ids, found.counts, strict=True) if not counts]
    )
    assert kept == "two.<|end|>3<|end|>"
    assert (
        others == "<|system|>be short<|end|><|user|>one?<|end|><|assistant|><|user|>more?<|end|><|assistant|>"
    )


def test_of_plain_text_every_token_counts(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    found = example_of(Document("text", text="once upon a time"), tokenizer)
    assert all(found.counts)
    assert tokenizer.decode(found.ids[:-1]) == "once upon a time"


def test_a_conversation_without_an_answer_is_refused(base: Path) -> None:
    document = Document("text", messages=({"role": "user", "content": "one?"},), place="rows.jsonl, line 3")
    with pytest.raises(RecipeError, match=r"rows.jsonl, line 3: the conversation has no answer"):
        example_of(document, AutoTokenizer.from_pretrained(base))


def test_batches_are_filled_up_where_nothing_counts() -> None:
    batch = batch_of([Example((5, 6, 7), (False, True, True)), Example((8,), (True,))], padding=9)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.targets.tolist() == [[IGNORED, 6, 7], [8, IGNORED, IGNORED]]


class Bigram(torch.nn.Module):
    """A model whose next token depends on the last one alone."""

    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embedding = torch.nn.Parameter(torch.randn(11, 5, generator=generator))
        self.head = torch.nn.Linear(5, 11, bias=False)
        self.head.weight = torch.nn.Parameter(torch.randn(11, 5, generator=generator))

    def get_decoder(self) -> Any:
        return lambda input_ids, **_: SimpleNamespace(last_hidden_state=self.embedding[input_ids])

    def get_output_embeddings(self) -> torch.nn.Linear:
        return self.head


def test_losses_by_parts_are_those_of_all_logits_at_once() -> None:
    """Of two positions at a time, with a cap on the logits, by value and by gradient."""
    form = LogitsForm(factor=0.7, cap=2.0)
    ours, base = (Predictor(Bigram(seed), form, logits_bytes=2 * 4 * 11) for seed in (1, 2))
    batch = batch_of(
        [Example((1, 2, 3, 4, 5), (False, True, True, False, True)), Example((6, 7), (True, True))], 0
    )

    def logits(model: Bigram, tokens: list[int]) -> torch.Tensor:
        given: torch.Tensor = model.head(model.embedding[tokens]) * 0.7
        return (given / 2).tanh() * 2

    answers = -logits(ours.model, [1, 2, 4, 6]).log_softmax(-1)[range(4), [2, 3, 5, 7]].sum()
    said = [2, 3, 5, 6, 7]
    p, q = (logits(one.model, said).log_softmax(-1) for one in (base, ours))
    divergence = (p.exp() * (p - q)).sum()
    for objective, slow, count in ((AnswerLoss(ours), answers, 4), (Divergence(ours, base), divergence, 5)):
        total, counted = objective(batch)
        assert counted == count
        assert float(total.detach()) == pytest.approx(float(slow.detach()), rel=1e-5)
        wanted = torch.autograd.grad(slow, ours.model.embedding, retain_graph=True)[0]
        assert torch.allclose(
            torch.autograd.grad(total, ours.model.embedding)[0], wanted, rtol=1e-4, atol=1e-6
        )


def test_an_adapter_lowers_the_held_out_loss_and_peft_opens_it(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    out = tmp_path / "adapter"
    assert lora(checkpoint, "--data", data, "--out", out, *SMALL) == 0
    record = record_of(out)
    assert record["heldout_after"] < 0.8 * record["heldout_before"]
    assert record["heldout_after"] == min(record["curve"]["heldout"].values())
    assert sorted(path.name for path in out.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "lora.json",
    ]
    assert before == {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    assert str(tmp_path) not in "".join(
        (out / name).read_text() for name in ("lora.json", "adapter_config.json")
    )
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    ids = torch.arange(2, 30).unsqueeze(0)
    with torch.no_grad():
        plain = model(ids).logits
        adapted = peft.PeftModel.from_pretrained(model, out)
        with_it = adapted(ids).logits
        with adapted.disable_adapter():
            without = adapted(ids).logits
    assert torch.equal(without, plain)
    assert not torch.equal(with_it, plain)


def test_the_same_command_again_does_nothing_and_another_is_refused(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    words = (checkpoint, "--data", data, "--out", out, *SMALL, "--targets", "q_proj,v_proj")
    lora(*words)
    stamp = (out / "adapter_model.safetensors").stat().st_mtime_ns
    assert {name.split(".")[-3] for name in load_file(out / "adapter_model.safetensors")} == {
        "q_proj",
        "v_proj",
    }
    lora(*words)
    assert (out / "adapter_model.safetensors").stat().st_mtime_ns == stamp
    with pytest.raises(
        OutputError, match=r"another run \(settings.seed differ\); give another directory, or --overwrite"
    ):
        lora(*words, "--seed", "1")


def test_a_killed_training_goes_on_to_the_same_curve(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = (checkpoint, "--data", data, *SMALL, "--epochs", "6", "--evaluations", "12")
    lora(*words, "--out", whole)
    kill_when(start(*words, "--out", killed), killed / STATE)
    assert not (killed / "lora.json").exists()
    lora(*words, "--out", killed)
    assert record_of(killed)["curve"] == record_of(whole)["curve"]
    assert (killed / "adapter_model.safetensors").read_bytes() == (
        whole / "adapter_model.safetensors"
    ).read_bytes()


def test_towards_the_base_it_lowers_kl(base: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    small = (
        "--num-samples",
        "16",
        "--max-seq-length",
        "64",
        "--rank",
        "8",
        "--rate",
        "0.003",
        "--epochs",
        "4",
    )
    lora(checkpoint, "--base", base, "--data", "default", "--out", out, *small)
    record = record_of(out)
    assert record["objective"].startswith("KL to the base")
    assert record["heldout_after"] < record["heldout_before"]


def test_an_adapter_is_merged_into_16_bits_only(
    base: Path, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    lora(base, "--data", data, "--out", tmp_path / "adapter", *SMALL)
    with pytest.raises(ConfigError, match="is quantized"):
        lora(checkpoint, "--merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    lora(base, "--merge", tmp_path / "adapter", "--out", tmp_path / "merged")
    ids = torch.arange(2, 30).unsqueeze(0)
    with torch.no_grad():
        one = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)(ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        other = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")(ids).logits
    assert (one - other).abs().max() < 0.05 * other.abs().max()


@pytest.mark.parametrize(
    ("lines", "heldout", "words"),
    [
        ([], None, "has no rows to train on"),
        (rows(4), rows(4), "has no row that training does not have too"),
        (rows(4) + rows(1, 70), "missing.jsonl", "'missing.jsonl'"),
        ([{"messages": [{"role": "user", "content": "one?"}]}], rows(2, 50), "no answer of the assistant"),
    ],
)
def test_data_that_cannot_be_used_gets_one_line_and_nothing_is_written(
    checkpoint: Path, tmp_path: Path, lines: list[dict[str, Any]], heldout: Any, words: str
) -> None:
    given: list[str | Path] = [write_rows(tmp_path / "rows.jsonl", lines)]
    if heldout is not None:
        held = heldout if isinstance(heldout, str) else write_rows(tmp_path / "held.jsonl", heldout)
        given += ["--heldout", held]
    with pytest.raises((ConfigError, RecipeError), match=words) as refused:
        lora(checkpoint, "--data", *given, "--out", tmp_path / "out", *SMALL)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--targets", "q_porj"), "did you mean q_proj"),
        (("--rank", "513"), "up to 512"),
        (("--merge", "adapter"), "--data is for training"),
    ],
)
def test_flags_that_do_not_fit_are_refused(
    checkpoint: Path, data: Path, tmp_path: Path, flags: tuple[str, ...], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        lora(checkpoint, "--data", data, "--out", tmp_path / "out", *flags)


def test_a_loss_that_is_no_number_ends_in_one_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(NumericsError, match="lower --rate"):
        lora(checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, "--rate", "1e30")


def test_a_full_disk_ends_in_one_line(checkpoint: Path, data: Path, tmp_path: Path) -> None:
    process = start(checkpoint, "--data", data, "--out", tmp_path / "out", *SMALL, file_bytes=20_000)
    error = process.communicate(timeout=120)[1]
    assert process.returncode == OutputError.exit_status
    assert error.splitlines()[-1].startswith("lowbit: error: --out")
    assert "make room" in error
