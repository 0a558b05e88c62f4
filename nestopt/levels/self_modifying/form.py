"""Self-modifying Titans on tokens: the level's fields as the kernel's settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.pending import PENDING
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, FormSetting, Refused, TokenForm
from nestopt.core.tree import State
from nestopt.levels.closed_form import is_number, overridden
from nestopt.levels.deep import mlp
from nestopt.levels.deep.mlp import Settings
from nestopt.levels.deep.scan import block_weights
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.levels.self_modifying.projections import ProjectionMemories
from nestopt.levels.self_modifying.scan import now_of, scan_boxes
from nestopt.levels.self_modifying.writes import OBJECTIVES


class SelfModifyingForm(TokenForm):
    """Write all memories a chunk at a time, by products of matrices."""

    levels: ClassVar[tuple[type[Level], ...]] = (SelfModifying,)
    level: SelfModifying

    def __init__(self, level: Level, setting: FormSetting) -> None:
        super().__init__(level, setting)
        self.settings = _settings(self.level, setting.checkpoint)

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, SelfModifying)
        if why := overridden(level, SelfModifying):
            return Refused(why)
        if not is_number(level.momentum):
            return Refused("momentum is a tensor with a shape")
        return Accepted("products of matrices, a chunk at a time")

    def pending(self, state: State) -> int:
        parts = [state["level"]["memory"], *([state["level"]["projections"]] if self.level.adaptive else [])]
        return max(part[PENDING]["k"].shape[2] for part in parts) % self.chunk

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        level, before = self.level, state["level"]
        theta = None if level.momentum is None else self.number(level.momentum, "momentum", gates, tokens.k)
        maker = ProjectionMemories(
            level.adaptive,
            {name: (parts["w"], parts["b"]) for name, parts in before["readout"].items()},
            dataclasses.replace(self.settings, chunk=level.projection_chunk),
            level.eta_max,
        )
        y, new = scan_boxes(tokens, theta, before, maker, self.settings)
        return y, {"step": state["step"] + tokens.count, "level": {"readout": before["readout"], **new}}

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        before, asked, form = state["level"], tokens.q, self.settings.form
        if "q" in self.level.adaptive:
            asked = mlp.read(block_weights(now_of(before["projections"]["q"], tokens.dtype)), asked, form)
        memory = block_weights(now_of(before["memory"], tokens.dtype))
        return mlp.read(memory, F.normalize(asked, dim=-1), form)


def _settings(level: SelfModifying, checkpoint: int) -> Settings:
    return Settings(
        form=mlp.Form(level.memory.activation, level.memory.residual, level.memory.norm),
        delta=float(level.delta),
        objective=OBJECTIVES[level.objective],
        step=mlp.step_of(level.normalized),
        bound=level.bound,
        read="chunk",
        chunk=level.chunk,
        checkpoint=checkpoint,
        own_values=True,
    )
