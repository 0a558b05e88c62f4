"""Optimizers by torch's names, with torch's constructors, flags and numbers: change the import and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.level import Level
from nestopt.levels.gradient.adam import Adam as AdamLevel
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.gradient.muon import Muon as MuonLevel
from nestopt.levels.gradient.muon import Scale
from nestopt.levels.gradient.newton_schulz import QUINTIC, Form
from nestopt.optim.optimizer import Nested
from nestopt.optim.views import work_dtype


class AsTorch(Nested):
    """An optimizer with the constructor of torch's of the same name."""

    takes_complex: ClassVar[bool] = True

    def _start_with(self, given: Mapping[str, Any], **more: Any) -> None:
        if given.get("differentiable"):
            raise ValueError(
                f"nestopt.optim.{type(self).__name__}: differentiable=True is not allowed, as its steps are in place; "
                "to differentiate through steps use nestopt.optim.functional_step"
            )
        unused = ("foreach", "fused", "differentiable")  # the kernels are torch's where it has one
        super()._start_with({key: value for key, value in given.items() if key not in unused}, **more)


class SGD(AsTorch):
    """`torch.optim.SGD`: the level `momentum` (or `gd`), coupled weight decay. Arguments, defaults and results as
    there; `foreach` and `fused` change nothing: it is torch's fused kernel where there is one.

    Raises:
        ValueError: a value out of range; nesterov without momentum, or with dampening.
    """

    renamed: ClassVar[dict[str, str]] = {"momentum_buffer": "momentum"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if momentum < 0:
            raise ValueError(f"momentum={momentum!r} is not allowed; give a number, 0 or more")
        self._start_with(locals())

    def level(self, group: dict[str, Any]) -> Level:
        if group["momentum"] == 0:
            return Gd()
        return Momentum(group["momentum"], group["dampening"], group["nesterov"], undamped_start=True)

    def complete(self, state: dict[str, Any], param: Tensor) -> None:
        # a schedule may begin without momentum: it starts then from nothing
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param, dtype=work_dtype(param))

    def coupled(self, group: dict[str, Any]) -> bool:
        return True


class Adam(AsTorch):
    """`torch.optim.Adam`: the level `adam`, coupled weight decay unless `decoupled_weight_decay`. Arguments, defaults
    and results as there; `foreach` and `fused` change nothing: it is torch's fused kernel where there is one.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
    ) -> None:
        self._start_with(locals())

    def level(self, group: dict[str, Any]) -> Level:
        return AdamLevel(tuple(group["betas"]), group["eps"], amsgrad=group["amsgrad"])

    def coupled(self, group: dict[str, Any]) -> bool:
        return not group["decoupled_weight_decay"]


class AdamW(Adam):
    """`torch.optim.AdamW`: the level `adam` with decoupled weight decay. Arguments, defaults and results as there;
    `foreach` and `fused` change nothing: it is torch's fused kernel where there is one.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._start_with(locals(), decoupled_weight_decay=True)


class Muon(AsTorch):
    """`torch.optim.Muon`: the level `muon`, decoupled weight decay. Arguments and defaults as there. Matrices only.

    Newton-Schulz runs in the form of fewest FLOPs, and in bfloat16 where the hardware multiplies in it, else in
    float32: its rounding is another than torch's, which works in bfloat16 always (a percent of the direction's length).
    `ns_form="standard"` does as torch does, for the same numbers.

    Raises:
        ValueError: a value out of range, or a parameter that is not a matrix.
    """

    renamed: ClassVar[dict[str, str]] = {"momentum_buffer": "momentum"}

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: Scale | None = None,
        *,
        ns_form: Form = "auto",
    ) -> None:
        self._start_with(locals(), maximize=False)

    def level(self, group: dict[str, Any]) -> Level:
        return MuonLevel(
            group["momentum"],
            group["nesterov"],
            group["ns_steps"],
            tuple(group["ns_coefficients"]),
            group["adjust_lr_fn"] or "original",
            group["eps"],
            dtype="bfloat16" if group["ns_form"] == "standard" else None,
            form=group["ns_form"],
        )
