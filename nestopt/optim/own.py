"""Optimizers by name that torch does not have: each is one level, its fields the settings of parameter groups."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn

from nestopt.config.spec import build
from nestopt.core.level import Level
from nestopt.core.memories import Mlp
from nestopt.core.retentions import Decay
from nestopt.levels.gradient.dgd import Dgd
from nestopt.levels.gradient.m3 import M3 as M3Level
from nestopt.levels.gradient.momentum import DeltaMomentum as DeltaMomentumLevel
from nestopt.levels.gradient.newton_schulz import QUINTIC
from nestopt.levels.gradient.shampoo import Shampoo as ShampooLevel
from nestopt.levels.presets import DeepMomentum as DeepMomentumLevel
from nestopt.optim.inputs import Scale
from nestopt.optim.optimizer import Nested, OnNonfinite, StepOptions


class OfLevel(Nested):
    """An optimizer whose groups hold the fields of one level, so that a group may have its own, and a schedule change
    them.
    """

    made_of: ClassVar[type[Level]]

    def _make(
        self,
        params: Iterable[Any],
        lr: float | Tensor,
        weight_decay: float,
        maximize: bool,
        on_nonfinite: OnNonfinite,
        **fields: Any,
    ) -> None:
        self._own = tuple(fields)
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, **fields}
        self._start(params, defaults, StepOptions(on_nonfinite=on_nonfinite))

    def level(self, group: dict[str, Any]) -> Level:
        return self.made_of(**{key: group[key] for key in self._own})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_own": self._own}


class M3(OfLevel):
    """Multi-scale momentum Muon: the level `m3`, decoupled weight decay. Matrices only.

    Args:
        params: matrices, named or in groups.
        lr: of directions as long as Muon's. Default 1e-3.
        betas: β1, β2, β3 of the fast memory, the second moment and the slow memory. Default (0.95, 0.999, 0.9).
        alpha: weight of the slow memory. Default 0.5.
        period: steps between two reads of the slow memory. Default 16.
        steps, coefficients: of Newton-Schulz. Default 5 and Jordan's quintic.
        eps: added to the root of the second moment. Default 1e-8.
        mode: `"ema"` (default) or `"paper"`, Algorithm 1 as printed.
        weight_decay: decoupled. Default 0.
        maximize: ascend instead.
        on_nonfinite: as in `Nested`.

    Raises:
        ValueError: a value out of range, or a parameter that is not a matrix.
    """

    made_of: ClassVar[type[Level]] = M3Level

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.95, 0.999, 0.9),
        alpha: float = 0.5,
        period: int = 16,
        steps: int = 5,
        eps: float = 1e-8,
        mode: Literal["ema", "paper"] = "ema",
        weight_decay: float = 0.0,
        *,
        coefficients: str | tuple[float, float, float] = QUINTIC,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        own = {"betas": betas, "alpha": alpha, "slow_period": period, "steps": steps, "eps": eps, "mode": mode}
        self._make(params, lr, weight_decay, maximize, on_nonfinite, **own, coefficients=coefficients)


class DeltaMomentum(OfLevel):
    """Momentum by the delta rule: the level `delta_momentum`, decoupled weight decay.

    Args:
        params: named or in groups.
        lr: of a sum of gradients, as SGD's with momentum. Default 1e-3.
        beta: decay. Default 0.9.
        zeta: strength of the forgetting. Default 1.
        normalize: `"clip"` (default), `"unit"` or None; see the level.
        weight_decay: decoupled. Default 0.
        maximize: ascend instead.
        on_nonfinite: as in `Nested`.

    Raises:
        ValueError: a value out of range.
    """

    made_of: ClassVar[type[Level]] = DeltaMomentumLevel

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        zeta: float = 1.0,
        normalize: Literal["clip", "unit"] | None = "clip",
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        own = {"beta": beta, "zeta": zeta, "normalize": normalize}
        self._make(params, lr, weight_decay, maximize, on_nonfinite, **own)


class DeepMomentum(OfLevel):
    """Deep momentum (DMGD): the level `deep_momentum`, an MLP per tensor as the memory of its gradients.

    Args:
        params: named or in groups.
        lr: of directions about as long as the gradient. Default 1e-3.
        hidden: width of the MLP. Default min(rows, columns) of the tensor.
        activation: of the MLP. Default `"silu"`.
        rule: the level by which the MLP learns, or a spec of one. Default `adam(betas=(0.9, 0.99))`.
        step_size: of that rule. Default 0.02.
        keep: the share of the MLP's weights that a step keeps. Default 0.999.
        weight_decay: decoupled, of the parameters. Default 0.
        maximize: ascend instead.
        on_nonfinite: as in `Nested`.

    Raises:
        ValueError: a value out of range.
    """

    made_of: ClassVar[type[Level]] = DeepMomentumLevel

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        hidden: int | None = None,
        activation: Literal["silu", "gelu", "relu", "tanh", "identity"] = "silu",
        rule: Any = None,
        step_size: float = 0.02,
        keep: float = 0.999,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        rule = DeepMomentumLevel().rule if rule is None else build("level", rule, "rule")
        own = {"hidden": hidden, "activation": activation, "rule": rule, "step_size": step_size, "keep": keep}
        self._make(params, lr, weight_decay, maximize, on_nonfinite, **own)

    def level(self, group: dict[str, Any]) -> Level:
        return DeepMomentumLevel(
            memory=Mlp(hidden=group["hidden"], activation=group["activation"], residual=False),
            rule=build("level", group["rule"], "rule"),
            step_size=group["step_size"],
            retention=Decay(group["keep"]),
        )


class Shampoo(OfLevel):
    """Shampoo: the level `shampoo`, decoupled weight decay. Matrices only.

    Args:
        params: matrices, named or in groups.
        lr: step size. Default 1e-3.
        beta: decay of the average of gradients; 0 keeps none. Default 0.9.
        beta2: decay of the preconditioners for `mode="ema"`. Default 0.999.
        eps: relative to the largest eigenvalue, added to the diagonal. Default 1e-6.
        mode: `"sum"` (default) or `"ema"`.
        root_every: steps between two calculations of the roots. Default 10.
        max_size: a longer side is left alone. Default 8192.
        weight_decay: decoupled. Default 0.
        maximize: ascend instead.
        on_nonfinite: as in `Nested`.

    Raises:
        ValueError: a value out of range, or a parameter that is not a matrix.
    """

    made_of: ClassVar[type[Level]] = ShampooLevel

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        beta: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-6,
        mode: Literal["sum", "ema"] = "sum",
        root_every: int = 10,
        max_size: int = 8192,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        own = {"beta": beta, "beta2": beta2, "eps": eps, "mode": mode, "root_every": root_every, "max_size": max_size}
        self._make(params, lr, weight_decay, maximize, on_nonfinite, **own)


class DGD(OfLevel):
    """Delta gradient descent: the level `dgd`, told what the layers of `model` are shown.

    Args:
        params: named or in groups.
        lr: step size. Default 1e-3.
        model: whose linear and convolution layers to watch; a parameter whose inputs are not seen takes plain steps,
            and is named in a warning.
        of: the level whose direction is changed, or a spec of one. Default `"gd"`.
        delta: strength of the decay. Default 1.
        solver: `"explicit"` (default) or `"exact"`.
        normalize_inputs: use x/‖x‖. Default False.
        weight_decay: decoupled. Default 0.
        maximize: ascend instead.
        on_nonfinite: as in `Nested`.
        loss_scale: as in `Nested.watch`.

    Raises:
        ValueError: a value out of range.
    """

    made_of: ClassVar[type[Level]] = Dgd

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        model: nn.Module | None = None,
        of: Any = "gd",
        delta: float = 1.0,
        solver: Literal["explicit", "exact"] = "explicit",
        normalize_inputs: bool = False,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
        loss_scale: Scale | None = None,
    ) -> None:
        own = {"of": build("level", of, "of"), "delta": delta, "solver": solver, "normalize_inputs": normalize_inputs}
        self._make(params, lr, weight_decay, maximize, on_nonfinite, **own)
        if model is not None:
            self.watch(model, loss_scale)

    def level(self, group: dict[str, Any]) -> Level:
        of = build("level", group["of"], "of")
        return Dgd(of, group["delta"], group["solver"], group["normalize_inputs"])
