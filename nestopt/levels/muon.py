"""Muon: momentum read through Newton-Schulz orthogonalisation (NL eq. 42, 52)."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.outputs import Output
from nestopt.core.part import FieldError, Number
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.kernels.newton_schulz import QUINTIC, newton_schulz

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64, "float16": torch.float16}


def _check(part: NewtonSchulz | NewtonSchulzOutput | Muon) -> None:
    part.check("steps", 0, 99)
    part.coefficients = tuple(part.coefficients)  # type: ignore[assignment]
    if len(part.coefficients) != 3:
        raise FieldError(part.label, "coefficients", part.coefficients, "is not allowed; give three numbers (a, b, c)")
    part.check_choice("dtype", (None, *DTYPES))


class NewtonSchulzOutput(Output):
    """A matrix memory read with its singular values brought near 1 (NL eq. 43-44, 52).

    Args: as the level `newton_schulz`.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})

    steps: int = 5
    coefficients: tuple[float, float, float] = QUINTIC
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    def __call__(self, read: Tensor) -> Tensor:
        return newton_schulz(read, self.steps, self.coefficients, dtype=DTYPES.get(self.dtype or "")).to(read.dtype)


class NewtonSchulz(Level):
    r"""Orthogonalise: `steps` steps of descent on ‖OᵀO - I‖² started at g (NL eq. 43-44). Matrices only; no state.

    Convention: the direction has spectral norm about 1 whatever the gradient's size.

    Args:
        steps: iterations. Default 5.
        coefficients: (a, b, c) of aX + b(XXᵀ)X + c(XXᵀ)²X. Default: Jordan's quintic.
        dtype: to iterate in, by name. Default: that of `nestopt.kernels.newton_schulz.work_dtype`: bfloat16 where the
            hardware multiplies in it.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})
    batched: ClassVar[bool] = True

    steps: int = 5
    coefficients: tuple[float, float, float] = QUINTIC
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self)

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction = newton_schulz(grad, self.steps, self.coefficients, dtype=DTYPES.get(self.dtype or ""))
        return direction.to(grad.dtype), state


class Muon(Level):
    r"""Muon (Jordan et al. 2024), hidden matrices only.

    $$m \leftarrow \beta m + (1-\beta)\,g, \qquad u = c\cdot\mathrm{NewtonSchulz}(m \text{ or } (1-\beta)g + \beta m)$$

    Convention: an average (orthogonalising forgets its scale), Nesterov by default, singular values of u about c.

    Args:
        beta: decay in [0, 1]. Default 0.95.
        nesterov: default True.
        steps, coefficients, dtype: of `newton_schulz`.
        scale: c, by shape `[m, n]`. `"original"` (default): √max(1, m/n). `"match_rms_adamw"`: 0.2 √max(m, n), which
            lets a learning rate tuned for AdamW serve. None: 1.
        eps: least norm divided by. Default 1e-7.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})
    batched: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"momentum": "dot"}

    beta: Number = 0.95
    nesterov: bool = True
    steps: int = 5
    coefficients: tuple[float, float, float] = QUINTIC
    scale: Literal["original", "match_rms_adamw"] | None = "original"
    eps: float = 1e-7
    dtype: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0)
        _check(self)
        self.check_choice("scale", ("original", "match_rms_adamw", None))

    def init(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        m = torch.lerp(state["momentum"], grad, 1 - self.beta)  # type: ignore[operator]
        seen = torch.lerp(grad, m, self.beta) if self.nesterov else m  # type: ignore[arg-type]
        direction = newton_schulz(seen, self.steps, self.coefficients, self.eps, DTYPES.get(self.dtype or ""))
        return self.factor(*grad.shape[-2:]) * direction.to(grad.dtype), {"momentum": m}

    def factor(self, out: int, into: int) -> float:
        """c for a matrix `[out, into]`."""
        if self.scale == "original":
            return math.sqrt(max(1.0, out / into))
        return 0.2 * math.sqrt(max(out, into)) if self.scale else 1.0
