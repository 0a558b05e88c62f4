"""Memories of weights with any level as their learning rule, which takes one step a chunk."""

from __future__ import annotations

from typing import ClassVar

import torch

from nestopt.core.associative import AssociativeMemory
from nestopt.core.level import Level
from nestopt.core.token_form import Accepted, Refused
from nestopt.core.token_reference import ReferenceForm
from nestopt.levels.closed_form import refusal


class RuleByChunkForm(ReferenceForm):
    """Take the rule's step once a chunk, for all sequences and heads together, on the gradient of all its tokens.

    It is the reference machine's own way with `write="chunk"`, which has no loop over tokens; states are the same.
    """

    levels: ClassVar[tuple[type[Level], ...]] = (AssociativeMemory,)
    priority: ClassVar[int] = -2
    reference: ClassVar[bool] = False
    piece = 64

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, AssociativeMemory)
        why = refusal(level)
        if level.appends:
            return Refused(f"memory={level.memory.label}: it is for memories that a rule writes", other_kind=True)
        if not why and (level.write != "chunk" or level.chunk == 1):
            why = f"write={level.write!r} with chunk={level.chunk}: the rule takes a step at each token"
        return Refused(why) if why else Accepted(f"a step of {level.rule.label} a chunk, for all heads together")
