"""A format that a model has not seen: a record in words, and the one JSON line that it is to become.

Names of keys, their order and the spaces between them are ours, so that nobody guesses them; all values are in the
question. Items are drawn from lists by a seed, and no two ask the same.
"""

import json
import random
from typing import Any

FIRST = [
    "Ada",
    "Alan",
    "Barbara",
    "Claude",
    "Donald",
    "Edith",
    "Emmy",
    "Grace",
    "Hedy",
    "Ivan",
    "John",
    "Karl",
    "Lise",
]
LAST = [
    "Archer",
    "Baker",
    "Carter",
    "Dyer",
    "Fisher",
    "Gardner",
    "Hunter",
    "Mason",
    "Miller",
    "Porter",
    "Sawyer",
]
TOWNS = [
    "Athens",
    "Bergen",
    "Cairo",
    "Delhi",
    "Dublin",
    "Geneva",
    "Lima",
    "London",
    "Madrid",
    "Oslo",
    "Paris",
    "Rome",
]
GOODS = [
    "apples",
    "books",
    "chairs",
    "clocks",
    "coats",
    "keys",
    "lamps",
    "maps",
    "pens",
    "plates",
    "ropes",
    "shoes",
]
SYSTEM = "Record to line."


def items(count: int, seed: int) -> list[dict[str, str]]:
    """Questions and answers."""
    draw, found = random.Random(seed), dict[str, str]()
    while len(found) < count:
        name = f"{draw.choice(FIRST)} {draw.choice(LAST)}"
        town, number, goods = draw.choice(TOWNS), draw.randint(2, 99), draw.choice(GOODS)
        asked = f"{name} of {town} ordered {number} {goods}."
        found[asked] = json.dumps(
            {"qty": number, "sku": goods, "to": {"city": town, "who": name}}, separators=(",", ":")
        )
    return [{"asked": asked, "answer": answer} for asked, answer in found.items()]


def conversation(item: dict[str, str]) -> dict[str, Any]:
    """A row of training data."""
    return {"messages": [*question(item), {"role": "assistant", "content": item["answer"]}]}


def question(item: dict[str, str]) -> list[dict[str, str]]:
    """What the endpoint is asked."""
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": item["asked"]}]
