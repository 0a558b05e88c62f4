"""Byte corpora as a source: windows drawn at random, each step's by its number."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from nestopt.train.data.dataset import Text
from nestopt.train.data.source import Batch, HeldOut
from nestopt.train.data.text import held_out_text, text_beside, windows
from nestopt.train.errors import CheckpointError, whole_number


class Windows:
    """A `Source` of windows of a byte corpus (`nestopt.train.data.text.windows`).

    Args:
        text: its training and held-out bytes.
        batch: rows in a step, over all processes.
        window: inputs in a row.
        seed: of the draws.
        rank, world: this process's number and the number of processes.
    """

    vocab = 256

    def __init__(self, text: Text, *, batch: int, window: int, seed: int, rank: int = 0, world: int = 1) -> None:
        self.name = text.name
        self._train, self._held_out = torch.from_numpy(text.train), text.held_out
        self._drawn: dict[str, int] = {"batch": batch, "length": window, "seed": seed, "rank": rank, "world": world}
        self._step = 0

    @property
    def training(self) -> npt.NDArray[np.uint8]:
        """The bytes that windows are drawn from."""
        return self._train.numpy()

    def batch(self) -> Batch:
        tokens = windows(self._train, self._step, **self._drawn)
        self._step += 1
        return Batch(tokens, None)

    def held_out(self, most: int) -> HeldOut:
        tokens = torch.from_numpy(held_out_text(self._held_out, most))
        return HeldOut(tokens, None, len(tokens))

    def beside(self, tested: int, most: int) -> HeldOut:
        tokens = torch.from_numpy(text_beside(self._held_out, tested, most))
        return HeldOut(tokens, None, len(tokens))

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        return bytes(tokens).decode("utf-8", "replace")

    @functools.cached_property
    def _checksum(self) -> int:
        return zlib.crc32(self._train.numpy().data)

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "text": self._checksum}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where a state is.

        Raises:
            CheckpointError: it is of another text.
        """
        step = whole_number(state["step"], "step")
        if state.get("text", self._checksum) != self._checksum:
            raise CheckpointError(
                f"the text {self.name} is not the one that the run was trained on; give that one, or begin anew in "
                "this one with --reset-data"
            )
        self._step = step

    def close(self) -> None:
        pass
