"""A forward and backward pass of training, counted on tensors without data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.config import ModelConfig
from nestopt.core.tree import leaves
from nestopt.levels.cms import Cms
from nestopt.models.build import build_model
from nestopt.models.cost import Live
from nestopt.models.hope import HopeLM
from nestopt.nn.hope import Learn

FEW, MORE = 2, 3
"""Of blocks, and of segments: what more of them take is, from the first of these numbers on, in proportion."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Of one micro-batch.

    Attributes:
        flops: of matrix products, forward, backward and what is computed again.
        peak: bytes that are held at the most, with the gradients made so far, without the weights.
        apart: as `peak`, without gradients that are complete.
        state: bytes of the sequences' states at the end: fast weights.
    """

    flops: int
    peak: int
    apart: int
    state: int


def count_pass(
    section: ModelConfig, rows: int, window: int, *, dtype: torch.dtype = torch.float32, learn: Learn = True
) -> Pass:
    """What a training pass over `rows` windows of `window` tokens takes: `HopeLM.loss`, and backward.

    A large model is counted at two depths, and a long window at two numbers of segments; the whole is on the straight
    lines through them. Blocks are alike, and so are segments, where the model's periods fit into them and its states
    do not grow; else the window is counted as it is. Operations and states are exact so; peaks to half a percent, for
    the moment at which most is held is not always the same.
    """

    def at(cycles: int, units: int) -> Pass:
        smaller = section.model_copy(update={"blocks": cycles * cycle + blocks_left})
        return _count(smaller, rows, units * unit + tokens_left if unit else window, dtype, learn)

    cycle = max(1, len(section.mixers))
    cycles, blocks_left = divmod(section.blocks, cycle)
    unit = _unit(section, rows, window)
    units, tokens_left = divmod(window, unit) if unit else (0, 0)
    return _on_plane(at, cycles, units)


def _on_plane(at: Callable[[int, int], Pass], x: int, y: int) -> Pass:
    """The pass at (x, y), from those at `FEW` and `MORE` of each if there are more."""
    if x <= MORE and y <= MORE:
        return at(x, y)
    if x <= MORE:
        return _line(at(x, FEW), at(x, MORE), y)
    if y <= MORE:
        return _line(at(FEW, y), at(MORE, y), x)
    return _line(_on_plane(at, FEW, y), _on_plane(at, MORE, y), x)


def _line(few: Pass, more: Pass, x: int) -> Pass:
    pairs = zip(dataclasses.astuple(few), dataclasses.astuple(more), strict=True)
    return Pass(*(a + (x - FEW) * (b - a) // (MORE - FEW) for a, b in pairs))


def _unit(section: ModelConfig, rows: int, window: int) -> int:
    """Tokens after which a long window goes on as before, at the start of a segment; 0 if there is no such number."""
    if not section.segment:
        return 0
    assert isinstance(section.mlp, Cms)
    clocks = section.mlp.periods if section.mlp.learn == "context" else ()
    unit = math.lcm(section.segment, *(period for period in clocks if isinstance(period, int)))
    if window <= MORE * unit:
        return 0
    small = section.model_copy(update={"blocks": max(1, len(section.mixers))})
    return unit if _state(small, unit) == _state(small, 2 * unit) else 0


def _state(section: ModelConfig, tokens: int) -> int:
    """Bytes of one sequence's state after so many tokens, which is not that after fewer where a mixer keeps tokens."""
    with FakeTensorMode(), torch.no_grad():
        _, state = build_model(section)(torch.zeros(1, tokens, dtype=torch.int64))
    return _bytes(leaf for _, leaf in leaves(state))


def _count(section: ModelConfig, rows: int, window: int, dtype: torch.dtype, learn: Learn) -> Pass:
    with FakeTensorMode():
        model = cast(build_model(section), dtype)
        tokens = torch.zeros(rows, window + 1, dtype=torch.int64)
        with Live() as live:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(lambda p: live.set_apart(p.grad))
            loss, state = model.loss(tokens, learn=learn)
            kept = _bytes(leaf for _, leaf in leaves(state))
            del state
            loss.backward()
        return Pass(live.flops, live.peak, live.peak_else, kept)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cast(model: HopeLM, dtype: torch.dtype) -> HopeLM:
    """`model` with its floating-point tensors in `dtype`; what is tied stays so. (`Module.to` can't with fake ones.)"""
    done: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None:
                if param not in done:
                    done[param] = nn.Parameter(param.detach().to(dtype), requires_grad=param.requires_grad)
                module._parameters[name] = done[param]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                module._buffers[name] = buffer.to(dtype)
    return model
