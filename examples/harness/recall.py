"""Texts that say a few things once and ask for one of them: a task that needs no download."""

import random

from datasets import Dataset

KEYS, VALUES = "abcdefgh", ["red", "green", "blue", "grey"]


def texts(count: int = 32, **_: object) -> dict[str, Dataset]:
    """Return `count` questions on three pairs each."""
    draw, found = random.Random(0), []
    for _ in range(count):
        keys, values = draw.sample(KEYS, 3), [draw.choice(VALUES) for _ in range(3)]
        asked = draw.randrange(3)
        said = " ".join(f"{key} is {value}." for key, value in zip(keys, values, strict=True))
        found.append({"question": f"{said} {keys[asked]} is", "answer": values[asked]})
    return {"test": Dataset.from_list(found)}
