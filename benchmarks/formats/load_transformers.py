"""A checkpoint opened by transformers through GPTQModel, its answer, and its logits against its twin's.

    python load_transformers.py --checkpoint DIR --twin DIR --prompt TEXT

The twin is the checkpoint that it was exported from, which transformers unpacks with compressed-tensors. GPTQModel
computes with its own CPU kernels, so the logits are close and not equal. The last line of stdout is a JSON object.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

NEW_TOKENS = 32


def main() -> None:
    parser = argparse.ArgumentParser(description="Open a checkpoint with transformers and GPTQModel.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--twin", type=Path, required=True)
    parser.add_argument("--prompt", required=True)
    arguments = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(arguments.checkpoint, dtype="auto", device_map="cpu").eval()
    unpacked = CompressedTensorsConfig(dequantize=True)
    twin = AutoModelForCausalLM.from_pretrained(
        arguments.twin, dtype="auto", quantization_config=unpacked
    ).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.checkpoint)
    chat = [{"role": "user", "content": arguments.prompt}]
    text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    layers = {type(module).__name__ for module in model.modules() if hasattr(module, "qweight")}
    with torch.inference_mode():
        answers = [one.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False) for one in (model, twin)]
        whole = answers[0]
        p, q = (one(whole).logits[0].double().log_softmax(-1) for one in (model, twin))
    report = {
        "layers": sorted(layers),
        "quantized_linears": sum(hasattr(module, "qweight") for module in model.modules()),
        "answer": tokenizer.decode(whole[0, ids.shape[1] :], skip_special_tokens=True),
        "same_answer_as_twin": torch.equal(*answers),
        "positions": whole.shape[1],
        "mean_kl_to_twin_nats": round(float((q.exp() * (q - p)).sum(-1).mean()), 8),
        "top1_agreement_with_twin": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
