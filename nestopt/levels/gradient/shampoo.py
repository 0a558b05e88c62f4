"""Preconditioners that see a gradient as a matrix: matrix AdaGrad and Shampoo (NL eq. 106-111)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.order import Node
from nestopt.core.part import FINITE, FieldError
from nestopt.core.scale import largest, square_limit
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.matrix_root import inverse_root
from nestopt.levels.gradient.within import check_whole, refuse_unused

Side = Literal["left", "right"]
SIDES: tuple[Side, ...] = ("left", "right")


class MatrixPreconditioner(Level):
    """What `matrix_adagrad` and `shampoo` share: an average of gradients, between inverse roots of Gram matrices."""

    momentum_field: ClassVar[str | None] = "beta"
    requires: ClassVar[frozenset[str]] = frozenset({"matrix", FINITE})
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    beta: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-6
    mode: Literal["sum", "ema"] = "sum"
    bias_correction: bool = True
    root_every: int = 10
    max_size: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0, closed="[)")
        self.check("beta2", 0.0, 1.0, closed="[)")
        self.check("eps", 0.0, closed="(]")
        self.check_choice("mode", ("sum", "ema"))
        check_whole(self, "root_every", "max_size")
        if self.mode == "sum":
            refuse_unused(self, ("beta2",), "mode='sum'")

    @abstractmethod
    def sides(self) -> Sequence[Side]:
        """Return the sides that are preconditioned, where `max_size` allows."""

    @property
    def forgets_scale(self) -> bool:
        return True

    def init(self, param: Tensor) -> State:
        state: State = {"momentum": torch.zeros_like(param)} if self.beta else {}
        for side in self.sides():
            size = param.shape[-2 if side == "left" else -1]
            size = size if size <= self.max_size else 0  # the keys are the same for parameters of every shape
            state[side] = {"gram": param.new_zeros(size, size), "root": param.new_zeros(size, size)}
        if param.numel() and not kept(state):
            problem = (
                f"leaves nothing to precondition of a parameter of shape {tuple(param.shape)}; "
                "raise it, or give that parameter another stack"
            )
            raise FieldError(self.label, "max_size", self.max_size, problem)
        return state

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        grad, fine = in_range(grad)
        new: State = {}
        if self.beta:
            new["momentum"] = torch.lerp(state["momentum"], grad, (1 - self.beta) * fine)
        add = torch.addmm if grad.ndim == 2 else torch.baddbmm
        keep, take = self._weights
        new |= {side: state[side] for side in self.sides()}
        for side in kept(state):
            x = grad if side == "left" else grad.mT
            gram = state[side]["gram"] if keep == 1 else state[side]["gram"] * (1 - (1 - keep) * fine)
            gram = add(gram, x, x.mT, alpha=take)
            new[side] = {"gram": gram, "root": self._root(gram, state, side, signal)}
        return self._read(grad, new, signal, fine), new

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        grad, fine = in_range(grad)
        if self.beta:
            state["momentum"].lerp_(grad, (1 - self.beta) * fine)
        keep, take = self._weights
        for side in kept(state):
            x, gram = grad if side == "left" else grad.mT, state[side]["gram"]
            add = gram.addmm_ if grad.ndim == 2 else gram.baddbmm_
            if keep != 1:
                gram.mul_(1 - (1 - keep) * fine)
            add(x, x.mT, alpha=take)
            root = self._root(gram, state, side, signal)
            if root is not state[side]["root"]:
                state[side]["root"].copy_(root)
        return self._read(grad, state, signal, fine)

    @property
    def _weights(self) -> tuple[float, float]:
        """Return the weights of what a Gram matrix holds, and of a new product."""
        return (self.beta2, 1 - self.beta2) if self.mode == "ema" else (1.0, 1.0)

    def _root(self, gram: Tensor, state: State, side: Side, signal: Signal) -> Tensor:
        old: Tensor = state[side]["root"]
        # while there are few gradients, each changes the roots a great deal
        now = (signal.step <= self.root_every) | ((signal.step - 1) % self.root_every == 0)
        if now is False:
            return old
        if self.mode == "ema" and self.bias_correction:
            gram = signal.debias(gram, self.beta2)
        new = inverse_root(gram, 2 * len(kept(state)), self.eps)
        return torch.where(now, new, old) if isinstance(now, Tensor) else new

    def _read(self, grad: Tensor, state: State, signal: Signal, fine: Tensor) -> Tensor:
        m = state["momentum"] if self.beta else grad
        for side in kept(state):
            root = state[side]["root"]
            m = root @ m if side == "left" else m @ root
        return m * (signal.debias(fine, self.beta) if self.beta and self.bias_correction else fine)

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        every = period * self.period
        found = [Node(f"{name}.momentum", every, after, "vector", "dot", self.label)] if self.beta else []
        sides = [Node(f"{name}.{side}", every, after, "matrix", "l2 to g gᵀ", self.label) for side in self.sides()]
        return [*found, *sides]


def in_range(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Return each matrix, shortened to what has a Gram matrix in its dtype, and 1 `[..., 1, 1]`, or zeros and 0."""
    size = largest(grad, (-2, -1))
    fine = size.isfinite()
    return torch.where(fine, grad * (square_limit(grad) / size).clamp(max=1.0), 0.0), fine.to(grad.dtype)


def kept(state: State) -> list[Side]:
    """Return the sides that a state has a preconditioner for."""
    return [side for side in SIDES if side in state and state[side]["gram"].shape[-1]]


class MatrixAdagrad(MatrixPreconditioner):
    r"""AdaGrad with a full matrix for one side (NL eq. 106-109). Matrices only.

    $$H \leftarrow H + g g^\top, \qquad m \leftarrow \beta m + (1-\beta) g, \qquad
      u = H^{-1/2}\, \frac{m}{1-\beta^t}$$

    As H only grows, steps shrink as in AdaGrad, which it is where H is diagonal. Convention: an average.
    The first direction for `beta=0` has all its singular values near 1.

    Args:
        beta: decay β of the average in [0, 1); 0 keeps none. Default 0.9.
        beta2: decay of H for `mode="ema"`, in [0, 1). Default 0.999.
        eps: ε > 0: $\epsilon\lambda_{\max}(H)$ is added to the diagonal. Default 1e-6.
        mode: `"sum"`, as printed (default), or `"ema"`: $H \leftarrow \beta_2 H + (1-\beta_2) g g^\top$.
        bias_correction: divide the averages by 1 - β^t. Default True.
        root_every: steps between two calculations of the root, after the first `root_every` steps, which each have
            their own. The root is state: a run that is resumed has the same. Default 10.
        max_size: the longest side whose matrix is kept. Default 8192.
        side: `"left"` as printed (default), or `"right"`: $u = m\,(\sum g^\top g)^{-1/2}$.

    Raises:
        FieldError: a value out of range; `beta2` given for a sum; at `init`, a side longer than `max_size`.
    """

    side: Side = "left"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("side", ("left", "right"))

    def sides(self) -> Sequence[Side]:
        return (self.side,)


class Shampoo(MatrixPreconditioner):
    r"""Shampoo (Gupta et al. 2018; NL eq. 110-111). Matrices only.

    $$L \leftarrow L + g g^\top, \quad R \leftarrow R + g^\top g, \quad m \leftarrow \beta m + (1-\beta) g, \qquad
      u = L^{-1/4}\, \frac{m}{1-\beta^t}\, R^{-1/4}$$

    Convention: an average; with the default `mode="sum"` steps shrink as in AdaGrad. The first direction for `beta=0`
    is the gradient with all its singular values near 1, as Muon's. State: 2(m² + n²) numbers for an `[m, n]` matrix,
    and mn for the average.

    Args:
        beta: decay β of the average in [0, 1); 0 keeps none. Default 0.9.
        beta2: decay of L and R for `mode="ema"`, in [0, 1). Default 0.999.
        eps: ε > 0: $\epsilon\lambda_{\max}$ of each is added to its diagonal. Default 1e-6.
        mode: `"sum"`, as printed (default), or `"ema"`: $L \leftarrow \beta_2 L + (1-\beta_2) g g^\top$.
        bias_correction: divide the averages by 1 - β^t. Default True.
        root_every: steps between two calculations of the roots, after the first `root_every` steps, which each have
            their own. The roots are state: a run that is resumed has the same. Default 10.
        max_size: a side longer than this is left alone, and the other's root is then $L^{-1/2}$, which keeps the size
            of the direction. Default 8192.

    Raises:
        FieldError: a value out of range; `beta2` given for a sum; at `init`, both sides longer than `max_size`.
    """

    def sides(self) -> Sequence[Side]:
        return ("left", "right")
