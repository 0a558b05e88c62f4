r"""A continuum of memories on tokens: what it answers, and what each of its levels learns from them (NL eq. 70-74).

Level by level, $x_{\ell+1} = x_\ell + M_\ell(\mathrm{rms\_norm}(x_\ell))$ with $x_1 = x$ and the answer $x_{k+1}$; or,
of independent levels, $y = x + \sum_\ell c_\ell M_\ell(\mathrm{rms\_norm}(x))$. Every sequence has its own weights,
which stay as they are while these tokens pass. Gradients are in closed form: torch operations, with or without a graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.memories import Memory, Theta
from nestopt.core.precision import matmul
from nestopt.levels.continuum.memory import Linearization, linearize, read


@dataclasses.dataclass(frozen=True)
class Levels:
    """The levels of a continuum, the fastest first.

    Attributes:
        memory: of each.
        weights: of each, by name, `[B, ...]` or, the same for all sequences, `[1, ...]`.
        shares: c of each, where they are independent; None for a chain.
        measured: whether gradients are to say their energy, which the normalised step needs; else it is 0.
        taught: by which of the tokens; None is all.
    """

    memory: Memory
    weights: Sequence[Theta]
    shares: Sequence[Tensor] | None = None
    measured: bool = True
    taught: Sequence[Surprised] | None = None


@dataclasses.dataclass(frozen=True)
class Surprised:
    r"""Which tokens teach a level: those with a surprise $s_t \ge c\,\bar s_{<t}$, c times the mean before them.

    Attributes:
        factor: c.
        so_far: surprise of all tokens before these, `[B]`.
        count: how many these were, `[B]`.
    """

    factor: float
    so_far: Tensor
    count: Tensor

    def only(self, error: Tensor, live: Tensor | None) -> Tensor:
        """Return `[B, n]`, which of the errors `[B, n, D]` are learned from, where they are `live` `[B, n]`."""
        own = squares(error)
        live = torch.ones_like(own, dtype=torch.bool) if live is None else live
        before = self.so_far[:, None] + own.cumsum(1) - own
        count = self.count[:, None] + live.cumsum(1) - live.long()
        return live & (own * count >= self.factor * before)


@dataclasses.dataclass(frozen=True)
class LevelGradient:
    """What some tokens teach one level.

    Attributes:
        gradient: by each weight, summed over tokens, `[B, ...]`.
        energy: $d_t$ of the normalised step, summed over tokens, `[B]`.
        surprise: mean square of the entries of its error, summed over tokens, `[B]`, without a graph.
    """

    gradient: Theta
    energy: Tensor
    surprise: Tensor


def answers(levels: Levels, x: Tensor) -> Tensor:
    """x `[B, n, D]` to y `[B, n, D]`."""
    if levels.shares is None:
        for theta in levels.weights:
            x = x + read(levels.memory, theta, normed(x))
        return x
    y = x
    for theta, share in zip(levels.weights, levels.shares, strict=True):
        y = y + share * read(levels.memory, theta, normed(x))
    return y


def taught_locally(
    levels: Levels, x: Tensor, targets: Sequence[Tensor], live: Tensor | None = None
) -> list[LevelGradient]:
    r"""Return what each level learns by its own objective, of the continuum's normed input x̂ (NL eq. 71).

    It is $\tfrac12\lVert M_\ell(\mathrm{rms\_norm}(x_\ell)) - V_\ell x̂\rVert^2$.

    Args:
        levels: as they read the tokens.
        x: `[B, n, D]`.
        targets: V of each level, `[D, D]`.
        live: `[B, n]`, tokens that are learned from; None is all. Others, and those that are not finite, teach nothing.
    """
    x, seen = _cleaned(x, None, live)
    first, found = normed(x), cast(list[LevelGradient], [])
    for theta, target in zip(levels.weights, targets, strict=True):
        at = linearize(levels.memory, theta, normed(x))
        error = _where(seen, at.y - matmul(first, target.mT))
        found.append(_lesson(at, error, seen, live, levels, len(found)))
        if levels.shares is None:
            x = x + at.y
    return found


def taught_by_loss(levels: Levels, x: Tensor, delta: Tensor, live: Tensor | None = None) -> list[LevelGradient]:
    r"""Return what each level learns by the gradient of $\sum_t \langle\delta_t, y_t\rangle$, backpropagated.

    Args:
        levels: as they read the tokens.
        x: `[B, n, D]`.
        delta: the error at the continuum's output, `[B, n, D]`; a constant to the levels' gradients, but not to the
            outer one.
        live: as for `taught_locally`.
    """
    x, seen = _cleaned(x, delta, live)
    delta = _where(seen, delta)
    if levels.shares is not None:
        looks = [linearize(levels.memory, theta, normed(x)) for theta in levels.weights]
        both = enumerate(zip(looks, levels.shares, strict=True))
        return [_lesson(at, share * delta, seen, live, levels, i, share) for i, (at, share) in both]
    passed: list[tuple[Tensor, Linearization]] = []
    for theta in levels.weights:
        passed.append((x, linearize(levels.memory, theta, normed(x))))
        x = x + passed[-1][1].y
    found = []
    for i, (x, at) in reversed(list(enumerate(passed))):
        found.append(_lesson(at, delta, seen, live, levels, i))
        if i:  # nobody asks what the input of the first should have been
            delta = delta + _through_norm(x, at.pull(delta))
    return found[::-1]


def normed(x: Tensor) -> Tensor:
    """x `[..., D]` divided by its root mean square."""
    return F.rms_norm(x, x.shape[-1:])


def _through_norm(x: Tensor, error: Tensor) -> Tensor:
    """Return `error` at `normed(x)`, pulled back to x."""
    scale = (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).rsqrt()
    unit = x * scale
    return scale * (error - unit * (error * unit).mean(-1, keepdim=True))


def squares(error: Tensor) -> Tensor:
    """Return the surprise of each token `[B, n]`: the mean square of its error `[B, n, D]`, without a graph."""
    return error.detach().square().mean(-1)


def _lesson(
    at: Linearization,
    error: Tensor,
    seen: Tensor,
    live: Tensor | None,
    levels: Levels,
    i: int,
    share: Tensor | None = None,
) -> LevelGradient:
    surprise = squares(error).sum(-1)
    if levels.taught is not None:
        seen = seen & levels.taught[i].only(error, live)
        error = _where(seen, error)
    energy = torch.where(seen, at.energy(), 0).sum(-1) if levels.measured else error.new_zeros(len(error))
    if share is not None:
        energy = share.square() * energy  # the output moves by c times what the read does
    return LevelGradient(at.gradient(error), energy, surprise)


def _cleaned(x: Tensor, delta: Tensor | None, live: Tensor | None) -> tuple[Tensor, Tensor]:
    """x with zeros where nothing is learned from, and where something is, `[B, n]`."""
    seen = x.detach().sum(-1).isfinite()
    if delta is not None:
        seen = seen & delta.detach().sum(-1).isfinite()
    if live is not None:
        seen = seen & live
    return _where(seen, x), seen


def _where(seen: Tensor, x: Tensor) -> Tensor:
    return torch.where(seen[..., None], x, 0)
