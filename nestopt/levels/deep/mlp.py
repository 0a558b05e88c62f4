"""An MLP memory by hand, layer by layer: its read, its gradients, and what of a chunk these are taken from."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.core.objectives import Objective
from nestopt.core.token_batch import check_choice, check_whole
from nestopt.kernels.products import GateProducts
from nestopt.levels.deep.weight import BlockWeight

Read = Literal["after", "before", "chunk"]

Weights = Sequence[BlockWeight]
"""W1 … W_L `[.., out, in]`, the outermost first: the read is k + W1 σ(W2 … σ(W_L k))."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What kind of MLP: see `nestopt.core.memories.Mlp`. With one weight it is a matrix memory."""

    activation: str = "silu"
    residual: bool = True
    norm: bool | Literal["layer"] = False


def step_of(normalized: bool | str) -> str:
    """Return the step of a level's field `normalized`."""
    return normalized if isinstance(normalized, str) else "normalized" if normalized else "raw"


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `nestopt.ops.deep_memory` that are no tensors, checked."""

    form: Form
    delta: float
    objective: Objective
    """One of the read alone whose gradient is written down."""
    step: str
    bound: float
    read: Read
    chunk: int
    checkpoint: int
    forget: Literal["all", "outer"] = "all"
    """Which weights α fades."""
    own_values: bool = False
    """Of a memory that is read as its `"chunk"` found it: what is written under a key is M(v), the memory's own."""

    def __post_init__(self) -> None:
        check_choice("step", self.step, ("normalized", "raw", "layerwise"))
        check_choice("read", self.read, ("after", "before", "chunk"))
        check_choice("forget", self.forget, ("all", "outer"))
        check_choice("activation", self.form.activation, tuple(ACTIVATIONS))
        check_whole("chunk", self.chunk, 1)
        check_whole("checkpoint", self.checkpoint, 0)
        if not 0 < self.bound < 2 and not (self.own_values and self.bound == 2):  # where one layer is asked for
            raise ValueError(f"bound={self.bound!r} is not allowed; give a number above 0 and below 2")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta={self.delta!r} is not allowed; give a finite number, 0 or more")

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        """∂ℓ/∂y of reads and values `[.., D_v]`."""
        found = self.objective.error(y, v)
        assert found is not None
        return found


@dataclasses.dataclass(frozen=True)
class Linearised:
    """An MLP at its present weights, as seen from keys `[.., C, D_k]`.

    Attributes:
        inputs: of each weight, `[.., C, in]`, in the order of the weights.
        slopes: σ′ at those outputs, `[.., C, out]`, of W2, …, W_L: W1 has no activation.
        output: what W1 makes of its input, `[.., C, D_v]`.
        y: the read `[.., C, D_v]`.
    """

    inputs: list[Tensor]
    slopes: list[Tensor]
    output: Tensor
    y: Tensor


@dataclasses.dataclass(frozen=True)
class ChunkGates:
    """What the gates of a block come to, for the weights that they act on.

    Attributes:
        now: at each token of the chunk; None if no read asks.
        before: one token earlier; None if neither a read, a delta decay nor the layerwise step asks.
        last: at the chunk's last token.
    """

    now: GateProducts | None
    before: GateProducts | None
    last: GateProducts


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of a chunk `[B, H, C, ..]`.

    Attributes:
        k, v, lr: of the tokens.
        damping: α (1 - θ), by which the normalised step is shortened; α of the layerwise one.
        outer, inner: the gates of W1, and of the others.
    """

    k: Tensor
    v: Tensor
    lr: Tensor
    damping: Tensor
    outer: ChunkGates
    inner: ChunkGates

    def gates(self, i: int) -> ChunkGates:
        """Return those of the weight W_{i + 1}."""
        return self.inner if i else self.outer


# -- layer by layer ----------------------------------------------------------------------------------------------------


def read(weights: Weights, x: Tensor, form: Form) -> Tensor:
    """M(x): `[.., C, D_k]` to `[.., C, D_v]`."""
    h = x
    for i in range(len(weights) - 1, -1, -1):
        h = weights[i].apply(h)
        if i:
            h = ACTIVATIONS[form.activation][0](h)
    return finish(h, x, form)


def finish(o: Tensor, x: Tensor, form: Form) -> Tensor:
    """Return the read from what W1 gives: normalised and added to x, where `form` says so."""
    if form.norm:
        o = centred(o, form)
        o = o * inverse_rms(o)
    return x + o if form.residual else o


def centred(o: Tensor, form: Form) -> Tensor:
    """Return what W1 gives as its norm takes it: less its mean, where that is a layer norm."""
    return o - o.mean(-1, keepdim=True) if form.norm == "layer" else o


def linearise(weights: Weights, k: Tensor, form: Form) -> Linearised:
    """Return the MLP as seen from keys `[.., C, D_k]`, which are then to be written."""
    depth = len(weights)
    inputs, slopes = [k] * depth, [k] * (depth - 1)
    x = k
    for i in range(depth - 1, 0, -1):
        inputs[i] = x
        x, slopes[i - 1] = ACTIVATIONS[form.activation][1](weights[i].apply(x))
    inputs[0] = x
    output = weights[0].apply(x)
    return Linearised(inputs, slopes, output, finish(output, k, form))


def read_and_linearise(weights: Weights, q: Tensor, k: Tensor, form: Form) -> tuple[Tensor, Linearised]:
    """Return `read` at q and `linearise` at k, in one pass over the weights, which are larger than either."""
    asked, size, depth = q.shape[-2], k.shape[-2], len(weights)
    inputs, slopes = [k] * depth, [k] * (depth - 1)
    x, written = torch.cat([q, k], dim=-2), k
    for i in range(depth - 1, 0, -1):
        inputs[i] = written
        z, of_keys = weights[i].apply(x, size).split([asked, size], dim=-2)
        written, slopes[i - 1] = ACTIVATIONS[form.activation][1](of_keys)
        x = torch.cat([ACTIVATIONS[form.activation][0](z), written], dim=-2)
    inputs[0] = written
    read_at_q, output = weights[0].apply(x, size).split([asked, size], dim=-2)
    return finish(read_at_q, q, form), Linearised(inputs, slopes, output, finish(output, k, form))


def errors(weights: Weights, at: Linearised, error: Tensor, form: Form) -> list[Tensor]:
    """∂ℓ/∂(output of each weight) `[.., C, out]` from `error` = ∂ℓ/∂y: backpropagation."""
    if form.norm:
        error, _ = through_norm(error, at.output, form)
    found = [error]
    for weight, slope in zip(weights, at.slopes, strict=False):
        found.append(weight.pull(found[-1]) * slope)
    return found


def through_norm(error: Tensor, output: Tensor, form: Form) -> tuple[Tensor, Tensor]:
    """Return ∂ℓ/∂(output) of ∂ℓ/∂(output over its root mean square), and the inverse of that `[.., 1]`."""
    output = centred(output, form)
    scale = inverse_rms(output)
    unit = output * scale
    return centred(scale * (error - unit * (error * unit).mean(-1, keepdim=True)), form), scale


def sensitivities(weights: Weights, at: Linearised, form: Form) -> list[Tensor | None]:
    """Bounds of ‖∂y/∂(output of each weight)‖ `[.., C]`, None for 1.

    The Frobenius norm of each layer's Jacobian W diag(σ′) bounds its largest singular value; over several layers the
    bounds are multiplied.
    """
    found: list[Tensor | None] = [inverse_rms(centred(at.output, form))[..., 0] if form.norm else None]
    for weight, slope in zip(weights, at.slopes, strict=False):
        norm = (slope.square() @ weight.lengths()[..., None])[..., 0].clamp_min(_TINY).sqrt()
        outer = found[-1]
        found.append(norm if outer is None else norm * outer)
    return found


def inverse_rms(o: Tensor) -> Tensor:
    """1 / root mean square over the last dimension, which is kept."""
    return (o.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()


NORM_EPS = 1e-6
"""Under the root of a normalised read: one of zeros stays zero."""

_TINY = 1e-30
"""Under roots of squares: the root has no derivative at 0."""


class _WithSlope(torch.autograd.Function):
    """σ(z) and σ′(z), of which only z and σ′(z) are kept, and σ″(z) is made again."""

    generate_vmap_rule = True

    @staticmethod
    def forward(z: Tensor, name: str) -> tuple[Tensor, Tensor]:
        if name == "gelu":  # kernels of torch's own: of so many steps each would be a pass
            return torch.nn.functional.gelu(z), torch.ops.aten.gelu_backward(torch.ones_like(z), z)
        s = z.sigmoid()
        a = z * s
        return a, torch.addcmul(s, a, 1 - s)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, str], output: tuple[Tensor, Tensor]) -> None:
        z, ctx.name = inputs
        ctx.save_for_backward(z, output[1])

    @staticmethod
    def backward(ctx: Any, to_value: Tensor, to_slope: Tensor) -> tuple[Tensor, None]:
        z, slope = ctx.saved_tensors
        if ctx.name == "gelu":
            square = z.square()
            curve = (-0.5 * square).exp() * (2 - square) / math.sqrt(2 * math.pi)
        else:
            s = z.sigmoid()
            curve = (1 - s) * (s + slope - z * s * s)
        return torch.addcmul(to_value * slope, to_slope, curve), None


def _silu(z: Tensor) -> tuple[Tensor, Tensor]:
    return _WithSlope.apply(z, "silu")


def _gelu(z: Tensor) -> tuple[Tensor, Tensor]:
    return _WithSlope.apply(z, "gelu")


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
