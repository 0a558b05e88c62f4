"""A trained model that reads what it is given and writes on, with its state from a file and to one."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from nestopt.core.tree import State, leaves, nested
from nestopt.models import HopeLM
from nestopt.nn.hope import Learn
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.errors import CheckpointError, damaged, extra, whole_number
from nestopt.train.sampling import check_drawn

with extra("train"):
    from tqdm import tqdm

PIECE = 1024
"""Tokens of a document that are read at a time."""

_KIND = "state"


class Writer:
    """One stream of tokens through a model: what it reads and writes, and what it remembers of that.

    Args:
        model: over bytes, which are tokens too, or others.
        learn: what writes its memories, as for `HopeLM.forward`.
    """

    def __init__(self, model: HopeLM, learn: Learn = True) -> None:
        self.model, self.learn = model, learn
        self.state: State | None = None
        self.waiting: list[int] = []
        """What is not read yet: it is when more comes."""

    @torch.no_grad()
    def read(self, text: Sequence[int], *, quiet: bool = True) -> None:
        """Read all but the last token of `text`, of any length, at the memory of one piece."""
        text = [*self.waiting, *text]
        with tqdm(total=len(text), unit=" tokens", unit_scale=True, desc="reading", leave=False, disable=quiet) as bar:
            for first in range(0, len(text) - 1, PIECE):
                piece = text[first : min(first + PIECE, len(text) - 1)]
                _, self.state = self.model.hidden(torch.tensor([piece]), self.state, learn=self.learn)
                bar.update(len(piece))
        self.waiting = text[-1:]

    def write(self, length: int, choose: Callable[[Tensor], Tensor]) -> list[int]:
        """Go on for `length` tokens, chosen as in `HopeLM.generate`.

        Raises:
            ValueError: if nothing was read.
        """
        if not self.waiting:
            raise ValueError("nothing was read to go on from; give one token or more")
        prompt = torch.tensor([self.waiting])
        tokens, self.state = self.model.generate(prompt, length, choose, self.state, learn=self.learn)
        written: list[int] = tokens[0].tolist()
        check_drawn(written)
        self.waiting = written[-1:]
        return written[1:]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write what it remembers: a safetensors file, replaced at once."""
        flat = {} if self.state is None else dict(leaves(self.state))
        checkpoint.save(path, flat, {"kind": _KIND, "waiting": self.waiting})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Go on from what `save` wrote.

        Raises:
            CheckpointError: the file can't be read, or is no state.
            ValueError: it is the state of another model; says which tensor.
        """
        tensors, meta = checkpoint.load(path)
        if meta.get("kind") != _KIND:
            raise CheckpointError(f"{Path(path)} is not a state; give a file that --state wrote")
        with damaged(path):
            waiting = [whole_number(token, "waiting") for token in list(meta["waiting"])]
            if len(waiting) > 1 or any(token >= self.model.vocab for token in waiting):
                raise ValueError(f"waiting is {waiting}, not one token of {self.model.vocab}")
            parents = {name[: dot.start()] for name in tensors for dot in re.finditer(r"\.", name)}
            if clash := parents & tensors.keys():
                raise ValueError(f"{min(clash)} is a tensor, and there are others below it")
            tree = nested(tensors)
            first = next((leaf for _, leaf in leaves(tree)), None)
            if first is not None and first.shape[:1] != (1,):
                raise ValueError(f"it has {list(first.shape)[:1]} streams, not one")
        self.state = self.model.fitted(tree) if tensors else None
        self.waiting = waiting
