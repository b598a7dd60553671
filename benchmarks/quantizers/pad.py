"""A llama whose widths are multiples of 128 and which computes what another one does, for schemes in blocks of 128.

    python benchmarks/quantizers/pad.py --model DIR --out DIR [--token-ids FILE --rows 4]

Channels, middle channels and heads are added whose weights are zero: what writes them writes zero, what reads them
multiplies by zero. Heads are added in whole groups of queries, so that each query keeps its key and value. A norm
divides by the mean of more squares then, so its weights are multiplied by sqrt(old width / new width), its epsilon by
the square of that; rounding these weights to bfloat16 is all that changes. `--token-ids` compares the two models'
predictions in float32 and ends with status 1 where their mean KL divergence is 0.001 nats or more.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from kl import compare, last_states, load, summarized
from safetensors.torch import load_file, save_file

MULTIPLE = 128
BOUND_NATS = 1e-3
COPIED = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


@dataclass(frozen=True)
class Widths:
    """Of a llama: what its tensors' sizes are made of."""

    hidden: int
    middle: int
    heads: int
    key_heads: int
    head: int

    def sizes(self, name: str) -> tuple[int | None, ...]:
        """The sizes of a tensor, outputs first; None is one that stays."""
        owner = name.rsplit(".", 2)[-2]
        queries, keys = self.heads * self.head, self.key_heads * self.head
        if owner.endswith("norm"):
            return (self.hidden,)
        if owner in ("embed_tokens", "lm_head"):
            return (None, self.hidden)
        pairs = {"q_proj": (queries, self.hidden), "o_proj": (self.hidden, queries)}
        pairs |= dict.fromkeys(("k_proj", "v_proj"), (keys, self.hidden))
        pairs |= dict.fromkeys(("gate_proj", "up_proj"), (self.middle, self.hidden))
        return {**pairs, "down_proj": (self.hidden, self.middle)}[owner]


def widths_of(config: Mapping[str, int]) -> Widths:
    heads = config["num_attention_heads"]
    head = config.get("head_dim") or config["hidden_size"] // heads
    return Widths(
        config["hidden_size"], config["intermediate_size"], heads, config["num_key_value_heads"], head
    )


def padded(old: Widths) -> Widths:
    """The smallest widths that are multiples and not below `old`; a llama's width is a multiple of its heads."""
    group = old.heads // old.key_heads
    key_heads = old.key_heads
    while key_heads * old.head % MULTIPLE or group * key_heads * old.head % MULTIPLE:
        key_heads += 1
    heads = group * key_heads
    hidden = old.hidden
    while hidden % MULTIPLE or hidden % heads:
        hidden += 1
    middle = -(-old.middle // MULTIPLE) * MULTIPLE
    return Widths(hidden, middle, heads, key_heads, old.head)


def filled(tensor: torch.Tensor, sizes: tuple[int | None, ...]) -> torch.Tensor:
    """A tensor with zeros behind its numbers."""
    out = torch.zeros([new or old for new, old in zip(sizes, tensor.shape, strict=True)], dtype=tensor.dtype)
    out[tuple(slice(0, old) for old in tensor.shape)] = tensor
    return out


def write(model: Path, out: Path) -> None:
    """Write the padded model; exits where `model` is not a llama whose norms and linears are all that it has."""
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    if (
        config["architectures"] != ["LlamaForCausalLM"]
        or config.get("attention_bias")
        or config.get("mlp_bias")
    ):
        raise SystemExit(f"{model.name} is {config['architectures']}; only llamas without biases are padded")
    new = padded(widths_of(config))
    share = config["hidden_size"] / new.hidden
    out.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path in sorted(model.glob("*.safetensors")):
        for name, tensor in load_file(path).items():
            factor = math.sqrt(share) if name.rsplit(".", 2)[-2].endswith("norm") else 1.0
            tensors[name] = filled((tensor.double() * factor).to(tensor.dtype), new.sizes(name))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    changed = {"hidden_size": new.hidden, "intermediate_size": new.middle, "head_dim": new.head}
    changed |= {"num_attention_heads": new.heads, "num_key_value_heads": new.key_heads}
    changed["rms_norm_eps"] = config["rms_norm_eps"] * share
    (out / "config.json").write_text(json.dumps({**config, **changed}, indent=2) + "\n", encoding="utf-8")
    for name in COPIED:
        if (model / name).exists():
            (out / name).write_bytes((model / name).read_bytes())


@torch.inference_mode()
def compared(model: Path, out: Path, ids: list[list[int]]) -> dict[str, float]:
    """How far the predictions of the two models lie apart, both in float32."""
    base, other = load(model), load(out)
    rows = []
    for row in ids:
        logs = [one.lm_head(last_states(one, [row])[0])[:-1].log_softmax(-1) for one in (base, other)]
        rows.append(compare(logs[0], logs[1], torch.tensor(row[1:])))
    return summarized(rows, sum(len(row) - 1 for row in ids))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--token-ids", type=Path, help="JSON of prepare.py, to compare the two models on")
    parser.add_argument("--rows", type=int, default=4)
    arguments = parser.parse_args()
    write(arguments.model, arguments.out)
    if arguments.token_ids is None:
        return 0
    ids = json.loads(arguments.token_ids.read_text(encoding="utf-8"))["input_ids"][: arguments.rows]
    found = compared(arguments.model, arguments.out, ids)
    print(json.dumps(found))
    return int(found["mean_kl_nats"] >= BOUND_NATS)


if __name__ == "__main__":
    sys.exit(main())
