"""Does `lowbit serve` say of a checkpoint what transformers says? Greedy texts token by token, and the scales in force.

    python benchmarks/schemes/agreement.py CHECKPOINT --work DIR --out benchmarks/schemes/results/agreement/NAME.json

The server answers PROMPTS greedily. Each of its tokens is then given to transformers with the text before it, so that
every token counts and not only those before the first difference: it must be transformers' own choice too, or less than
TIE logits below that. Held-out texts are asked for their loss as well, the mean negative log-probability of a token, of
server and readers. With `--packages DIR` the server has the Python packages of that folder beside it: what zentorch's
kernels give is held to the same. Two readers: transformers as it is, whose library divides int8 inputs by absmax /
127.5, and as `lowbit evaluate` loads it, with inputs rounded as vLLM rounds them. The FP8 cache's scales, and those of
inputs where they are static, are read back from the running engine and held against the files. Status 1 where something
differs.
"""

import argparse
import gc
import gzip
import json
import sys
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.endpoint import lowbit_serve, write_result  # noqa: E402
from tests.e2e.greedy import CutCache  # noqa: E402

from lowbit_core.manifest import read_manifest  # noqa: E402
from lowbit_evaluate.loaded_model import load_model  # noqa: E402
from lowbit_quantize.model.reference import find_model  # noqa: E402
from lowbit_server.engine.input_scales import prove_input_scales, read_input_scales  # noqa: E402
from lowbit_server.engine.kv_scales import read_checkpoint_scales  # noqa: E402
from lowbit_server.engine.stored_numbers import as_float32  # noqa: E402

PROMPTS = (
    "What is the capital of France?",
    "Write a haiku about the sea.",
    "List three prime numbers.",
    "Explain gravity to a child in two sentences.",
    "Write a function that returns the n-th Fibonacci number.",
    "A train leaves at 9:40 and arrives at 11:05. How long does it take?",
    "Name the planets of the solar system in order.",
    "Translate to French: the cat sleeps on the chair.",
)
HELDOUT = ROOT / "quantize" / "lowbit_quantize" / "quality" / "texts" / "heldout.jsonl.gz"
TEXTS, TEXT_TOKENS = 24, 160
TIE = 1.0  # logits; what the kernels' own rounding moves (tests/e2e/test_families.py)
Logits = Callable[[Tensor], Tensor]  # (1, tokens) to (tokens, vocabulary)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tokens", type=int, default=48, help="of each answer")
    parser.add_argument(
        "--no-fp8-cache", dest="fp8_cache", action="store_false", help="keep keys and values as they are"
    )
    parser.add_argument("--packages", type=Path, help="folder of packages beside the server, zentorch's")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    prompts, texts = _prompts(arguments.checkpoint), _texts(arguments.checkpoint)
    packages = str(arguments.packages) if arguments.packages else None
    flags = ["--served-model-name", "m"]
    flags += [] if arguments.fp8_cache else ["--kv-cache-dtype", "bfloat16"]
    log = arguments.work / "agreement.log"
    with lowbit_serve(arguments.checkpoint, log, *flags, packages=packages) as server:
        engine = _get(f"{server.url}/lowbit/checkpoint")["engine"]
        answers = [_answer(server.url, prompt, arguments.tokens) for prompt in prompts]
        served_loss = mean_loss([_served(server.url, text) for text in texts])
    result = {
        "checkpoint": arguments.checkpoint.name,
        "tie_logits": TIE,
        "kv_cache_dtype": engine["kv_cache_dtype"],
        "layers": engine["layers"],
        "scales": scales_in_force(arguments.checkpoint, engine, fp8_cache=arguments.fp8_cache),
        "loss": {"tokens": sum(len(text) - 1 for text in texts), "served": served_loss},
        "readers": {},
    }
    for name, reader in readers_of(arguments.checkpoint).items():
        logits = reader(arguments.checkpoint, fp8_cache=arguments.fp8_cache)
        result["readers"][name] = compared(logits, prompts, answers) | {
            "loss": mean_loss([log_probabilities(logits, text) for text in texts])
        }
        del logits
    write_result(arguments.out, result)
    print(json.dumps({key: result[key] for key in ("scales", "loss", "readers")}))
    return 0 if agrees(result) else 1


def agrees(result: Mapping[str, Any]) -> bool:
    """Whether every token is a reader's choice or a near tie, and every scale of the files is in force."""
    scales, readers = result["scales"], result["readers"].values()
    return scales["in_force"] == scales["stored"] and all(one["largest_gap"] < TIE for one in readers)


def compared(
    logits: Logits, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> dict[str, Any]:
    """How far each token of the answers is below a reader's best one, in logits."""
    gaps = [gaps_of(logits, prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]
    every = torch.cat(gaps)
    return {
        "tokens": len(every),
        "same": int((every == 0).sum()),
        "largest_gap": round(float(every.max()), 4),
        "texts": len(gaps),
        "whole_texts_same": sum(not bool(one.any()) for one in gaps),
    }


def gaps_of(logits: Logits, prompt: Sequence[int], answer: Sequence[int]) -> Tensor:
    """(tokens of the answer,)"""
    ids = torch.tensor([*prompt, *answer])
    found = logits(ids[None])[len(prompt) - 1 : -1].float()  # (tokens, vocabulary)
    return found.amax(-1) - found.gather(-1, ids[len(prompt) :, None]).squeeze(-1)


def log_probabilities(logits: Logits, text: Sequence[int]) -> list[float]:
    """Of each token of a text but the first, by what stands before it."""
    ids = torch.tensor(text)
    found = logits(ids[None]).float().log_softmax(-1)[:-1]
    return list(found.gather(-1, ids[1:, None]).squeeze(-1).tolist())


def mean_loss(texts: Sequence[Sequence[float]]) -> float:
    """Over the tokens of all texts, nats."""
    every = [one for text in texts for one in text]
    return round(-sum(every) / len(every), 5)


def plain(checkpoint: Path, *, fp8_cache: bool = True) -> Logits:
    """transformers as it is, its cache cut off as stock vLLM's, with the checkpoint's scales."""
    gc.collect()
    config, scales = AutoConfig.from_pretrained(checkpoint), read_checkpoint_scales(checkpoint)
    if (quantized := getattr(config, "quantization_config", None)) is not None:
        quantized.pop("kv_cache_scheme", None)  # it would round once more, with scales cut to bfloat16
    model = AutoModelForCausalLM.from_pretrained(checkpoint, config=config, dtype=torch.bfloat16)
    if not fp8_cache:
        scales = {}

    def logits(ids: Tensor) -> Tensor:
        with torch.inference_mode():
            found: Tensor = model(ids, past_key_values=CutCache(config, scales)).logits[0]
        return found

    return logits


def rounded(checkpoint: Path, *, fp8_cache: bool = True) -> Logits:
    """The model as `lowbit evaluate` loads it."""
    gc.collect()
    model = load_model(find_model(str(checkpoint)), torch.device("cpu"), fp8_cache=fp8_cache)
    return lambda ids: model.hidden(ids)[0].float() @ model.head.float().T


def readers_of(checkpoint: Path) -> dict[str, Callable[..., Logits]]:
    """The readers that open a checkpoint, by name: plain transformers not int8 experts."""
    manifest = read_manifest(checkpoint)
    found: dict[str, Callable[..., Logits]] = {"transformers, inputs rounded as vLLM": rounded}
    return found if manifest and manifest.unopened else {"transformers": plain, **found}


def _in_float32(scale: float | Sequence[float]) -> float | tuple[float, ...]:
    """A layer's scale, or its heads'."""
    return tuple(map(as_float32, scale)) if isinstance(scale, Sequence) else as_float32(scale)


def scales_in_force(checkpoint: Path, engine: Mapping[str, Any], *, fp8_cache: bool = True) -> dict[str, int]:
    """How many scales the files hold, of caches and of inputs, and how many of them the engine runs with."""
    kv = read_checkpoint_scales(checkpoint) if fp8_cache else {}
    inputs = read_input_scales(checkpoint)
    running = {one["layer"]: (one["k_scale"], one["v_scale"]) for one in engine["kv_scales"]}
    in_force = sum(
        tuple(map(_in_float32, running.get(layer, (0.0, 0.0))))
        == (_in_float32(one.k_scale), _in_float32(one.v_scale))
        for layer, one in kv.items()
    )
    proven = prove_input_scales(inputs, engine["input_scales"])
    return {"stored": 2 * len(kv) + len(inputs), "in_force": 2 * in_force + proven}


def _prompts(checkpoint: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [
        list(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            )
        )
        for prompt in PROMPTS
    ]


def _texts(checkpoint: Path) -> list[list[int]]:
    """The beginnings of some held-out texts, spread over all of them."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    with gzip.open(HELDOUT, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [row["text"] for row in rows if "text" in row]
    return [tokenizer(text)["input_ids"][:TEXT_TOKENS] for text in texts[:: -(-len(texts) // TEXTS)]]


def _served(url: str, text: Sequence[int]) -> list[float]:
    """As `log_probabilities`, of the server."""
    body = {"model": "m", "prompt": text, "max_tokens": 1, "temperature": 0, "echo": True, "logprobs": 1}
    answer = _get(f"{url}/v1/completions", body)
    return list(answer["choices"][0]["logprobs"]["token_logprobs"][1 : len(text)])


def _answer(url: str, prompt: Sequence[int], tokens: int) -> list[int]:
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    answer = _get(f"{url}/v1/completions", body | {"ignore_eos": True, "return_token_ids": True})
    return list(answer["choices"][0]["token_ids"])


def _get(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as answer:
        return json.load(answer)


if __name__ == "__main__":
    sys.exit(main())
