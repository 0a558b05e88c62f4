r"""Products of per-token decays between any two tokens of a chunk, as sums of logarithms.

And what the gates of a run of tokens come to, for a memory with momentum (`GateProducts`).

Of $S_t = \theta_t S_{t-1} + g_t$ and $M_t = \alpha_t M_{t-1} - \mu_t S_t$ it is
$M_t = \gamma_t M_0 - c_t S_0 - \sum_{s\le t}\kappa_{ts} g_s$, with Γ, Θ the products of α and θ
(`products`), γ and ϑ those from the start, $\kappa = \Gamma\,\mathrm{diag}(\mu)\,\Theta$ and
$c_t = \sum_s \Gamma_{ts}\mu_s\vartheta_s$. μ is 1, or, where S is to be an average, 1 - θ.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def logarithm(decay: Tensor) -> Tensor:
    """log(decay), finite: a decay below the least normal number of its dtype, 0 among them, counts as that number."""
    return decay.clamp_min(torch.finfo(decay.dtype).tiny).log()


def products(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    r"""Γ `[.., C, C]` and γ `[.., C]` of logarithms `[.., C]`.

    $\Gamma_{ts} = \prod_{s<r\le t} a_r$ for s <= t, else 0: what is left at t of what was written at s; and
    $\gamma_t = \prod_{r\le t} a_r$: what is left of the chunk's start. One below the least normal number of its dtype
    counts as that: exp is slow where its result has no digits.
    """
    between, since = _Products.apply(log_decay)
    return between, since


class _Products(torch.autograd.Function):
    """Differences of one running sum of logarithms would cancel, and lose most digits behind a decay near 0.

    So there are two sums: of the logarithms on a coarse grid, on which every sum and difference is exact, and of the
    small rest. Autograd would take the same differences of gradients; here each pair is counted where it belongs.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(log_decay: Tensor) -> tuple[Tensor, Tensor]:
        size = log_decay.shape[-1]
        numbers = torch.finfo(log_decay.dtype)
        least = math.log(numbers.tiny)
        # sums of as many numbers on it are exact
        step = 2.0 ** math.ceil(math.log2(size * -least * numbers.eps))
        grid = (log_decay / step).round() * step
        coarse, fine = grid.cumsum(-1), (log_decay - grid).cumsum(-1)
        past = log_decay.new_ones(size, size).tril()
        steps = (coarse[..., :, None] - coarse[..., None, :]).clamp_min(least) * past
        between = (steps + fine[..., :, None] - fine[..., None, :]).exp() * past
        return between, (coarse.clamp_min(least) + fine).exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output)

    @staticmethod
    def backward(ctx: Any, to_between: Tensor, to_since: Tensor) -> Tensor:
        between, since = ctx.saved_tensors
        past = between.new_ones(between.shape[-2:]).tril(-1)
        # the decay at r is in all pairs of a time t >= r and a write s < r
        later = past.mT + torch.eye(past.shape[-1], dtype=past.dtype, device=past.device)
        pairs = later @ (to_between * between)
        return (pairs * past).sum(-1) + (later @ (to_since * since)[..., None])[..., 0]


def shifted(x: Tensor, first: float = 0.0) -> Tensor:
    """Return `[.., C, n]` with its rows moved down by one: row t holds what stood at t - 1; the first is filled."""
    return torch.nn.functional.pad(x[..., :-1, :], (0, 0, 1, 0), value=first)


@dataclasses.dataclass(frozen=True, eq=False)
class GateProducts:
    """For tokens 1 … n; everything has leading dimensions of its own.

    Attributes:
        gamma, Gamma: of α, `[.., n]` and `[.., n, n]`, lower triangular; None where nothing fades.
        c, kappa: of α and θ; None without momentum, where κ is Γ.
        theta, Theta: ϑ and Θ; None without momentum.
        diagonal: up to which Γ is ones where there is none (`torch.tril`).
    """

    gamma: Tensor | None = None
    Gamma: Tensor | None = None
    c: Tensor | None = None
    kappa: Tensor | None = None
    theta: Tensor | None = None
    Theta: Tensor | None = None
    diagonal: int = 0

    @staticmethod
    def of(decay: Tensor | None, momentum: Tensor | None, added: Tensor) -> GateProducts:
        """Compute them from α, θ `[.., n]`, 1 at tokens that are not live, and μ `[.., n]`, 0 there."""
        gamma = Gamma = c = kappa = theta = Theta = None
        if decay is not None:
            Gamma, gamma = _products(decay)
        if momentum is not None:
            Theta, theta = _products(momentum)
            size = added.shape[-1]
            every = torch.ones(size, size, dtype=Theta.dtype, device=Theta.device).tril() if Gamma is None else Gamma
            shares = every * added[..., None, :]
            c = (shares @ theta[..., None])[..., 0]
            kappa = shares @ Theta
        return GateProducts(gamma, Gamma, c, kappa, theta, Theta)

    def unbind(self, dim: int, count: int) -> list[GateProducts]:
        """One for each of `count` runs."""
        columns = [[None] * count if x is None else x.unbind(dim) for x in self._fields()]
        rows = zip(*columns, strict=True)
        return [
            GateProducts(gamma, Gamma, c, kappa, theta, Theta, self.diagonal)
            for gamma, Gamma, c, kappa, theta, Theta in rows
        ]

    def each(self, function: Callable[[Tensor], Tensor]) -> GateProducts:
        """Apply `function` to all that is there."""
        gamma, Gamma, c, kappa, theta, Theta = (None if x is None else function(x) for x in self._fields())
        return GateProducts(gamma, Gamma, c, kappa, theta, Theta, self.diagonal)

    def before(self) -> GateProducts:
        """One token earlier: what M_{t-1} is made of."""
        gamma = None if self.gamma is None else shifted(self.gamma[..., None], 1.0)[..., 0]
        c = None if self.c is None else shifted(self.c[..., None])[..., 0]
        Gamma, kappa = (None if x is None else shifted(x) for x in (self.Gamma, self.kappa))
        return GateProducts(gamma, Gamma, c, kappa, self.theta, self.Theta, -1)

    def rows(self, first: int, last: int) -> GateProducts:
        """Return, of tokens first + 1 … last, what those up to last have to do with them."""
        gamma, c, theta = (None if x is None else x[..., first:last] for x in (self.gamma, self.c, self.theta))
        pairs = (self.Gamma, self.kappa, self.Theta)
        Gamma, kappa, Theta = (None if x is None else x[..., first:last, :last] for x in pairs)
        return GateProducts(gamma, Gamma, c, kappa, theta, Theta, self.diagonal + first)

    def _fields(self) -> tuple[Tensor | None, ...]:
        return self.gamma, self.Gamma, self.c, self.kappa, self.theta, self.Theta


def _products(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Γ and γ of `products`, with 0 for what is below the square of the dtype's precision.

    Beside what is written later that is nothing (1e-14 in float32, 5e-32 in float64). Multiplied on, it would leave the
    normal numbers, at which processors are slow: whole weights were, where a chunk's momenta are random in (0, 1).
    """
    least = torch.finfo(decay.dtype).eps ** 2
    between, since = products(logarithm(decay))
    return torch.nn.functional.threshold(between, least, 0.0), torch.nn.functional.threshold(since, least, 0.0)
