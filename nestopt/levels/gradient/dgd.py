"""Delta gradient descent: a layer's weights as a memory of what the layer was shown (NL eq. 54-57, Def. 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad as gradient_of

from nestopt.core.associative import Gd
from nestopt.core.clock import advance, advance_, start
from nestopt.core.device import number_like
from nestopt.core.inputs import INPUTS, InputRequest, LayerInputs, MemoryInputs
from nestopt.core.level import Level
from nestopt.core.objectives import L2, Dot, Objective
from nestopt.core.order import Node
from nestopt.core.part import FieldError, Number
from nestopt.core.retentions import Keep, Retention
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.within import nodes_within, warn_of_mode


class _OnLayers(Level):
    """A level on the weights of layers, told what these were shown."""

    requires: ClassVar[frozenset[str]] = frozenset({"shape", INPUTS})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period > 1:
            problem = "is not allowed: a clock sums gradients, not inputs; give the parameter group the period"
            raise FieldError(self.label, "period", self.period, problem)

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        raise ValueError(f"{self.label} can't run on tokens: it needs a layer's inputs; use it on gradients")

    def rate(self, signal: Signal) -> float | Tensor:
        """Return the optimizer's learning rate, which the step depends on."""
        if signal.lr is None:
            raise ValueError(
                f"{self.label} needs a learning rate and the weight of a layer: it runs in an optimizer, "
                "not as the rule of another level's memory"
            )
        return signal.lr


class Dgd(_OnLayers):
    r"""Delta gradient descent: a layer's weights learn what they answer, corrected by the error (NL eq. 54-57).

    With $X$ the n rows that a layer's weight `W [out, in]` was multiplied with and $u_0$ the direction of `of`,

    $$u = u_0\,\big(I + \mathrm{lr}\,\delta\, X^\top X/n\big)^{-1},$$

    so that with `of=gd()` it is the delta rule's proximal step to the values $W x_i - n d_i/\delta$, exact for a batch:

    $$W \leftarrow \arg\min_V\ \mathrm{mean}_i \tfrac\delta2\lVert V x_i - (W x_i - n d_i/\delta)\rVert^2
      + \tfrac1{2\,\mathrm{lr}}\lVert V - W\rVert^2, \qquad d_i = \partial L/\partial y_i.$$

    For one row it is the normalised delta step (NLMS), $u = u_0/(1 + \mathrm{lr}\,\delta\lVert x\rVert^2)$. It rests
    where `of` does. Along what a layer is shown most, a step takes off 1/δ of the error at the most, whatever the
    learning rate. Convention: of the gradient's own size, shorter for long inputs; δ = 0 is `of` itself.

    `mode="paper"` is eq. 57 to the letter, whose values are $-n d_i$ alone, so that what the weights answer decays:

    $$u = \frac{u_0 + \delta\, W X^\top X/n}{1 + \mathrm{lr}\,\delta\;\mathrm{mean}\lVert x\rVert^2}
      \quad(\text{explicit}),\qquad
      u = \big(u_0 + \delta\, W X^\top X/n\big)\big(I + \mathrm{lr}\,\delta\, X^\top X/n\big)^{-1}\quad(\text{exact}),$$

    both eq. 57 for one row, without its assumption that ‖x‖ = 1. On least squares it rests at $W^*/(1+\delta)$, and it
    does not train a classifier at δ = 1. As the rule of a token memory, whose objective has values of its own, the
    decay is that of eq. 88 in both modes.

    The optimizer captures the inputs of `nn.Linear` and convolutions (`nestopt.optim.layer_inputs`), rows being tokens
    or patches; for a weight whose inputs were not seen it is `of`. State: that of `of`. Cost: the products of a layer's
    rows with each other and a system of min(n, in) equations a step. Only on gradients.

    Args:
        of: the level whose direction is changed. Default `gd`.
        delta: δ >= 0, the strength. Default 1.
        solver: of the paper's step, `"explicit"` (default: one product of the weight's size per use of the layer), or
            `"exact"`. The corrected step is exact always.
        normalize_inputs: use x/‖x‖ for x in all of the above but the gradient. Default False.
        mode: `"corrected"` (default) or `"paper"`.

    Raises:
        ValueError: delta < 0, another solver or mode, a period above 1 (inputs are not summed by a clock), a use on
            tokens or as a memory's rule.
    """

    former_defaults: ClassVar[Mapping[str, Any]] = {"mode": "paper"}

    of: Level = dataclasses.field(default_factory=Gd)
    delta: Number = 1.0
    solver: Literal["explicit", "exact"] = "explicit"
    normalize_inputs: bool = False
    mode: Literal["corrected", "paper"] = "corrected"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("delta", 0.0)
        self.check_choice("solver", ("explicit", "exact"))
        self.check_choice("mode", ("corrected", "paper"))
        if self.mode == "paper" and self.wants is not None:
            warn_of_mode(self, "eq. 57 to the letter: weights decay along their inputs, and a classifier hardly trains")

    @property
    def wants(self) -> InputRequest | None:
        """Ask for sums over a layer's inputs; for none where δ = 0."""
        if isinstance(self.delta, int | float) and self.delta == 0:
            return None
        if self.mode == "corrected":
            return InputRequest(wxx=False, normalize=self.normalize_inputs, gram=True)
        return InputRequest(normalize=self.normalize_inputs, gram=self.solver == "exact")

    @property
    def steady_gain(self) -> Number:
        return self.of.steady_gain

    @property
    def forgets_scale(self) -> bool:
        return self.of.forgets_scale

    def init(self, param: Tensor) -> State:
        return {"of": start(self.of, param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, of = advance(self.of, grad, state["of"], signal.inside("of"))
        return self._decayed(direction, signal), {"of": of}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return self._decayed(advance_(self.of, grad, state["of"], signal.inside("of")), signal)

    def _decayed(self, direction: Tensor, signal: Signal) -> Tensor:
        if self.wants is None:
            return direction
        strength, inputs = self.rate(signal) * self.delta, signal.inputs  # type: ignore[operator]
        if inputs is None:
            return direction
        if self.mode == "corrected" and not isinstance(inputs, MemoryInputs):
            return _divide(direction, inputs, strength)
        if inputs.wxx is None or inputs.mean_square is None:
            return direction
        total = torch.add(direction, self.delta * inputs.wxx.reshape(direction.shape))  # type: ignore[operator]
        if self.solver == "exact":
            return _divide(total, inputs, strength)
        square = inputs.mean_square
        return total / (1 + strength * (square.reshape(-1, *(1,) * (total.ndim - 1)) if square.ndim else square))

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        inner = nodes_within(self.of, f"{name}.of", period, after)
        needs = tuple(node.name for node in inner) or after
        return [*inner, Node(name, period, needs, memory="none", objective="", rule=self.label)]


def _divide(total: Tensor, inputs: LayerInputs, strength: float | Tensor) -> Tensor:
    """Return total (I + strength · XᵀX/n)⁻¹, by Woodbury's identity where there are fewer rows than columns."""
    square = inputs.gram if inputs.gram is not None else inputs.rows
    if square is None:
        raise ValueError("dgd's exact step needs the Gram matrix of the layer's inputs, which were summed without it")
    if total[0].numel() != square.shape[-1]:
        raise ValueError(
            f"dgd's exact step must be shown a weight as [out, in], and its shape is {list(total.shape)} for inputs of "
            f"{square.shape[-1]}; give its group a view, nestopt.optim.Split(1, transposed=True)"
        )
    groups = len(square) if square.ndim == 3 else 1
    u = total.reshape(groups, -1, square.shape[-1])
    if inputs.gram is not None:
        u = _solve(strength * inputs.gram, u)
    else:
        u = u - strength * _solve(strength * square @ square.mT, u @ square.mT) @ square
    return u.reshape(total.shape)


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Return right (I + matrix)⁻¹ for a positive semi-definite matrix."""
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    # it is positive definite unless it is not finite, and then the result is not, either: no need to wait and ask
    factor, _ = torch.linalg.cholesky_ex(matrix + eye)
    return torch.cholesky_solve(right.mT, factor.expand(*right.shape[:-2], *eye.shape)).mT


Value = Literal["surprise", "sign", "normalized"] | Callable[..., Tensor]


class Ggd(_OnLayers):
    r"""Generalised gradient descent: weights that learn self-made values by any objective (NL Def. 5).

    $$W \leftarrow \mathrm{retain}(W) - \mathrm{lr}\cdot\mathrm{mean}_i\,\nabla_W\,\ell(W x_i, v_i), \qquad
      v_i = \mathrm{value}(s_i), \quad s_i = n\,\partial L/\partial y_i$$

    over the n rows $x_i$ (tokens or patches) that a layer's weight `W [out, in]` was multiplied with; $s_i$ is the
    local surprise of a mean loss, n the rows of one use. With `value="surprise"` the objective `dot` is gradient
    descent and `l2` the numerator of `dgd`'s explicit step; both use the gradient as the optimizer has it.

    Other objectives and values are summed in the backward pass, from $\partial L/\partial y$ as it comes there: what
    is done to gradients later (clipping, `maximize`) does not reach them. `"sign"` and `"normalized"` forget its
    scale; for others a scaled loss (GradScaler's, or 1/k for k micro-batches) has to be told to the optimizer's
    watcher (`loss_scale`), and float16 layers are refused without. Cost: two products of the weight's size per use of
    the layer; none for `dot`, one for `l2`. For a weight whose inputs were not seen the gradient takes the place of
    the mean. No state. Only on gradients.

    Args:
        objective: ℓ, of `W x [..., out]` and v. Default `l2`.
        value: v by row: `"surprise"` -s, `"sign"` -sign(s), `"normalized"` -s/‖s‖, or a function of s `[..., out]`.
        retention: what is kept of W each step. Default all.

    Raises:
        ValueError: another value, a period above 1, a use on tokens or as a memory's rule.
    """

    objective: Objective = dataclasses.field(default_factory=L2)
    value: Value = "surprise"
    retention: Retention = dataclasses.field(default_factory=Keep)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.value):
            self.check_choice("value", tuple(_VALUES))
        if type(self.retention).write is not Retention.write:
            problem = "is not allowed: it is of a memory that it writes itself; give keep or decay"
            raise FieldError(self.label, "retention", self.retention, problem)

    @property
    def wants(self) -> InputRequest | None:
        """Ask for sums over a layer's inputs; for none where the gradient says it all."""
        if self.value == "surprise" and type(self.objective) is Dot:
            return None
        if self.value == "surprise" and type(self.objective) is L2:
            return InputRequest()
        return InputRequest(wxx=False, grad=self.errors, scale_free=self.value in ("sign", "normalized"))

    def errors(self, y: Tensor, surprise: Tensor) -> Tensor:
        """Return ∇_y ℓ(y, v) of outputs and local surprises `[..., out]`, by row."""
        value = self.value if callable(self.value) else _VALUES[self.value]
        v = value(surprise)
        return gradient_of(lambda y: self.objective(y, v))(y)

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        lr, inputs, wants = self.rate(signal), signal.inputs, self.wants
        direction = grad
        if inputs is not None and wants is not None:
            if wants.grad is not None and inputs.grad is not None:
                direction = inputs.grad.reshape(grad.shape)
            elif inputs.wxx is not None:
                direction = grad + inputs.wxx.reshape(grad.shape)
        if isinstance(self.retention, Keep) or signal.param is None:
            return direction, state
        # the optimizer takes off lr·u: at lr = 0 nothing moves, and nothing fades
        lost = signal.param - self.retention(signal.param)
        rate = number_like(lr, lost)
        return direction + torch.where(rate > 0, lost / torch.where(rate > 0, rate, 1), 0), state


_VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "surprise": torch.neg,
    "sign": lambda s: -s.sign(),
    "normalized": lambda s: -torch.nn.functional.normalize(s, dim=-1, eps=1e-30),
}

__all__ = ["Dgd", "Ggd"]
