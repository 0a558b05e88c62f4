"""The tensors of a model as its optimizer has them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.config import Config
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.models.build import build_model
from nestopt.optim import optimizer as make_optimizer
from nestopt.optim.sharded import units
from nestopt.optim.sharded.owners import owners, step_cost
from nestopt.optim.views import Split
from nestopt.train.planning.sharing import Sharing
from nestopt.train.planning.steps import Stepped, dry_step


@dataclasses.dataclass(frozen=True)
class Group:
    """A parameter group: its settings, and the shapes of its tensors by name."""

    settings: Mapping[str, Any]
    shapes: Mapping[str, torch.Size]

    @property
    def level(self) -> Level:
        return bind(self.settings["stack"])

    @property
    def view(self) -> Split | None:
        return None if self.level.is_elementwise else self.settings.get("view")

    def costs(self) -> dict[str, float]:
        """Return what a step of each tensor costs its owner; nothing where tensors need not be whole."""
        if self.level.is_elementwise:
            return {}
        return {name: step_cost(self.level, shape, self.view) for name, shape in self.shapes.items()}


@dataclasses.dataclass(frozen=True)
class Parts:
    """All groups of a run's optimizer."""

    groups: Sequence[Group]

    def __post_init__(self) -> None:
        self._known: dict[tuple[int, tuple[torch.Size, ...], torch.dtype], Stepped]
        object.__setattr__(self, "_known", {})

    @classmethod
    def of(cls, config: Config) -> Parts:
        """Route the tensors of the configuration's model as `nestopt.optimizer` does."""
        with FakeTensorMode():
            built = make_optimizer(build_model(config.model), config)
        found = []
        for group in built.param_groups:
            settings = {key: value for key, value in group.items() if key not in ("params", "param_names", "why")}
            shapes = {name: p.shape for name, p in zip(group["param_names"], group["params"], strict=True)}
            found.append(Group(settings, shapes))
        return cls(found)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        return {name: shape for group in self.groups for name, shape in group.shapes.items()}

    @property
    def numel(self) -> int:
        return sum(shape.numel() for shape in self.shapes.values())

    def costs(self) -> dict[str, float]:
        """Return the costs of all tensors that are stepped whole."""
        return {name: cost for group in self.groups for name, cost in group.costs().items()}

    def owners(self, world: int) -> dict[str, int]:
        """Return the owner of each tensor that is stepped whole."""
        return owners(self.costs(), world)

    def step(self, sharing: Sharing, rank: int = 0, owner: Mapping[str, int] | None = None) -> Stepped:
        """Return what the process `rank` does in a step: all, or its own whole tensors and slices of the others."""
        total = Stepped()
        for i, group in enumerate(self.groups):
            settings, shapes = group.settings, group.shapes
            if sharing.spreads_states and group.level.is_elementwise:
                settings = {key: value for key, value in settings.items() if key != "view"}
                shapes = {name: torch.Size([sharing.part(s.numel(), rank)]) for name, s in shapes.items()}
            elif sharing.spreads_states:
                assert owner is not None
                every = {name: tuple(shape) for name, shape in shapes.items()}
                for names in units.rounds(every, owner, sharing.world, units.LIMIT):
                    mine = {name: shapes[name] for name in names if owner[name] == rank}
                    total = total + self._step(i, settings, mine, sharing.stepped)
                continue
            total = total + self._step(i, settings, shapes, sharing.stepped)
        return total

    def _step(
        self, index: int, settings: Mapping[str, Any], shapes: Mapping[str, torch.Size], dtype: torch.dtype
    ) -> Stepped:
        """Return `dry_step`, once for all processes whose tensors have the same shapes."""
        order = sorted(shapes, key=lambda name: shapes[name])
        key = index, tuple(shapes[name] for name in order), dtype
        if key not in self._known:
            numbered = {str(i): shapes[name] for i, name in enumerate(order)}
            self._known[key] = dry_step(settings, numbered, dtype)
        found = self._known[key]
        return dataclasses.replace(found, states={order[int(i)]: state for i, state in found.states.items()})
