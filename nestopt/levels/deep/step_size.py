r"""The step of a deep memory that does not diverge.

Write K_ts for a bound of how much a unit step on token s moves the read at token t: over the memory's layers l, with
inputs a and sensitivities j (`mlp.sensitivities`), $K_{ts} = \sum_l j_{lt} j_{ls} |a_{lt}\cdot a_{ls}|$, and
$d_t = K_{tt}$. In the linearised model the chunk's writes change its errors by
$E \leftarrow (I - \Theta\,\mathrm{diag}(\eta))\,E$ with $|\Theta| \le K$, and

$$\eta_s = \frac{\mathrm{bound}}{\varepsilon + n_s}, \qquad n_s = \sqrt{d_s}\,\sum_t K_{ts}/\sqrt{d_t}$$

makes every column of $D^{-1/2} K\,\mathrm{diag}(\eta)\, D^{1/2}$ add up to at most `bound`: no eigenvalue of Θ diag(η)
passes it (Gershgorin), whatever the lengths of the keys. The delta decay acts on each layer's own input besides, which
adds $\delta \max_l |a_{lt}\cdot a_{ls}|$ to K.

Where reads see later tokens of the chunk, s may not be weighed by what comes after it, and the sum runs over t <= s.
These partial sums grow with s, and C equal keys would be stepped on by $1 + 1/2 + \dots + 1/C = H_C$ in all: n is
multiplied by H_C. For unit keys the eigenvalues are then below `bound` times $m_C/H_C$, where
$m_1 = 1, m_{s} = m_{s-1} + 1/(1 + m_{s-1})$: for if $B \preceq \lambda I$, then
$B + aa^\top/(1 + a^\top B a) \preceq (\lambda + 1/(1+\lambda)) I$, and n_s >= 1 + aᵀBa. That is proven; what maximising
over keys, of one length or of any, finds is that equal keys are the worst, and the eigenvalues below `bound` itself.

What this does not bound:

- Momenta that change from token to token. A write is added to the memory again and again, by $1/(1-\theta)$ in all
  where θ is constant, for which the factor 1 - θ makes up; after a write at θ = 0, many θ near 1 add it far more often.
- What is not linear. Values 10,000 times as large as the weights and keys are passed by some tens of times their size
  at first; then the memory is as large as they are, and settles.
- With the objective `"dot"` there is no error that goes to 0: the delta decay alone holds the memory. It acts once
  where momentum adds a write 1/(1-θ) times, so a memory of one layer comes to answer 1/(1-θ) times the values.
- The delta decay pulls to the memory whose weights are all 0, which has no gradient in W1 nor in W2. Where α and it
  take more than what is written, as with α = 0.95 and δ = 1, a memory of two layers ends there.

Values that a memory makes for itself are `bounded` besides, without which it diverges, too.

A memory M that is to answer $k_t$ with its own $\hat v = M(v_t)$, where $v_t = M_v(v)$ is made by a memory that learns
likewise, chases itself. Say that M maps a direction, in which keys lie and values, too, to itself times a: then it is
to answer a key of length 1 with $a^2\lVert v\rVert$, and a grows without bound as soon as $a\lVert v\rVert > 1$ (with a
delta decay of strength δ, as soon as it is above 1 + δ), however short the steps are. The normalised step above is of
no help: it bounds what is learned of given values. Constant, alternating and random tokens with a mean all have such a
direction, and made memories infinite within a few hundred tokens.

So a value is cut to the length of what it is made of, $\lVert v_t\rVert \le \lVert v\rVert$ and
$\lVert\hat v\rVert \le \lVert v_t\rVert$. All memories then learn values no longer than those of the data, as others
do, and the step bounds what comes of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

EPS = 1e-4
"""ε above: keys much shorter than its root are stepped on less."""


def closeness(near: Sequence[Tensor], sensitivities: Sequence[Tensor | None], delta: float) -> Tensor:
    """K `[.., C, C]` of the products a aᵀ `[.., C, C]` of the layers' inputs, and their sensitivities `[.., C]`."""
    total, own = None, None
    for product, j in zip(near, sensitivities, strict=True):
        gram = product.abs()
        if delta:
            own = gram if own is None else torch.maximum(own, gram)
        if j is not None:
            gram = gram * j[..., :, None] * j[..., None, :]
        total = gram if total is None else total + gram
    assert total is not None
    return total if own is None else total + delta * own


def norms(close: Tensor, read: Literal["after", "before", "chunk"]) -> Tensor:
    """n `[.., C]` of K `[.., C, C]`."""
    size = close.shape[-1]
    d = close.diagonal(dim1=-2, dim2=-1)
    if size == 1:
        return d
    root = d.clamp_min(torch.finfo(d.dtype).tiny).sqrt()
    if read == "chunk":
        return root * (close / root[..., None, :]).sum(-1)
    return root * (close / root[..., None, :]).tril().sum(-1)


def margin(chunk: int, read: Literal["after", "before", "chunk"]) -> float:
    """Return what n is multiplied by: H_C where reads see later tokens of their chunk, else 1."""
    return 1.0 if read == "chunk" else sum(1 / i for i in range(1, chunk + 1))


def step_sizes(
    lr: Tensor,
    damping: Tensor,
    near: Sequence[Tensor],
    sensitivities: Sequence[Tensor | None],
    *,
    delta: float,
    bound: float,
    read: Literal["after", "before", "chunk"],
    chunk: int,
) -> Tensor:
    """η `[.., C]` from η̃ = `lr` in (0, 1] and `damping` = α(1 - θ), which the whole step is multiplied by.

    `near` has the products a aᵀ `[.., C, C]` of each layer's inputs.
    """
    n = norms(closeness(near, sensitivities, delta), read) * margin(chunk, read)
    return bound * lr * damping / (EPS + n)


def bounded(y: Tensor, x: Tensor) -> Tensor:
    """y `[.., D]`, no longer than x `[.., D]`."""
    most, length = (z.square().sum(-1, keepdim=True) + LEAST for z in (x, y))
    return y * (most / length).clamp_max(1.0).sqrt()


LEAST = 1e-12
"""Under both squares: of two vectors of zeros neither is the longer."""
