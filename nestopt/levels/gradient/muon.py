"""Muon: momentum read through Newton-Schulz orthogonalisation (NL eq. 42, 52)."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.outputs import Output
from nestopt.core.part import FieldError, Number, Part
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.newton_schulz import QUINTIC, SETS, Form, newton_schulz

Scale = Literal["original", "match_rms_adamw", "spectral_unclamped"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64, "float16": torch.float16}


def check_iteration(part: Part) -> None:
    """Raise FieldError unless a part's fields `steps`, `coefficients`, `dtype` and `form` are what the kernel takes."""
    part.check("steps", 0, 99)
    coefficients = part.coefficients  # type: ignore[attr-defined]
    if isinstance(coefficients, str):
        part.check_choice("coefficients", SETS)
    else:
        part.coefficients = tuple(coefficients)  # type: ignore[attr-defined]
        if len(coefficients) != 3:
            problem = f"is not allowed; give three numbers (a, b, c) or one of {list(SETS)}"
            raise FieldError(part.label, "coefficients", coefficients, problem)
    part.check_choice("dtype", (None, *DTYPES))
    part.check_choice("form", get_args(Form))


def orthogonal(part: Any, x: Tensor, eps: float = 0.0, factor: float = 1.0, *, detached: bool = False) -> Tensor:
    """Iterate on `x`, in whose dtype the result is, as the fields of a part say, which `check_iteration` has checked.

    The last step multiplies by `factor`, but with form="standard", which rounds as `torch.optim.Muon` does.
    """
    late = factor if part.form == "standard" else 1.0
    dtype, form, factor = DTYPES.get(part.dtype or ""), part.form, factor / late
    read = newton_schulz(x, part.steps, part.coefficients, eps, dtype, form=form, detached=detached, factor=factor)
    return read.to(x.dtype) if late == 1 else read.to(x.dtype) * late


class NewtonSchulzOutput(Output):
    """A matrix memory read with its singular values brought near 1 (NL eq. 43-44, 52).

    Args: as the level `newton_schulz`.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})

    steps: int = 5
    coefficients: str | tuple[float, float, float] = QUINTIC
    dtype: str | None = None
    form: Form = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_iteration(self)

    def __call__(self, read: Tensor) -> Tensor:
        return orthogonal(self, read)


class NewtonSchulz(Level):
    r"""Orthogonalise: `steps` steps of descent on ‖OᵀO - I‖² started at g (NL eq. 43-44). Matrices only; no state.

    Convention: the direction has spectral norm about 1 whatever the gradient's size.

    Args:
        steps: iterations. Default 5.
        coefficients: (a, b, c) of aX + b(XXᵀ)X + c(XXᵀ)²X, or the name of a set: "quintic" (Jordan's, the default),
            "cubic" (1.5, -0.5, 0), "polar_express" (Amsel et al. 2025, its own (a, b, c) at each step).
        dtype: to iterate in, by name. Default: that of `nestopt.levels.gradient.newton_schulz.work_dtype`: bfloat16
            where the hardware multiplies in it.
        form: `"standard"`, as written; `"gram"`, by powers of the Gram matrix; `"auto"` (default): the faster one.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True

    steps: int = 5
    coefficients: str | tuple[float, float, float] = QUINTIC
    dtype: str | None = None
    form: Form = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_iteration(self)

    @property
    def forgets_scale(self) -> bool:
        return True

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return orthogonal(self, grad), state

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return orthogonal(self, grad, detached=True)


class Muon(Level):
    r"""Muon (Jordan et al. 2024), hidden matrices only.

    $$m \leftarrow \beta m + (1-\beta)\,g, \qquad u = c\cdot\mathrm{NewtonSchulz}(m \text{ or } (1-\beta)g + \beta m)$$

    Convention: an average (orthogonalising forgets its scale), Nesterov by default, singular values of u about c.

    Args:
        beta: decay in [0, 1]. Default 0.95.
        nesterov: default True.
        steps, coefficients, dtype, form: of `newton_schulz`.
        scale: c, by shape `[m, n]`. `"original"` (default): √max(1, m/n). `"match_rms_adamw"`: 0.2 √max(m, n), which
            lets a learning rate tuned for AdamW serve. `"spectral_unclamped"`: √(m/n). None: 1.
        eps: least norm divided by. Default 0: matrices of any size count alike.
    """

    momentum_field: ClassVar[str | None] = "beta"
    requires: ClassVar[frozenset[str]] = frozenset({"matrix"})
    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    objectives: ClassVar[dict[str, str]] = {"momentum": "dot"}

    beta: Number = 0.95
    nesterov: bool = True
    steps: int = 5
    coefficients: str | tuple[float, float, float] = QUINTIC
    scale: Scale | None = "original"
    eps: float = 0.0
    dtype: str | None = None
    form: Form = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0)
        check_iteration(self)
        self.check_choice("scale", (*get_args(Scale), None))

    def init(self, param: Tensor) -> State:
        return {"momentum": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        m = torch.lerp(state["momentum"], grad, 1 - self.beta)  # type: ignore[operator]
        seen = torch.lerp(grad, m, self.beta) if self.nesterov else m  # type: ignore[arg-type]
        return orthogonal(self, seen, self.eps, self.factor(*m.shape[-2:])), {"momentum": m}

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        if isinstance(self.beta, Tensor):
            return super().step_(grad, state, signal)
        m = state["momentum"].lerp_(grad, 1 - self.beta)  # type: ignore[operator]
        seen = torch.lerp(grad, m, self.beta) if self.nesterov else m  # type: ignore[arg-type]
        return orthogonal(self, seen, self.eps, self.factor(*m.shape[-2:]), detached=True)

    @property
    def rates_as(self) -> str:
        return "adam" if self.scale == "match_rms_adamw" else "muon"

    def factor(self, out: int, into: int) -> float:
        """Return c for a matrix `[out, into]`."""
        if self.scale == "match_rms_adamw":
            return 0.2 * math.sqrt(max(out, into))
        if self.scale == "spectral_unclamped":
            return math.sqrt(out / into)
        return math.sqrt(max(1.0, out / into)) if self.scale == "original" else 1.0
