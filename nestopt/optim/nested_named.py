"""Optimizers by name that torch does not have: each is one level, its fields the settings of parameter groups."""

from __future__ import annotations

import inspect
import re
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
from nestopt.optim.layer_inputs.uses import Scale
from nestopt.optim.optimizer import Nested
from nestopt.optim.options import OnNonfinite

COMMON = {
    "params": "named or in groups.",
    "lr": "step size. Default 1e-3.",
    "weight_decay": "decoupled, of the parameters. Default 0.",
    "maximize": "ascend instead.",
    "on_nonfinite": "as in `Nested`.",
    "model": "whose linear and convolution layers to watch; a parameter whose inputs are not seen takes plain steps,\n"
    "        and is named in a warning.",
    "loss_scale": "as in `Nested.watch`.",
}
"""What arguments mean that are no fields of a level."""


class OfLevel(Nested):
    """An optimizer whose groups hold the fields of one level, so that a group may have its own, and a schedule change
    them. What a class does not say of its arguments, its level does.

    Attributes:
        made_of: the level.
        fields: the field that an argument of `__init__` is, by its name.
        former: what arguments were by default where a checkpoint does not name them.
    """

    made_of: ClassVar[type[Level]]
    fields: ClassVar[dict[str, str]]
    former: ClassVar[dict[str, Any]]

    def __init_subclass__(cls, of: type[Level] | None = None, **called: str) -> None:
        super().__init_subclass__()
        if of is None:  # a user's own, which is derived from one of these
            return
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        cls.made_of, cls.fields = of, {name: called.get(name, name) for name in names if name not in COMMON}
        cls.former = {name: of.former_defaults[key] for name, key in cls.fields.items() if key in of.former_defaults}
        told = _arguments(of) | COMMON | _arguments(cls)
        words = [f"    {name}: {told[name if name in told else called[name]]}" for name in names]
        matrices = ", or a parameter that is not a matrix" if "matrix" in of.requires else ""
        head = inspect.cleandoc(cls.__doc__ or "").partition("\n\nArgs:")[0]
        raises = f"Raises:\n    ValueError: a value out of range{matrices}."
        cls.__doc__ = "\n".join([head, "", "Args:", *words, "", raises])

    def level(self, group: dict[str, Any]) -> Level:
        return super().level(
            {**group, "stack": self.made_of(**{field: group[field] for field in self.fields.values()})}
        )


def _arguments(cls: type) -> dict[str, str]:
    """Return what the docstring of a class says of each argument."""
    section = inspect.cleandoc(cls.__doc__ or "").partition("\nArgs:\n")[2].partition("\n\n")[0]
    found = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5}.*)*)", section, re.MULTILINE)
    return {name: text for names, text in found for name in names.split(", ")}


class M3(OfLevel, of=M3Level, period="slow_period"):
    """Multi-scale momentum Muon: the level `m3`, decoupled weight decay. Matrices only.

    Args:
        lr: of directions as long as Muon's. Default 1e-3.
        period: steps between two reads of the slow memory. Default 16.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.95, 0.999, 0.9),
        alpha: float | None = None,
        period: int = 16,
        steps: int = 5,
        eps: float = 1e-6,
        mode: Literal["direction", "ema", "paper"] = "direction",
        weight_decay: float = 0.0,
        *,
        coefficients: str | tuple[float, float, float] = QUINTIC,
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        given = {self.fields.get(key, key): value for key, value in locals().items()}
        self._start_with(given)


class DeltaMomentum(OfLevel, of=DeltaMomentumLevel):
    """Momentum by the delta rule: the level `delta_momentum`, decoupled weight decay.

    Args:
        lr: of a sum of gradients, as SGD's with momentum. Default 1e-3.
    """

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
        self._start_with(locals())


class DeepMomentum(OfLevel, of=DeepMomentumLevel):
    """Deep momentum (DMGD): the level `deep_momentum`, an MLP per tensor as the memory of its gradients.

    Args:
        lr: of directions as long as an average of gradients. Default 1e-3.
        hidden: width of the MLP. Default min(rows, columns) of the tensor.
        activation: of the MLP. Default `"silu"`.
        rule: the level by which the MLP learns, or a spec of one. Default `adam(betas=(0.9, 0.99))`.
        step_size: of that rule. Default 0.001.
        keep: the share of the MLP's weights that a step keeps. Default 0.999.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        hidden: int | None = None,
        activation: Literal["silu", "gelu", "relu", "tanh", "identity"] = "silu",
        rule: Any = None,
        step_size: float = 0.001,
        keep: float = 0.999,
        weight_decay: float = 0.0,
        *,
        beta: float = 0.9,
        mode: Literal["next", "paper"] = "next",
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
    ) -> None:
        rule = DeepMomentumLevel().rule if rule is None else build("level", rule, "rule")
        self._start_with(locals())

    def level(self, group: dict[str, Any]) -> Level:
        level = DeepMomentumLevel(
            memory=Mlp(hidden=group["hidden"], activation=group["activation"], residual=False),
            rule=build("level", group["rule"], "rule"),
            step_size=group["step_size"],
            retention=Decay(group["keep"]),
            beta=group["beta"],
            mode=group["mode"],
        )
        return Nested.level(self, {**group, "stack": level})


class Shampoo(OfLevel, of=ShampooLevel):
    """Shampoo: the level `shampoo`, decoupled weight decay. Matrices only."""

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
        self._start_with(locals())


class DGD(OfLevel, of=Dgd):
    """Delta gradient descent: the level `dgd`, told what the layers of `model` are shown.

    Args:
        of: the level whose direction is changed, or a spec of one. Default `"gd"`.
    """

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
        mode: Literal["corrected", "paper"] = "corrected",
        maximize: bool = False,
        on_nonfinite: OnNonfinite = "ignore",
        loss_scale: Scale | None = None,
    ) -> None:
        of = build("level", of, "of")
        self._start_with({key: value for key, value in locals().items() if key not in ("model", "loss_scale")})
        if model is not None:
            self.watch(model, loss_scale)

    def level(self, group: dict[str, Any]) -> Level:
        return super().level({**group, "of": build("level", group["of"], "of")})
