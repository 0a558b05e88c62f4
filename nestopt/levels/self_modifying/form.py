"""`self_modifying` by its kernel: its fields as the kernel's settings, its state as the kernel's."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.part import Gate
from nestopt.core.token_batch import Tokens, per_token, tokens
from nestopt.core.tree import State
from nestopt.levels.deep import mlp
from nestopt.levels.deep.gate_products import Fading
from nestopt.levels.deep.scan import Settings, held
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.levels.self_modifying.projections import Maker
from nestopt.levels.self_modifying.scan import now_of, scan_boxes


def self_form(
    level: SelfModifying,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: State,
    mask: Tensor | None,
    checkpoint: int,
) -> tuple[Tensor, State]:
    """`nestopt.core.scan` of `level`, with the states of the generic machine."""
    theta = None
    if level.momentum is not None:
        value = level.momentum
        if isinstance(value, Gate):
            value = gates.get("momentum", value.init)
        theta = per_token("momentum", value, q, torch.promote_types(v.dtype, torch.float32))
    given = tokens(q, k, v, mask, *([] if theta is None else [theta]))
    before = state["level"]
    settings = _settings(level, checkpoint)
    maker = Maker(
        level.adaptive,
        {name: (parts["w"], parts["b"]) for name, parts in before["readout"].items()},
        dataclasses.replace(settings, chunk=level.projection_chunk),
        level.eta_max,
    )
    y, new = scan_boxes(given, theta, before, maker, settings)
    return given.answer(y), {
        "step": state["step"] + given.live.sum(-1),
        "level": {"readout": before["readout"], **new},
    }


def self_recalled(level: SelfModifying, given: Tokens, state: State) -> Tensor:
    """What `level` answers to these tokens as `state` holds it: `[B, H, T, D]`."""
    before, form, asked = state["level"], _settings(level, 0).form, given.q
    if "q" in level.adaptive:
        asked = mlp.read(held(now_of(before["projections"]["q"], given.dtype), Fading()), asked, form)
    memory = held(now_of(before["memory"], given.dtype), Fading())
    return mlp.read(memory, F.normalize(asked, dim=-1), form)


def _settings(level: SelfModifying, checkpoint: int) -> Settings:
    return Settings(
        form=mlp.Form(level.memory.activation, residual=True, norm=level.memory.norm),
        delta=float(level.delta),
        objective="l2",
        step="normalized" if level.normalized else "raw",
        bound=level.bound,
        read="chunk",
        chunk=level.chunk,
        checkpoint=checkpoint,
        own_values=True,
    )
