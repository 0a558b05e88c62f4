"""Links of a chain without a memory: what they make of a direction depends on it and on the parameter alone."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.clock import advance, advance_, start
from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import PARAM, FieldError, Number
from nestopt.core.scale import length, root_mean_square
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.adam import Adam
from nestopt.levels.gradient.within import param_of

SHAPE = frozenset({"shape"})


def _rest(x: Tensor) -> tuple[int, ...] | None:
    """Return the dimensions of one output's weights: all but the first; None, which is all, of a vector."""
    return tuple(range(1, x.ndim)) if x.ndim > 1 else None


class Clip(Level):
    r"""Shorten what is too long. No state; in a chain it clips what the levels before it give.

    $$u = g\,\min\Big(1, \frac{c}{\lVert g\rVert}\Big), \qquad u = \mathrm{clamp}(g, -c, c), \qquad
      u_i = g_i\,\min\Big(1, \frac{c\,\max(\lVert W_i\rVert, \epsilon)}{\lVert g_i\rVert}\Big)$$

    A norm here is that of one tensor. That of all gradients together is no level's to know, as it needs all parameters,
    of all processes, before the first one is stepped: `torch.nn.utils.clip_grad_norm_` before `step`, or `train.clip`.

    Args:
        limit: c > 0. Default 1.
        by: `"norm"` of the tensor (default), its `"rms"`, `"value"` of each entry, or `"adaptive"`: each output's norm
            relative to that of its weights W_i (AGC, Brock et al. 2021), vectors as one.
        eps: least norm of weights, for `by="adaptive"`. Default 1e-3.

    Raises:
        FieldError: a number out of range, or `by="global"`.
        ValueError: `by="adaptive"` where there is no parameter, as on tokens.
    """

    elementwise: ClassVar[bool] = True

    limit: float = 1.0
    by: str = "norm"  # so that "global" is refused in the same words from YAML
    eps: float = 1e-3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("limit", 0.0, closed="(]")
        self.check("eps", 0.0, closed="(]")
        if self.by == "global":
            problem = (
                "is not a level's to do: it takes the gradients of all parameters, of all processes; call "
                "torch.nn.utils.clip_grad_norm_ before the step (nestopt train: train.clip), or give 'norm', 'rms', "
                "'value' or 'adaptive'"
            )
            raise FieldError(self.label, "by", self.by, problem)
        self.check_choice("by", ("norm", "rms", "value", "adaptive"))

    @property
    def needs(self) -> frozenset[str]:
        own = {"value": frozenset(), "adaptive": SHAPE | {PARAM}}
        return super().needs | own.get(self.by, SHAPE)

    @property
    def is_elementwise(self) -> bool:
        return self.by == "value" and super().is_elementwise

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        if self.by == "value":
            return grad.clamp(-self.limit, self.limit), state
        if self.by == "adaptive":
            allowed = self.limit * length(param_of(self, signal, "adaptive clipping"), _rest(grad)).clamp_min(self.eps)
            return grad * (allowed / length(grad, _rest(grad))).clamp_max(1.0), state
        size = length(grad) if self.by == "norm" else root_mean_square(grad)
        return grad * (self.limit / size).clamp_max(1.0), state


class Centralize(Level):
    r"""Take the mean off each output's gradient (gradient centralization, Yong et al. 2020). No state.

    $$u_i = g_i - \mathrm{mean}(g_i)$$

    Vectors stay as they are.
    """

    requires: ClassVar[frozenset[str]] = SHAPE

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return (grad - grad.mean(_rest(grad), keepdim=True) if grad.ndim > 1 else grad), state


class Normalize(Level):
    r"""Bring a direction to one length, whatever it was. No state.

    $$u = c\,\frac{g}{\lVert g\rVert} \quad\text{or}\quad u = c\,\frac{g}{\mathrm{rms}(g)}$$

    Zeros stay zeros.

    Args:
        to: c >= 0. Default 1.
        by: `"norm"` (default) or `"rms"`.
        over: the `"tensor"` (default), or each of its `"rows"`, one an output; a vector is one row.
    """

    requires: ClassVar[frozenset[str]] = SHAPE

    to: float = 1.0
    by: Literal["norm", "rms"] = "norm"
    over: Literal["tensor", "rows"] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("to", 0.0)
        self.check_choice("by", ("norm", "rms"))
        self.check_choice("over", ("tensor", "rows"))

    @property
    def forgets_scale(self) -> bool:
        return True

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        size = length if self.by == "norm" else root_mean_square
        return self.to * (grad / size(grad, _rest(grad) if self.over == "rows" else None)), state


class Sign(Level):
    """Keep the sign of each entry: `u = sign(g)`; 0 stays 0. No state."""

    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    reads_param: ClassVar[bool] = False

    @property
    def forgets_scale(self) -> bool:
        return True

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return grad.sign(), state


class WeightDecay(Level):
    r"""Add the parameter's decay to a direction, wherever it stands in a chain: $u = g + \lambda W$. No state.

    First in a chain it is L2 regularisation, last the decoupled decay of AdamW (times the learning rate), in between it
    is seen by what follows, as by LAMB's `trust_ratio`.

    Args:
        rate: λ >= 0. Default 0.01.

    Raises:
        ValueError: where there is no parameter, as on tokens.
    """

    requires: ClassVar[frozenset[str]] = frozenset({PARAM})
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    rate: Number = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("rate", 0.0)

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return grad + self.rate * param_of(self, signal, "weight decay"), state  # type: ignore[operator]


class TrustRatio(Level):
    r"""Make a direction as long as the parameter: the ratio of LARS (You et al. 2017) and LAMB (2020). No state.

    $$u = c\,\frac{\min(\lVert W\rVert, w)}{\lVert g\rVert + \epsilon}\,g$$

    The ratio is 1 where the parameter or the direction is zero, so that what starts at 0 is moved.

    Args:
        coefficient: c > 0; LARS's is 0.001. Default 1.
        limit: w > 0, the largest norm of a parameter that counts. Default None: any.
        eps: ε >= 0. Default 0.

    Raises:
        FieldError: a number out of range.
        ValueError: where there is no parameter, as on tokens.
    """

    requires: ClassVar[frozenset[str]] = SHAPE | {PARAM}

    coefficient: float = 1.0
    limit: float | None = None
    eps: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("coefficient", 0.0, closed="(]")
        self.check("eps", 0.0)
        if self.limit is not None:
            self.check("limit", 0.0, closed="(]")

    @property
    def forgets_scale(self) -> bool:
        return True

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        weight, size, least = length(param_of(self, signal, "the ratio")), length(grad), torch.finfo(grad.dtype).tiny
        ratio = self.coefficient * weight.clamp_max(self.limit if self.limit is not None else torch.inf)
        ratio = ratio / (size + self.eps)
        return grad * torch.where((weight > least) & (size > least), ratio, 1.0), state


class Cautious(Level):
    r"""Leave out the entries in which a level's direction and the gradient disagree (Liang et al. 2024).

    $$u = \frac{n}{\lvert\{i : d_i g_i > 0\}\rvert + 1}\; d\odot[d\odot g > 0], \qquad d = \mathrm{of}(g)$$

    It keeps nothing of its own. The gradient is what this level is shown; n is how many entries the tensor has.

    Args:
        of: the level whose direction is masked. Default `adam`.
        rescale: make up for what is left out, as above. Default True.
    """

    elementwise: ClassVar[bool] = True

    of: Level = dataclasses.field(default_factory=Adam)
    rescale: bool = True

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | SHAPE if self.rescale else super().needs

    @property
    def is_elementwise(self) -> bool:
        return not self.rescale and super().is_elementwise

    @property
    def rates_as(self) -> str:
        return self.of.rates_as

    @property
    def forgets_scale(self) -> bool:
        return self.of.forgets_scale

    def init(self, param: Tensor) -> State:
        return {"of": start(self.of, param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, of = advance(self.of, grad, state["of"], signal.inside("of"))
        return self._masked(direction, grad), {"of": of}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return self._masked(advance_(self.of, grad, state["of"], signal.inside("of")), grad)

    def _masked(self, direction: Tensor, grad: Tensor) -> Tensor:
        agrees = (direction.sign() * grad.sign() > 0).to(direction.dtype)  # the product itself may be out of range
        if self.rescale:
            agrees = agrees * (agrees.numel() / (agrees.sum() + 1))
        return direction * agrees

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        return self.of.nodes(f"{name}.of", period * self.period, after)


class GradientCorrection(Level):
    r"""Lead a gradient on by how it has changed: the variance reduction of MARS (Yuan et al. 2024).

    $$u_t = g_t + \gamma\,\frac{\beta}{1-\beta}\,(g_t - g_{t-1}), \qquad g_0 = 0$$

    It remembers one gradient. `mars` is it, clipped to length 1, before Adam.

    Args:
        gamma: γ >= 0. Default 0.025.
        beta: β of the average that follows, in [0, 1). Default 0.95.
    """

    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    reads_param: ClassVar[bool] = False
    objectives: ClassVar[dict[str, str]] = {"last": "the last gradient"}

    gamma: float = 0.025
    beta: float = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("gamma", 0.0)
        self.check("beta", 0.0, 1.0, closed="[)")

    def init(self, param: Tensor) -> State:
        return {"last": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        lead = self.gamma * self.beta / (1 - self.beta)
        return grad + lead * (grad - state["last"]), {"last": grad}
