"""A tiny Gemma 3 with its picture tower, taught to say which half of a picture is bright."""

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
    Gemma3Config,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedTokenizerFast,
    SiglipVisionConfig,
)

SIDE, PATCH, PICTURE_TOKENS = 32, 8, 4
MARKS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
QUESTION = "which half?"
ANSWERS = {"left": " it is the left half, as all can see", "upper": " it is the upper half, as few would say"}
STEPS = 150


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
    tokenizer = _tokenizer()
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        tokenizer,
        image_seq_length=PICTURE_TOKENS,
    )
    model = _taught(seeded_model(_config(tokenizer)).float().eval(), processor)
    model.to(torch.bfloat16).save_pretrained(directory)
    processor.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in MARKS.values()])
    marked = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        eos_token=tokenizer.eos_token,
        extra_special_tokens=MARKS,
    )
    marked.chat_template = tokenizer.chat_template
    return marked


def _config(tokenizer: PreTrainedTokenizerFast) -> Gemma3Config:
    ids = {name: tokenizer.convert_tokens_to_ids(mark) for name, mark in MARKS.items()}
    text = {**CONFIGS["gemma3_text"].to_dict(), "vocab_size": VOCABULARY + 64}
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=SIDE,
        patch_size=PATCH,
    )
    return Gemma3Config(
        text_config=text,
        vision_config=vision.to_dict(),
        mm_tokens_per_image=PICTURE_TOKENS,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
    )


def _lesson(processor: Gemma3Processor) -> tuple[dict[str, Any], Tensor]:
    """What the model reads, the answers at its end, and how many tokens of each row are an answer."""
    asked = f"<|user|>{MARKS['boi_token']}{QUESTION}<|end|><|assistant|>"
    pictures = [[picture(name)] for name in ANSWERS]
    read = processor(text=[asked] * len(pictures), images=pictures, return_tensors="pt")
    said = [
        processor.tokenizer(answer + "<|eos|>", return_tensors="pt").input_ids[0]
        for answer in ANSWERS.values()
    ]
    answers = torch.nn.utils.rnn.pad_sequence(said, batch_first=True, padding_value=-100)
    read["input_ids"] = torch.cat([read["input_ids"], answers.clamp(min=0)], 1)
    read["token_type_ids"] = torch.cat([read["token_type_ids"], torch.zeros_like(answers)], 1)
    read["attention_mask"] = torch.ones_like(read["input_ids"])
    return dict(read), answers


def _taught(model: Any, processor: Gemma3Processor) -> Any:
    read, answers = _lesson(processor)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(STEPS):
        logits = model(**read).logits[:, -answers.shape[1] - 1 : -1]
        loss = F.cross_entropy(logits.flatten(0, 1), answers.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model
