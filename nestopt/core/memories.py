"""Where associations are kept: what the parameters of a memory are, and how it is read."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad as gradient_of

from nestopt.core.outputs import Output
from nestopt.core.part import Part
from nestopt.core.precision import matmul
from nestopt.core.scale import root_mean_square

Theta = dict[str, Tensor]
"""The parameters of one memory, by name."""


class Memory(Part):
    """A map from keys to values with parameters θ.

    On tokens, keys and values are vectors of the sequence. On gradients, `pairs` says which associations a gradient
    stands for and `direction` how the memory's state becomes an update.
    """

    kind: ClassVar[str] = "memory"
    linear: ClassVar[bool] = True
    """Linear in θ: an output then acts on θ (NL eq. 52), else on what is read."""
    outermost: ClassVar[str | None] = None
    """The name of the weight whose output is read, of a memory made of weights (`layers`)."""

    @abstractmethod
    def start(self, dim_k: int, dim_v: int, like: Tensor) -> Theta:
        """θ before the first token, on the device and in the dtype of `like`."""

    @abstractmethod
    def start_on(self, param: Tensor) -> Theta:
        """θ before the first gradient of a tensor like `param`."""

    @abstractmethod
    def read(self, theta: Theta, k: Tensor) -> Tensor:
        """M(k; θ): `[..., D_k] -> [..., D_v]`."""

    @abstractmethod
    def pairs(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys `[n, D_k]` and values `[n, D_v]` that `grad` is made of."""

    @abstractmethod
    def direction(self, theta: Theta, grad: Tensor, output: Output) -> Tensor:
        """Return what the optimizer steps along, in the shape of `grad`."""

    def learned_start(self, dim_k: int, dim_v: int) -> Theta:
        """Return what a layer learns as θ's start; empty where it is fixed at `start`."""
        return {}

    def append(self, theta: Theta, k: Tensor, v: Tensor) -> Theta | None:
        """θ with the pair appended, for a memory that keeps pairs as they are; None for one that a rule must write."""
        return None

    def layers(self, theta: Theta, k: Tensor) -> dict[str, tuple[Tensor, Tensor]] | None:
        r"""Return by weight the input a it meets at keys `[n, D_k]`, and its sensitivity j: `([n, in], [n])` each.

        j bounds $\lVert\partial M(k)/\partial(W a)\rVert$. Needed for the delta decay and the normalised step; None for
        a memory that is not made of weights.
        """
        return None


def rows(grad: Tensor) -> Tensor:
    """Return a gradient as rows, each a vector in the space of the layer's inputs: vectors are one row."""
    return grad.reshape(1, -1) if grad.ndim < 2 else grad.flatten(1)


class Vector(Memory):
    """A memory without keys: its read is θ. Its one association with a gradient is the gradient itself."""

    def start(self, dim_k: int, dim_v: int, like: Tensor) -> Theta:
        return {"m": like.new_zeros(dim_v)}

    def start_on(self, param: Tensor) -> Theta:
        return {"m": torch.zeros_like(param)}

    def read(self, theta: Theta, k: Tensor) -> Tensor:
        return theta["m"]

    def pairs(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad

    def direction(self, theta: Theta, grad: Tensor, output: Output) -> Tensor:
        return output(theta["m"])


class Matrix(Memory):
    """M k with M `[D_v, D_k]`.

    On a gradient `[out, in]` the keys are its rows and the value of row i is e_i, so that the `dot` objective writes
    the gradient itself (momentum) and `l2` the delta rule (NL eq. 48-49); the direction is M.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"shape"})
    outermost: ClassVar[str | None] = "m"

    def start(self, dim_k: int, dim_v: int, like: Tensor) -> Theta:
        return {"m": like.new_zeros(dim_v, dim_k)}

    def start_on(self, param: Tensor) -> Theta:
        return {"m": torch.zeros_like(rows(param))}

    def read(self, theta: Theta, k: Tensor) -> Tensor:
        return matmul(k, theta["m"].mT)

    def layers(self, theta: Theta, k: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        return {"m": (k, torch.ones_like(k[..., 0]))}

    def pairs(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        keys = rows(grad)
        return keys, torch.eye(len(keys), dtype=keys.dtype, device=keys.device)

    def direction(self, theta: Theta, grad: Tensor, output: Output) -> Tensor:
        return output(theta["m"]).reshape(grad.shape)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
    "identity": lambda z: z,
}


class Mlp(Memory):
    """k + W1 σ(W2 … σ(W_L k)): an MLP with a residual (NL eq. 89).

    On gradients, rows of the gradient scaled to unit RMS (over the tensor) are both keys and values, and the direction
    is the read at those rows, scaled back; W1 starts at 0 there, so that the first direction is the gradient.

    Args:
        hidden: width of the hidden layers. Default: 2 · D_k on tokens; min(rows, columns) on gradients,
            where a two-layer memory then has at most twice as many parameters as the tensor has entries.
        depth: number of weight matrices, 2 or more (1 with no hidden layer).
        activation: one of silu, gelu, relu, tanh, identity.
        residual: whether k is added to the read; needs D_k = D_v.
        norm: whether what W1 gives is divided by its root mean square; `"layer"`: its mean is taken off before, as in
            TTT, whose memory is k + norm(W1 σ(W2 k)) (Sun et al. 2024).
        bias: whether each layer's input has a last entry that is 1, so that the last column of each weight, which
            starts at 0, is a bias.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"shape"})
    linear: ClassVar[bool] = False
    outermost: ClassVar[str | None] = "W1"

    hidden: int | None = None
    depth: int = 2
    activation: Literal["silu", "gelu", "relu", "tanh", "identity"] = "silu"
    residual: bool = True
    norm: bool | Literal["layer"] = False
    bias: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("depth", 1)
        self.check_choice("activation", ACTIVATIONS)
        self.check_choice("norm", (False, True, "layer"))
        if self.hidden is not None:
            self.check("hidden", 1)

    def _weights(self, dim_k: int, dim_v: int, hidden: int, outer_scale: float, like: Tensor) -> Theta:
        if self.residual and dim_k != dim_v:
            raise ValueError(
                f"mlp: residual=True needs keys and values of one width, not {dim_k} and {dim_v}; give residual=False"
            )
        return {
            f"W{i}": self._with_bias(
                like.new_empty(sizes).normal_() * ((outer_scale if i == 1 else 1.0) / math.sqrt(sizes[1])),
                torch.zeros_like,
            )
            for i, sizes in enumerate(self._sizes(dim_v, hidden, dim_k), start=1)
        }

    @property
    def by_hand(self) -> bool:
        """Whether `nestopt.levels.deep.mlp` knows it."""
        return type(self) is Mlp and not self.bias

    def _sizes(self, dim_v: int, hidden: int, dim_k: int) -> list[tuple[int, int]]:
        """Return the shapes of W1, …, `(out, in)` without biases."""
        sizes = [dim_v, *[hidden] * (self.depth - 1), dim_k]
        return list(itertools.pairwise(sizes))

    def _with_bias(self, x: Tensor, last: Callable[[Tensor], Tensor] = torch.ones_like) -> Tensor:
        """Return x with a last column, of ones, where there are biases."""
        return torch.cat([x, last(x[..., :1])], dim=-1) if self.bias else x

    def _activation(self, i: int) -> Callable[[Tensor], Tensor]:
        """Return σ of what W_i gives, i > 1."""
        return ACTIVATIONS[self.activation]

    def start(self, dim_k: int, dim_v: int, like: Tensor) -> Theta:
        return self._weights(dim_k, dim_v, self.hidden or 2 * dim_k, 0.5, like)

    def learned_start(self, dim_k: int, dim_v: int) -> Theta:
        return self.start(dim_k, dim_v, torch.empty(()))

    def start_on(self, param: Tensor) -> Theta:
        n, width = rows(param).shape
        return self._weights(width, width, self.hidden or max(1, min(n, width)), 0.0, param)

    def read(self, theta: Theta, k: Tensor) -> Tensor:
        z = k
        for i in range(len(theta), 1, -1):
            z = self._activation(i)(matmul(self._with_bias(z), theta[f"W{i}"].mT))
        return self._finish(matmul(self._with_bias(z), theta["W1"].mT), k)

    def _finish(self, y: Tensor, k: Tensor) -> Tensor:
        """Return the read from what W1 gives at keys k."""
        if self.norm:
            y = self._centred(y)
            y = y * _inverse_rms(y)
        return k + y if self.residual else y

    def _centred(self, y: Tensor) -> Tensor:
        return y - y.mean(-1, keepdim=True) if self.norm == "layer" else y

    def _outer_sensitivity(self, y: Tensor) -> Tensor:
        """Return j of W1, which gives y."""
        return _inverse_rms(self._centred(y))[..., 0] if self.norm else torch.ones_like(y[..., 0])

    def layers(self, theta: Theta, k: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        a, found = self._with_bias(k), {}
        slopes: dict[str, Tensor] = {}
        for i in range(len(theta), 1, -1):
            act, z = self._activation(i), matmul(a, theta[f"W{i}"].mT)
            found[f"W{i}"] = a
            a, slopes[f"W{i}"] = self._with_bias(act(z)), gradient_of(lambda z: act(z).sum())(z)  # noqa: B023
        found["W1"] = a
        j = self._outer_sensitivity(matmul(a, theta["W1"].mT))
        sensitive = {"W1": j}
        for i in range(2, len(theta) + 1):
            slope = slopes[f"W{i}"]
            squares = slope.square() * theta[f"W{i - 1}"][..., : slope.shape[-1]].square().sum(-2)
            j = j * squares.sum(-1).clamp_min(1e-30).sqrt()  # the Frobenius norm of W diag(σ′)
            sensitive[f"W{i}"] = j
        return {name: (a, sensitive[name]) for name, a in found.items()}

    def pairs(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        unit = rows(grad) / root_mean_square(grad)
        return unit, unit

    def direction(self, theta: Theta, grad: Tensor, output: Output) -> Tensor:
        scale = root_mean_square(grad)
        return output(self.read(theta, rows(grad) / scale) * scale).reshape(grad.shape)


def _inverse_rms(y: Tensor) -> Tensor:
    return (y.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


FADED = "faded"
"""Key of the logarithm of what is left of each pair that is kept, where pairs fade."""


class Factored(Mlp):
    """An MLP of two layers whose weights are products of `rank`: k + W1 W2 σ(W3 W4 k) (the memory's low-rank form).

    Arguments: `mlp`; `depth` is not looked at.

    Args:
        rank: of both weights, 1 or more.
    """

    rank: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("rank", 1)

    def _sizes(self, dim_v: int, hidden: int, dim_k: int) -> list[tuple[int, int]]:
        return [(dim_v, self.rank), (self.rank, hidden), (hidden, self.rank), (self.rank, dim_k)]

    def _activation(self, i: int) -> Callable[[Tensor], Tensor]:
        return ACTIVATIONS[self.activation if i == 3 else "identity"]


class Swiglu(Mlp):
    """A gated MLP of two layers: k + W1 (σ(W2 k) ⊙ W3 k), with silu SwiGLU (Shazeer 2020).

    Arguments: `mlp`; `depth` is not looked at.
    """

    def _sizes(self, dim_v: int, hidden: int, dim_k: int) -> list[tuple[int, int]]:
        return [(dim_v, hidden), (hidden, dim_k), (hidden, dim_k)]

    def read(self, theta: Theta, k: Tensor) -> Tensor:
        opened, through = self._halves(theta, k)
        return self._finish(matmul(self._with_bias(self._activation(2)(opened) * through), theta["W1"].mT), k)

    def _halves(self, theta: Theta, k: Tensor) -> tuple[Tensor, Tensor]:
        a = self._with_bias(k)
        return matmul(a, theta["W2"].mT), matmul(a, theta["W3"].mT)

    def layers(self, theta: Theta, k: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        (opened, through), act = self._halves(theta, k), self._activation(2)
        value, slope = act(opened), gradient_of(lambda z: act(z).sum())(opened)
        a, h = self._with_bias(k), self._with_bias(value * through)
        j, columns = self._outer_sensitivity(matmul(h, theta["W1"].mT)), theta["W1"][..., : value.shape[-1]]

        def felt(by: Tensor) -> Tensor:
            squares = by.square() * columns.square().sum(-2)
            return j * squares.sum(-1).clamp_min(1e-30).sqrt()

        return {"W1": (h, j), "W2": (a, felt(slope * through)), "W3": (a, felt(value))}


class Window(Memory):
    """The last `size` pairs as they are, read by softmax attention, scale 1/√D_k (NL eq. 62-63).

    On gradients one pair is one whole gradient: its direction as the key, itself as the value; the direction is what
    the present gradient attends to among the last `size` (which must be given there: memory is `2 · size` tensors).

    Args:
        size: how many pairs are kept; None keeps all.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"shape"})
    linear: ClassVar[bool] = False

    size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size is not None:
            self.check("size", 1)

    def start(self, dim_k: int, dim_v: int, like: Tensor) -> Theta:
        return {"keys": like.new_zeros(0, dim_k), "values": like.new_zeros(0, dim_v)}

    def start_on(self, param: Tensor) -> Theta:
        if self.size is None:
            raise ValueError(
                "window: size=None keeps every pair, which on gradients would never stop growing; give size, such as 4"
            )
        return self.start(param.numel(), param.numel(), param)

    def read(self, theta: Theta, k: Tensor) -> Tensor:
        if theta["keys"].shape[-2] == 0:
            return theta["values"].new_zeros(*k.shape[:-1], theta["values"].shape[-1])
        scores = matmul(k, theta["keys"].mT) / math.sqrt(k.shape[-1])
        if FADED in theta:
            scores = scores + theta[FADED]
        return matmul(scores.softmax(-1), theta["values"])

    def append(self, theta: Theta, k: Tensor, v: Tensor) -> Theta:
        keys = torch.cat([theta["keys"], k.reshape(-1, theta["keys"].shape[-1])])
        values = torch.cat([theta["values"], v.reshape(-1, theta["values"].shape[-1])])
        if self.size is not None:
            keys, values = keys[-self.size :], values[-self.size :]
        return {"keys": keys, "values": values}

    def pairs(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        flat = grad.reshape(1, -1)
        # unit RMS, so that the score of a gradient with itself is √numel whatever its scale
        return flat / root_mean_square(flat), flat

    def direction(self, theta: Theta, grad: Tensor, output: Output) -> Tensor:
        return output(self.read(theta, self.pairs(grad)[0])[0].reshape(grad.shape))
