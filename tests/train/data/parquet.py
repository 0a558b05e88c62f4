"""Documents as on the hub: Parquet shards with a text column, and a tokenizer beside them."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = "an associative memory on a clock learns what it is shown and does not care which it was".split()  # noqa: SIM905
SHARDS, ROWS, GROUP = 3, 40, 8


def text_of(number: int) -> str:
    chance = random.Random(number)
    return f"{number}: " + " ".join(chance.choices(WORDS, k=3 + number % 30))


def write_shards(root: Path) -> Path:
    """Shards and a `tokenizer.json` of 400 tokens in a folder."""
    import pyarrow
    import tokenizers
    from pyarrow import parquet

    for shard in range(SHARDS):
        numbers = range(shard * ROWS, (shard + 1) * ROWS)
        columns = {"text": [text_of(n) for n in numbers], "id": [f"<urn:{n}>" for n in numbers], "score": [3.5] * ROWS}
        (root / "sample" / "100BT").mkdir(parents=True, exist_ok=True)
        path = root / "sample" / "100BT" / f"{shard:03}_00000.parquet"
        parquet.write_table(pyarrow.table(columns), path, row_group_size=GROUP)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=True))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text_of(n) for n in range(60)], trainer)
    tokenizer.save(str(root / "tokenizer.json"))
    return root
