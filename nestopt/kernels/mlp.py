"""An MLP memory by hand: its read, and what it takes to write one, layer by layer and without copies per token."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt.kernels.weights import applied, pulled, squares

Weights = Sequence[Tensor]
"""W1 … W_L `[.., out, in]`, the outermost first: the read is k + W1 σ(W2 … σ(W_L k))."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What kind of MLP: see `nestopt.core.memories.Mlp`. With one weight it is a matrix memory."""

    activation: str = "silu"
    residual: bool = True
    norm: bool = False


@dataclasses.dataclass(frozen=True)
class Linearised:
    """An MLP at its present weights, as seen from keys `[.., C, D_k]`.

    Attributes:
        inputs: of each weight, `[.., C, in]`, in the order of the weights.
        outputs: what each weight makes of its input, `[.., C, out]`.
        slopes: σ′ at those outputs, `[.., C, out]`, of W2, …, W_L: W1 has no activation.
        y: the read `[.., C, D_v]`.
    """

    inputs: list[Tensor]
    outputs: list[Tensor]
    slopes: list[Tensor]
    y: Tensor


def read(weights: Weights, x: Tensor, form: Form) -> tuple[Tensor, list[Tensor]]:
    """M(x): `[.., C, D_k]` to `[.., C, D_v]`; and the weights, to be used from there on (`nestopt.kernels.weights`)."""
    h, used = x, list(weights)
    for i in range(len(weights) - 1, -1, -1):
        h, used[i] = applied(weights[i], h)
        if i:
            h = ACTIVATIONS[form.activation][0](h)
    return finish(h, x, form), used


def finish(o: Tensor, x: Tensor, form: Form) -> Tensor:
    """The read from what W1 gives: normalised and added to x, where `form` says so."""
    if form.norm:
        o = o * inverse_rms(o)
    return x + o if form.residual else o


def linearise(weights: Weights, k: Tensor, form: Form) -> tuple[Linearised, list[Tensor]]:
    """The MLP as seen from k; and the weights, to be used from there on (see `nestopt.kernels.weights`)."""
    depth, used = len(weights), list(weights)
    inputs, outputs = [k] * depth, [k] * depth
    slopes = [k] * (depth - 1)
    x = k
    for i in range(depth - 1, 0, -1):
        inputs[i] = x
        outputs[i], used[i] = applied(weights[i], x)
        x, slopes[i - 1] = ACTIVATIONS[form.activation][1](outputs[i])
    inputs[0] = x
    outputs[0], used[0] = applied(weights[0], x)
    return Linearised(inputs, outputs, slopes, finish(outputs[0], k, form)), used


def errors(weights: Weights, at: Linearised, error: Tensor, form: Form) -> tuple[list[Tensor], list[Tensor]]:
    """∂ℓ/∂(output of each weight) `[.., C, out]` from `error` = ∂ℓ/∂y, by backpropagation; and the weights."""
    if form.norm:
        scale = inverse_rms(at.outputs[0])
        unit = at.outputs[0] * scale
        error = scale * (error - unit * (error * unit).mean(-1, keepdim=True))
    found, used = [error], list(weights)
    for i, slope in enumerate(at.slopes):
        d, used[i] = pulled(weights[i], found[-1])
        found.append(d * slope)
    return found, used


def sensitivities(weights: Weights, at: Linearised, form: Form) -> tuple[list[Tensor | None], list[Tensor]]:
    """Bounds of ‖∂y/∂(output of each weight)‖ `[.., C]`, None for 1; and the weights.

    The Frobenius norm of each layer's Jacobian W diag(σ′) bounds its largest singular value; over several layers the
    bounds are multiplied.
    """
    found: list[Tensor | None] = [inverse_rms(at.outputs[0])[..., 0] if form.norm else None]
    used = list(weights)
    for i, slope in enumerate(at.slopes):
        lengths, used[i] = squares(weights[i])
        norm = (slope.square() @ lengths[..., None])[..., 0].clamp_min(_TINY).sqrt()
        outer = found[-1]
        found.append(norm if outer is None else norm * outer)
    return found, used


def inverse_rms(o: Tensor) -> Tensor:
    """1 / root mean square over the last dimension, which is kept."""
    return (o.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()


NORM_EPS = 1e-6
"""Under the root of a normalised read: one of zeros stays zero."""

_TINY = 1e-30
"""Under roots of squares: the root has no derivative at 0."""


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    s = z.sigmoid()
    a = z * s
    return a, torch.addcmul(s, a, 1 - s)


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(z / math.sqrt(2)))
    return z * cdf, cdf + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _relu(z: Tensor) -> tuple[Tensor, Tensor]:
    return z.relu(), (z > 0).to(z.dtype)


def _tanh(z: Tensor) -> tuple[Tensor, Tensor]:
    a = z.tanh()
    return a, 1 - a * a


def _identity(z: Tensor) -> tuple[Tensor, Tensor]:
    return z, torch.ones_like(z)


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]] = {
    "silu": (torch.nn.functional.silu, _silu),
    "gelu": (torch.nn.functional.gelu, _gelu),
    "relu": (torch.relu, _relu),
    "tanh": (torch.tanh, _tanh),
    "identity": (lambda z: z, _identity),
}
"""σ by name; and σ with σ′, as torch operations that can be differentiated again."""
