"""A forward and backward pass of training, counted on tensors without data."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.config import ModelConfig
from nestopt.core.tree import State, leaves
from nestopt.models.build import build_model
from nestopt.models.continua import continua
from nestopt.models.cost import Cost, Live
from nestopt.models.hope import HopeLM
from nestopt.nn.hope import Learn, writes
from nestopt.train.errors import extra

with extra("train"):
    from tqdm import tqdm

FEW, MORE = 2, 3
"""Of blocks, and of segments: what more of them take is, from the first of these numbers on, in proportion."""

PIECE = 1024
"""Positions whose logits `HopeLM.loss` makes at a time."""

PATIENCE = 3.0
"""Seconds until a bar says how far it is."""

Device = Literal["meta", "cpu"]
"""Whose path through the code is counted: an accelerator's, for which meta tensors stand, or this CPU's."""


@dataclasses.dataclass(frozen=True)
class Pass:
    """Of one micro-batch.

    Attributes:
        cost: of forward and backward, and of what is computed again.
        state: bytes of the sequences' states at the end: fast weights.
        laps: bytes that are held at the most in the forward pass, in the loss and its backward pass, and after that;
            with the gradients made so far, and without those that are complete; without the weights.
    """

    cost: Cost
    state: int
    laps: Sequence[tuple[int, int]]

    @property
    def peak(self) -> int:
        """Bytes held at the most, with the gradients made so far."""
        return max(most for most, _ in self.laps)

    @property
    def apart(self) -> int:
        """Bytes held at the most, without gradients that are complete."""
        return max(most for _, most in self.laps)


def count_pass(
    section: ModelConfig,
    rows: int,
    window: int,
    *,
    dtype: torch.dtype = torch.float32,
    learn: Learn = True,
    device: Device = "meta",
    quiet: bool = True,
) -> Pass:
    """Return what a training pass over `rows` windows of `window` tokens takes: `HopeLM.loss`, and backward.

    A large model is counted at two depths, and a long window at two numbers of segments; the whole is on the straight
    lines through them. Blocks are alike, and so are segments, where the model's periods fit into them and its states
    do not grow; else the window is counted as it is. Costs and states are exact so; peaks to half a percent, for the
    moment in a lap at which most is held is not always the same.
    """
    every = len(section.mixers) or 1
    cycles = max(0, section.blocks - len(section.mlps)) // every  # the last blocks have MLPs of their own
    blocks_left = section.blocks - cycles * every
    unit = _unit(section, window, learn, device)
    units, tokens_left = divmod(window, unit) if unit else (1, 0)
    depths, lengths = _ends(cycles), _ends(units)
    found = {}
    with tqdm(total=sum(depths) * sum(lengths), desc="counting", leave=False, disable=quiet, delay=PATIENCE) as bar:
        for depth in depths:
            smaller = section.model_copy(update={"blocks": depth * every + blocks_left})
            for length in lengths:
                tokens = length * unit + tokens_left if unit else window
                found[depth, length] = _count(smaller, rows, tokens, dtype, learn, device)
                bar.update(depth * length)
    return _line([_line([found[depth, length] for length in lengths], units) for depth in depths], cycles)


def _ends(number: int) -> Sequence[int]:
    """Return where to count: at `number`, or if that takes longer, at two numbers on whose straight line it is."""
    return (number,) if number <= FEW + MORE else (FEW, MORE)


def _line(ends: Sequence[Pass], number: int) -> Pass:
    """Return the pass at `number`, on the straight line through those at `_ends(number)`."""
    few, more = ends[0], ends[-1]
    if len(ends) == 1:
        return few
    times = (number - FEW) // (MORE - FEW)

    def on(few: int, more: int) -> int:
        return few + times * (more - few)

    return Pass(
        few.cost + (more.cost + few.cost * -1) * times,
        on(few.state, more.state),
        [(on(a, b), on(c, d)) for (a, c), (b, d) in zip(few.laps, more.laps, strict=True)],
    )


def _unit(section: ModelConfig, window: int, learn: Learn, device: Device) -> int:
    """Return after how many tokens a long window goes on as before, at the start of a segment; 0 if after none."""
    if not section.segment:
        return 0
    learned = [mlp for mlp in continua(section) if mlp.learn == "context" and writes(learn, "mlp")]
    clocks = [period for mlp in learned for period in mlp.periods if isinstance(period, int)]
    unit = math.lcm(section.segment, PIECE, *clocks)
    if window < FEW * unit:
        return 0
    small = section.model_copy(update={"blocks": max(1, len(section.mixers), len(section.mlps))})
    return unit if _state(small, unit, learn, device) == _state(small, 2 * unit, learn, device) else 0


def _state(section: ModelConfig, tokens: int, learn: Learn, device: Device) -> int:
    """Return numbers in one sequence's state after so many tokens: not those after fewer where a mixer keeps tokens."""
    with _no_data(device), torch.no_grad():
        model = build(section, device)
        _, state = model(torch.zeros(1, tokens, dtype=torch.int64, device=device), learn=learn)
    return sum(leaf.numel() for _, leaf in leaves(state))


def _count(section: ModelConfig, rows: int, window: int, dtype: torch.dtype, learn: Learn, device: Device) -> Pass:
    with _no_data(device):
        model = cast(build(section, device), dtype)
        tokens = torch.zeros(rows, window + 1, dtype=torch.int64, device=device)
        with Live(device) as live:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(lambda p: live.set_apart(p.grad))
            laps = _laps(model, live)
            loss, state = model.loss(tokens, learn=learn, piece=PIECE)
            kept = _bytes(leaf for _, leaf in leaves(state))
            del state
            loss.backward()
            laps.append(live.lap())
        return Pass(live.cost, kept, laps)


def _laps(model: HopeLM, live: Live) -> list[tuple[int, int]]:
    """Return a list to which a pass adds its laps but the last: where the loss begins, and its gradient is back."""
    laps: list[tuple[int, int]] = []
    hidden = model.hidden

    def noted(*given: Any, **options: Any) -> tuple[Tensor, State]:
        x, state = hidden(*given, **options)
        laps.append(live.lap())
        x.register_hook(lambda grad: laps.append(live.lap()))
        return x, state

    model.hidden = noted  # type: ignore[method-assign]
    return laps


def _no_data(device: Device) -> contextlib.AbstractContextManager[object]:
    return FakeTensorMode() if device == "cpu" else contextlib.nullcontext()


def build(section: ModelConfig, device: Device) -> HopeLM:
    """Return the model of a configuration, on `device` from the start."""
    with torch.device(device):
        return build_model(section)


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())


def cast(model: HopeLM, dtype: torch.dtype) -> HopeLM:
    """Cast floating-point tensors of `model`; what is tied stays so. (`Module.to` can't with fake ones.)"""
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
