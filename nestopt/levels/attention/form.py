"""Attention on tokens: memories that keep their pairs, by torch's kernels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.level import Level
from nestopt.core.memories import Window
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, FormSetting, Refused, TokenForm
from nestopt.core.tree import State
from nestopt.levels.attention.softmax import attend, read_pairs
from nestopt.levels.closed_form import featured, refusal


class AttentionForm(TokenForm):
    """Attend to the pairs kept, all or those of a window. Pairs are in the dtype of the tokens."""

    levels: ClassVar[tuple[type[Level], ...]] = (AssociativeMemory,)
    widens: ClassVar[bool] = False
    shares: ClassVar[bool] = True
    level: AssociativeMemory

    def __init__(self, level: Level, setting: FormSetting) -> None:
        super().__init__(level, setting)
        assert isinstance(self.level.memory, Window)
        self.window = self.level.memory.size
        if self.window is None:
            self.piece = 0  # all pairs would be copied for each piece

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, AssociativeMemory)
        if type(level.memory) is not Window:
            return Refused(f"memory={level.memory.label}: it is for memories that keep their pairs", other_kind=True)
        why = refusal(level)
        if not why and level.read != "after":
            why = f"read={level.read!r}: a token would not see itself"
        return Refused(why) if why else Accepted("softmax attention by torch's kernels")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        x = featured(self.level.features, tokens)
        y, pairs = attend(x, state["level"]["memory"], self.window)
        return y, {"step": state["step"] + tokens.length, "level": {**state["level"], "memory": pairs}}

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        return read_pairs(featured(self.level.features, tokens).q, state["level"]["memory"])
