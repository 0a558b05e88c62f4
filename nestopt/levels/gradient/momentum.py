"""Gradient descent with memory: momentum, and momentum by the delta rule."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.clock import advance, start
from nestopt.core.device import number_like
from nestopt.core.level import Level
from nestopt.core.memories import rows
from nestopt.core.mixing import plus
from nestopt.core.order import Node
from nestopt.core.part import Gate, Number
from nestopt.core.scale import length
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient import fused
from nestopt.levels.gradient.fused import Memories, Numbers, Tensors
from nestopt.levels.gradient.within import nodes_of_momentum


class Momentum(Level):
    r"""A memory of gradients (NL eq. 10-13, 33).

    $$m \leftarrow \beta m + (1-\mathrm{dampening})\,g, \qquad u = m \quad(\text{nesterov: } g + \beta m)$$

    Convention: with the default `dampening=0` this is a *sum* (as in `torch.optim.SGD`), whose length tends to
    1/(1-β) gradients; `dampening=beta` makes it an average. No hidden Nesterov. On tokens it is linear attention with
    decay β (RetNet). Without Nesterov it equals `AssociativeMemory(memory=vector, objective=dot, retention=decay(β))`.

    Args:
        beta: decay β, 0 or more (a `Gate` on tokens). Default 0.9.
        dampening: of each new gradient. Default 0.
        nesterov: look ahead along the new gradient. Default False.
        undamped_start: take the first gradient whole whatever `dampening`, as `torch.optim.SGD` does. Default False.
    """

    momentum_field: ClassVar[str | None] = "beta"
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"momentum": "dot"}

    beta: Number = 0.9
    dampening: Number = 0.0
    nesterov: bool = False
    undamped_start: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0)

    @property
    def steady_gain(self) -> Number:
        return _less(self.beta) / _less(self.dampening)

    def init(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        m = plus(self.beta * state["momentum"], grad, 1 - self.dampening)  # type: ignore[operator]
        if self.undamped_start:
            first = signal.step == 1
            m = torch.where(first, grad, m) if isinstance(first, Tensor) else grad if first else m
        return (plus(grad, m, self.beta) if self.nesterov else m), {"momentum": m}

    @property
    def averages(self) -> tuple[str, float, float] | None:
        if self.nesterov or self.undamped_start or self.period > 1:
            return None
        if not isinstance(self.beta, int | float) or not isinstance(self.dampening, int | float):
            return None
        return "momentum", self.beta, 1 - self.dampening

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        m, beta, dampening = state["momentum"], self.beta, self.dampening
        if isinstance(beta, Tensor | Gate) or isinstance(dampening, Tensor | Gate):
            return super().step_(grad, state, signal)
        if self.undamped_start and signal.step == 1:
            m.copy_(grad)
        elif dampening == 0:
            torch.add(grad, m, alpha=beta, out=m)
        elif dampening == beta:
            m.lerp_(grad, 1 - beta)
        else:
            m.mul_(beta).add_(grad, alpha=1 - dampening)
        return torch.add(grad, m, alpha=beta) if self.nesterov else m


def _step(
    level: Gd | Momentum, params: Tensors, grads: Tensors, memories: Memories, step: int | Tensors, numbers: Numbers
) -> bool:
    """Step by torch's kernel, as `fused.Kernel`s do."""
    lr, decay, coupled, maximize = numbers
    own = level if isinstance(level, Momentum) else Momentum(0.0)
    on_device = not isinstance(step, int)  # and whether a step is the first must be known on the host
    if decay or isinstance(own.beta, Tensor) or isinstance(own.dampening, Tensor) or (own.undamped_start and on_device):
        return False
    if own.beta == 0 and "momentum" in memories:  # which the kernel would not write
        return False
    torch._fused_sgd_(  # type: ignore[call-overload]
        params,
        grads,
        memories.get("momentum", []),
        weight_decay=coupled,
        momentum=own.beta,
        lr=lr,
        dampening=own.dampening,
        nesterov=own.nesterov,
        maximize=maximize,
        is_first_step=own.undamped_start and step == 1,
    )
    return True


fused.KERNELS |= {Gd: _step, Momentum: _step}


def _less(number: Number) -> float | Tensor:
    """Return 1 - number, of a gate its initial value."""
    return 1 - (number.init if isinstance(number, Gate) else number)


class DeltaMomentum(Level):
    r"""Momentum that forgets along what it is shown: a gradient step on ½‖m gᵀ - P‖² (NL eq. 48-49).

    $$m \leftarrow \beta m - s\,(m\hat g^\top)\hat g + P(g), \qquad \hat g = g/\lVert g\rVert_F, \qquad u = m$$

    A tensor of more than two dimensions is seen as `[out, rest]`, a vector as one row. Convention: a sum, as
    `momentum`. With P = `gd` (the default), β = ζ = 1 and `normalize=None` it is
    `AssociativeMemory(memory=matrix, objective=l2)`; on tokens, with unit keys and values and ζ = 1, DeltaNet.

    Args:
        beta: decay β in [0, 1]. Default 0.9.
        zeta: strength of the forgetting, ζ >= 0; 1 is as printed. Default 1.
        normalize: `"clip"` (default): s = min(1, ζ‖g‖²), eq. 49 to the letter where it can't diverge. `"unit"`:
            s = min(1, ζ) whatever the gradient's length. None: s = ζ‖g‖², the letter, which diverges for long
            gradients.
        elementwise: keep only the diagonal of ĝᵀĝ with the tensor as one row: entry i fades by s ĝ_i².
        P: what the memory is to answer with, any level. Default `gd`: the gradient itself.
    """

    momentum_field: ClassVar[str | None] = "beta"
    requires: ClassVar[frozenset[str]] = frozenset({"shape"})
    objectives: ClassVar[dict[str, str]] = {"momentum": "l2"}

    beta: Number = 0.9
    zeta: Number = 1.0
    normalize: Literal["clip", "unit"] | None = "clip"
    elementwise: bool = False  # type: ignore[misc]  # what a class says of itself is read from the class
    P: Level = dataclasses.field(default_factory=Gd)

    reads_param: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0)
        self.check("zeta", 0.0)
        self.check_choice("normalize", ("clip", "unit", None))

    def init(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param), "P": start(self.P, param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        m, g = state["momentum"], rows(grad)
        zeta = share = number_like(self.zeta, g)
        if self.normalize:
            norm = length(g)
            g = g / norm
            reach = zeta * norm * norm if self.normalize == "clip" else zeta  # perhaps infinite
            share = reach.clamp(max=1.0)
            signal.report("clips", lambda: (reach > 1).to(g.dtype))
        if self.elementwise:
            forget = m * g.reshape(grad.shape).square()
        else:
            mr = m.reshape(g.shape)
            # the same product either way round; the smaller Gram matrix is the cheaper
            forget = ((mr @ g.mT) @ g if g.shape[0] <= g.shape[1] else mr @ (g.mT @ g)).reshape(grad.shape)
        value, inner = advance(self.P, grad, state["P"], signal.inside("P"))
        m = self.beta * m - share * forget + value
        return m, {"momentum": m, "P": inner}

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        return nodes_of_momentum(self, self.P, name, period, after)
