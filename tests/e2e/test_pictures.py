"""A model that reads pictures: served before and after, it tells the same pictures apart in the same words."""

from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from scripts.demo import MODEL, serving
from tests.e2e.seeing_model import ANSWERS, QUESTION, as_url, picture, write_seeing_model
from tests.e2e.test_families import SMALL

from lowbit_core.server_process import free_port
from lowbit_quantize.pipeline import quantize
from lowbit_quantize.recipe import load_recipe

pytestmark = pytest.mark.engine


def said(checkpoint: Path) -> dict[str, str]:
    """What the served model says to each picture."""
    with serving(checkpoint, free_port(), "--max-model-len", "128") as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="none")
        return {name: _answer(client, name) for name in ANSWERS}


def _answer(client: OpenAI, name: str) -> str:
    content: Any = [
        {"type": "image_url", "image_url": {"url": as_url(picture(name))}},
        {"type": "text", "text": QUESTION},
    ]
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": content}], temperature=0, max_tokens=32
    )
    return answer.choices[0].message.content or ""


def test_pictures_are_told_apart_before_and_after(tmp_path: Path) -> None:
    base, out = write_seeing_model(tmp_path / "base"), tmp_path / "out"
    quantize(str(base), load_recipe("awq-g64", SMALL), out, torch.device("cpu"))
    assert said(base) == ANSWERS
    assert said(out) == ANSWERS
