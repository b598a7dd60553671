"""A tiny Idefics 3 (SmolVLM's kind): Llama behind a picture tower, taught to say which half of a picture is bright.

Half of vLLM's models that see import torchvision; this one does not.
"""

import base64
import io
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from tests.tiny_models import CONFIGS, VOCABULARY, seeded_model, tiny_tokenizer
from tokenizers import AddedToken
from torch import Tensor
from transformers import (
    Idefics3Config,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)

SIDE, PATCH, SHUFFLE = 32, 8, 2
PICTURE_TOKENS = (SIDE // PATCH // SHUFFLE) ** 2
MARK, ALL_MARKS = "<image>", ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>")
QUESTION = "which half?"
ANSWERS = {"left": " it is the left half, as all can see", "upper": " it is the upper half, as few would say"}
STEPS = 200


def picture(name: str) -> Image.Image:
    """White on black in one half."""
    image = Image.new("RGB", (SIDE, SIDE))
    box = (0, 0, SIDE // 2, SIDE) if name == "left" else (0, 0, SIDE, SIDE // 2)
    image.paste((255, 255, 255), box)
    return image


def as_url(image: Image.Image) -> str:
    """As clients send it."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def write_seeing_model(directory: Path) -> Path:
    """Save the model and its processor."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in ALL_MARKS])
    pictures = Idefics3ImageProcessorPil(
        size={"longest_edge": SIDE}, max_image_size={"longest_edge": SIDE}, do_image_splitting=False
    )
    processor = Idefics3Processor(pictures, tokenizer, image_seq_len=PICTURE_TOKENS)
    model = _taught(seeded_model(_config(tokenizer)).float().eval(), processor)
    model.to(torch.bfloat16).save_pretrained(directory)
    processor.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _config(tokenizer: PreTrainedTokenizerFast) -> Idefics3Config:
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    vision = {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": PATCH,
    }  # fmt: skip
    text = {
        **CONFIGS["mistral"].to_dict(),
        **ends,
        "model_type": "llama",
        "sliding_window": None,
        "vocab_size": VOCABULARY + 64,
    }
    mark = tokenizer.convert_tokens_to_ids(MARK)
    return Idefics3Config(
        text_config=text, vision_config=vision, scale_factor=SHUFFLE, image_token_id=mark, **ends
    )


def _lesson(processor: Idefics3Processor) -> tuple[dict[str, Any], Tensor]:
    """What the model reads, and the answers that are at its end; −100 where a row has ended."""
    asked = f"<|user|>{MARK}\n{QUESTION}<|end|><|assistant|>"
    pictures = [[picture(name)] for name in ANSWERS]
    read = processor(text=[asked] * len(pictures), images=pictures, return_tensors="pt")
    said = [
        processor.tokenizer(answer + "<|eos|>", return_tensors="pt").input_ids[0]
        for answer in ANSWERS.values()
    ]
    answers = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=-100)
    read["input_ids"] = torch.cat([read["input_ids"], answers.clamp(min=0)], 1)
    read["attention_mask"] = torch.ones_like(read["input_ids"])
    return dict(read), answers


def _taught(model: Any, processor: Idefics3Processor) -> Any:
    read, answers = _lesson(processor)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        logits = model(**read).logits[:, -answers.shape[1] - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model
