r"""The layerwise write: the outer weight takes off its errors one token after the other, the inner ones what it leaves.

With $k_t$, $\tau_t$ (the value, less k where there is a residual), σ′ and W̄ as the chunk found them, and
$h_t = \tilde\eta_t\,\alpha_t\,\mathrm{bound}/(1+\delta)$, a memory $W_1\sigma(W_2 k)$ is written in two stages:

1. Features $\bar a_t = \sigma(\bar W_2 k_t)$, rates $\bar e_t = h_t/(\varepsilon\lVert k_t\rVert^2 +
   \lVert\bar a_t\rVert^2)$, and errors $\bar E_t = W_{1,t-1}\bar a_t - \tau_t$ that have seen the chunk's earlier
   writes: one unit lower triangular system, since $W_{1,t-1}$ is linear in them. What $W_1$ does not take off is left
   to $W_2$, $g_{2,t} = b_t\,(1 - (1+\delta)\,\bar e_t\lVert\bar a_t\rVert^2)\;\sigma'_t\odot\bar W_1^\top\bar E_t$ with
   $b_t = \beta h_t/((\varepsilon + \lVert\bar W_1\,\mathrm{diag}\,\sigma'_t\rVert_F^2 + \delta)\,\lVert k_t\rVert^2)$.
2. Features $a_t = \sigma(W_{2,t-1} k_t)$ of $W_2$ as it really is by then, and the system again, with these:
   $E_t = W_{1,t-1}a_t - \tau_t$ is the memory's own error at token t, exactly, and $W_1$ is written with
   $e_t E_t a_t^\top$.

At a chunk of one token it is normalised least mean squares of each layer. With momentum $1-\theta_t$ stands where S is
added to W, so it is no part of h. Of more layers the outermost is $W_1$; the others share β. With the objective `dot`
errors are $-v_t$, and nothing is to be solved. Where they are not linear in what $W_1$ gives (`huber` and `lp`, a
normalised read) rows are substituted one after the other.

Proved: $W_1$'s write is a normalised step below 1 on features that are given, so it is a contraction whatever $W_2$
does within the chunk. Of $W_2$ each step is bounded; that its sum stays so is measured (`docs/tokens/step.md`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from nestopt.core.normalized import FLOOR, INNER, LEAST
from nestopt.core.objectives import L2, Dot
from nestopt.levels.deep import mlp
from nestopt.levels.deep.mlp import Chunk, Linearised, Settings, Weights
from nestopt.levels.deep.weight import BlockWeight, solved


def write(weights: Weights, at: Linearised, v: Tensor, tokens: Chunk, settings: Settings) -> None:
    """Write values v `[B, H, C, D_v]` under the keys of `tokens`, that the memory was linearised at."""
    delta, form, before = settings.delta, settings.form, tokens.inner.before
    assert before is not None
    k, h = tokens.k, tokens.lr * tokens.damping * (settings.bound / (1 + delta))
    floor = LEAST + FLOOR * k.square().sum(-1)
    first = _Outer(weights[0], k, v, h, floor, tokens, settings)
    first.solve(at.inputs[0])
    inner = range(1, len(weights))
    if inner:
        found = mlp.errors(weights, at, first.left[..., None] * first.errors, form)
        felt = mlp.sensitivities(weights, at, form)
        for i in inner:
            a, j = at.inputs[i], felt[i]
            assert j is not None
            rate = INNER / len(inner) * h / (floor + (j.square() + delta) * a.square().sum(-1))
            strength, near = (delta * rate, weights[i].product(a, a.mT)) if delta else (None, None)
            weights[i].write(rate[..., None] * found[i], strength, near, before)
        if k.shape[-2] > 1:  # of one token the features are what they were
            a = k
            for i in reversed(inner):
                a = mlp.ACTIVATIONS[form.activation][0](weights[i].read(a, before))
            weights[0].meet(a)
            first.solve(a)
    weights[0].append(first.steps, first.decays)


class _Outer:
    """The outermost weight's errors in a chunk.

    Attributes:
        errors: ∂ℓ/∂y `[.., C, D_v]`, after the chunk's earlier writes.
        left: the share of each that its own write does not take off, `[.., C]`.
        steps, decays: what is to be written, `[.., C, D_v]`; no decays without δ.
    """

    errors: Tensor
    left: Tensor
    steps: Tensor
    decays: Tensor | None

    def __init__(
        self, weight: BlockWeight, k: Tensor, v: Tensor, h: Tensor, floor: Tensor, tokens: Chunk, settings: Settings
    ) -> None:
        self.weight, self.k, self.v, self.h, self.floor = weight, k, v, h, floor
        self.tokens, self.settings = tokens, settings
        # ∂error/∂y where that is one number
        self.slope = {L2: 1.0, Dot: 0.0}.get(type(settings.objective))

    def solve(self, a: Tensor) -> None:
        """Find all, where a `[.., C, in]` is what the weight was applied to last."""
        delta, slope, form, square = self.settings.delta, self.slope, self.settings.form, a.square().sum(-1)
        if slope is None or form.norm:
            self._by_rows(a, square)
            return
        rate = (self.h / (self.floor + square))[..., None]
        target = self.v - self.k if form.residual and slope else self.v
        self.left = 1 - (slope + delta) * rate[..., 0] * square
        self.errors, self.decays = -target, None
        if slope or delta:
            assert self.tokens.outer.before is not None
            product = self.weight.product
            answers, through, fading = self.weight.unwritten(product(a, a.mT), self.tokens.outer.before)
            system = slope * through if not delta else delta * fading if not slope else slope * through + delta * fading
            answers = solved(system * rate.mT, answers + product(through, rate * target), product)
            self.errors = slope * answers - target
            self.decays = delta * rate * answers if delta else None
        self.steps = rate * self.errors

    def _by_rows(self, a: Tensor, square: Tensor) -> None:
        assert self.tokens.outer.before is not None
        delta, form, product = self.settings.delta, self.settings.form, self.weight.product
        answers, through, fading = self.weight.unwritten(product(a, a.mT), self.tokens.outer.before)
        rows: list[tuple[Tensor, ...]] = []
        for t in range(a.shape[-2]):
            own, now = answers[..., t : t + 1, :], slice(t, t + 1)
            if rows:
                steps, decays = (torch.cat(x, dim=-2) for x in list(zip(*rows, strict=True))[:2])
                own = own - product(through[..., now, :t], steps) - product(fading[..., now, :t], decays)
            found = self.settings.error(mlp.finish(own, self.k[..., now, :], form), self.v[..., now, :])
            pulled, felt = mlp.through_norm(found, own, form) if form.norm else (found, torch.ones_like(own[..., :1]))
            most = (felt.square() + delta) * square[..., now, None]
            rate = self.h[..., now, None] / (self.floor[..., now, None] + most / (1 + delta))
            left = 1 - rate * ((self.slope != 0) * felt.square() + delta) * square[..., now, None]
            rows.append((rate * pulled, delta * rate * own, found, left))
        self.steps, decays, self.errors, left = (torch.cat(x, dim=-2) for x in zip(*rows, strict=True))
        self.left, self.decays = left[..., 0], decays if delta else None
