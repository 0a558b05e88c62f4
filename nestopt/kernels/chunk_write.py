r"""The write of one chunk to one weight of a memory, in closed form: momentum, gates and delta decay per token.

With inputs a_t, directions g_t = η_t ∂ℓ/∂(output) at the chunk's first state and strengths e_t = δ η_t of the decay,

$$S_t = \theta_t S_{t-1} + g_t a_t^\top, \qquad M_t = \alpha_t M_{t-1} - e_t (M_{t-1} a_t) a_t^\top - S_t$$

is, with Γ, Θ the products of α and θ, κ = Γ Θ and $c_t = \sum_s \Gamma_{ts}\prod_{r\le s}\theta_r$,

$$M_t = \gamma_t M_0 - c_t S_0 - \sum_{s\le t}(\Gamma_{ts} w_s + \kappa_{ts} g_s)\, a_s^\top, \qquad
  w_t = e_t M_{t-1} a_t,$$

where w solves one unit lower triangular system. (NL eq. 83-91 in chunks.) No weight is copied per token.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from nestopt.kernels.products import logarithm, products, shifted
from nestopt.kernels.weights import applied, moved


@dataclasses.dataclass(frozen=True)
class Fading:
    """What the gates of a chunk's tokens come to.

    Attributes:
        gamma, Gamma: of α, `[.., C]` and `[.., C, C]`; None where nothing fades.
        c, kappa: of α and θ; None without momentum, where κ is Γ.
        theta, Theta: of θ; None without momentum.
    """

    gamma: Tensor | None
    Gamma: Tensor | None
    c: Tensor | None
    kappa: Tensor | None
    theta: Tensor | None
    Theta: Tensor | None

    @staticmethod
    def of(decay: Tensor | None, momentum: Tensor | None, live: Tensor) -> Fading:
        """From α, θ `[.., C]` with 1 for tokens that are not `live` `[.., C]`, at which S is not added to M, either."""
        gamma = Gamma = c = kappa = theta = Theta = None
        if decay is not None:
            Gamma, gamma = _products(decay)
        if momentum is not None:
            Theta, theta = _products(momentum)
            if Gamma is None:
                size = live.shape[-1]
                added = torch.ones(size, size, dtype=Theta.dtype, device=Theta.device).tril() * live[..., None, :]
            else:
                added = Gamma * live[..., None, :]
            c = (added @ theta[..., None])[..., 0]
            kappa = added @ Theta
        return Fading(gamma, Gamma, c, kappa, theta, Theta)

    def unbind(self, dim: int, count: int) -> list[Fading]:
        """One for each of `count` chunks."""
        fields = (self.gamma, self.Gamma, self.c, self.kappa, self.theta, self.Theta)
        columns = [[None] * count if x is None else x.unbind(dim) for x in fields]
        return [Fading(*row) for row in zip(*columns, strict=True)]

    def at(self, reads: str) -> Fading:
        """For reads `"after"` each token's write: this. `"before"` it: one token earlier."""
        if reads == "after":
            return self
        return Fading(
            None if self.gamma is None else shifted(self.gamma[..., None], 1.0)[..., 0],
            None if self.Gamma is None else shifted(self.Gamma),
            None if self.c is None else shifted(self.c[..., None])[..., 0],
            None if self.kappa is None else shifted(self.kappa),
            self.theta,
            self.Theta,
        )


@dataclasses.dataclass(frozen=True)
class Write:
    """What one chunk writes to one weight: everything but the new weight itself.

    Attributes:
        inputs: a `[.., C, in]`.
        steps: g `[.., C, out]`.
        decays: w `[.., C, out]`; None without delta decay.
    """

    inputs: Tensor
    steps: Tensor
    decays: Tensor | None


def write(
    momentum: Tensor | None,
    inputs: Tensor,
    steps: Tensor,
    strength: Tensor | None,
    output: Tensor,
    fading: Fading,
) -> tuple[Write, Tensor | None]:
    """The `Write` of a chunk; and S_0, to be used from there on (`nestopt.kernels.weights`).

    Args:
        momentum: S_0 `[.., out, in]`.
        inputs: a.
        steps: g.
        strength: e `[.., C]`; None is no delta decay.
        output: M_0 a, `[.., C, out]`.
        fading: the chunk's.
    """
    if strength is None:
        return Write(inputs, steps, None), momentum
    before, gram = fading.at("before"), inputs @ inputs.mT
    answers = output if before.gamma is None else before.gamma[..., None] * output
    if momentum is not None and before.c is not None:
        remembered, momentum = applied(momentum, inputs)
        answers = answers - before.c[..., None] * remembered
    fed = _weigh(before.Gamma, gram, strict=True)
    answers = answers - (fed if before.kappa is None else before.kappa * gram) @ steps
    system = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device) + strength[..., None] * fed
    decays = torch.linalg.solve_triangular(system, strength[..., None] * answers, upper=False, unitriangular=True)
    return Write(inputs, steps, decays), momentum


def read_within(
    weight: Tensor, momentum: Tensor | None, x: Tensor, written: Write, fading: Fading, reads: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """M_t x_t for all t (where `reads` is `"before"`, M_{t-1} x_t), `[.., C, in]` to `[.., C, out]`; and M_0, S_0."""
    at, strict = fading.at(reads), reads == "before"
    y, weight = applied(weight, x)
    if at.gamma is not None:
        y = at.gamma[..., None] * y
    if momentum is not None and at.c is not None:
        remembered, momentum = applied(momentum, x)
        y = y - at.c[..., None] * remembered
    near = x @ written.inputs.mT
    fed = _weigh(at.Gamma, near, strict)
    if at.kappa is None:
        y = y - fed @ (written.steps if written.decays is None else written.steps + written.decays)
    else:
        y = y - (at.kappa * near) @ written.steps
        y = y if written.decays is None else y - fed @ written.decays
    return y, weight, momentum


def advance(weight: Tensor, momentum: Tensor | None, written: Write, fading: Fading) -> tuple[Tensor, Tensor | None]:
    """M and S after the chunk."""
    added = written.steps if fading.kappa is None else fading.kappa[..., -1, :, None] * written.steps
    if written.decays is not None:
        faded = written.decays
        if fading.kappa is not None and fading.Gamma is not None:
            faded = fading.Gamma[..., -1, :, None] * faded
        added = added + faded
    if fading.kappa is None and fading.Gamma is not None:
        added = fading.Gamma[..., -1, :, None] * added
    gamma = None if fading.gamma is None else fading.gamma[..., -1]
    if momentum is None or fading.c is None or fading.theta is None or fading.Theta is None:
        return moved(weight, None, written.inputs, gamma=gamma, added=added, c=None, theta=None, left=None)
    left = fading.Theta[..., -1, :, None] * written.steps
    c, theta = fading.c[..., -1], fading.theta[..., -1]
    return moved(weight, momentum, written.inputs, gamma=gamma, added=added, c=c, theta=theta, left=left)


def _products(decay: Tensor) -> tuple[Tensor, Tensor]:
    """Γ and γ of `nestopt.kernels.products`, with 0 for what is below the square of the dtype's precision.

    Beside what is written later that is nothing (1e-14 in float32, 5e-32 in float64). Multiplied on, it would leave the
    normal numbers, at which processors are slow: whole weights were, where a chunk's momenta are random in (0, 1).
    """
    least = torch.finfo(decay.dtype).eps ** 2
    between, since = products(logarithm(decay))
    return torch.nn.functional.threshold(between, least, 0.0), torch.nn.functional.threshold(since, least, 0.0)


def _weigh(coefficient: Tensor | None, gram: Tensor, strict: bool) -> Tensor:
    """`coefficient ⊙ gram` `[.., C, C]`, lower triangular; None is ones, without the diagonal if `strict`."""
    if coefficient is None:
        return gram.tril(-1 if strict else 0)
    return coefficient * gram
