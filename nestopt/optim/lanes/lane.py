"""What all lanes have in common: their members, the step count these share, and the slow exact way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from itertools import repeat
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from nestopt.core.clock import advance_, apply_, due
from nestopt.core.inputs import Inputs
from nestopt.core.level import Level
from nestopt.core.signal import Note, Signal
from nestopt.core.tree import State, leaves
from nestopt.optim.views import Split, advance_stack_, back, matrix_view, work_dtype

Shown = Callable[[Tensor], Inputs | None]

STEP, SUM = "step", "group_sum"
"""The optimizer's own state keys: how often it has seen a gradient, and what a group with a period has summed."""


@dataclasses.dataclass(frozen=True)
class Rates:
    """How the gradients of one group reach its level, and the directions its parameters.

    Attributes:
        lr: a number, or a tensor without dimensions.
        decay: decoupled weight decay.
        coupled: weight decay that is added to the gradient.
        maximize: ascend.
        period: of the group.
    """

    lr: float | Tensor
    decay: float = 0.0
    coupled: float = 0.0
    maximize: bool = False
    period: int = 1

    @property
    def plain(self) -> bool:
        """Whether the level is shown the gradient as it is."""
        return not self.maximize and not self.coupled

    def gradient(self, grad: Tensor, param: Tensor) -> Tensor:
        """What the level is shown; `grad` stays as it is."""
        if self.maximize:
            grad = -grad
        return grad.add(param, alpha=self.coupled) if self.coupled else grad

    def apply(self, param: Tensor, direction: Tensor) -> None:
        """`param ← (1 - lr · decay) param - lr · direction`, in place."""
        apply_(param, direction, self.lr, self.decay)


class Member:
    """One parameter of a lane, its state as the optimizer keeps it (flat keys), and as its level made it (a tree)."""

    def __init__(self, param: Tensor, state: dict[str, Any], layout: State, view: Split | None = None) -> None:
        self.param, self.state, self.view = param, state, view
        self.tree = placed(layout, state)

    def keep(self, leaves_by_path: dict[str, Tensor]) -> None:
        """Keep the state in these tensors from now on; they hold its numbers already."""
        self.state.update(leaves_by_path)
        self.tree = placed(self.tree, self.state)


def placed(tree: State, leaves_by_path: dict[str, Any], prefix: str = "") -> State:
    """`tree` with other leaves, given by their dotted paths."""
    found: State = {}
    for key, value in tree.items():
        path = prefix + key
        found[key] = placed(value, leaves_by_path, f"{path}.") if isinstance(value, dict) else leaves_by_path[path]
    return found


class Lane:
    """Members that take their steps together. Subclasses do so faster; this one goes from tensor to tensor.

    Args:
        level: what they run. Its numbers may change from step to step; what it is made of may not.
        members: with equal step counts, on one device, in one dtype.
    """

    def __init__(self, level: Level, members: Sequence[Member]) -> None:
        self.members = list(members)
        self.params = [member.param for member in members]
        self.states = [member.state for member in members]
        self.count: Tensor = members[0].state[STEP].clone()  # one for all, since they count alike
        for state in self.states:
            state[STEP] = self.count
        self.note_leaves()

    def note_leaves(self) -> None:
        """Take down which tensors the states are made of, to see when someone else replaces one."""
        trees = [dict(leaves(member.tree)) for member in self.members]
        self._leaves = {path: [tree[path] for tree in trees] for path in trees[0]}

    def intact(self) -> bool:
        """Whether the states of all members are still the tensors that this lane knows."""
        try:
            return all(map(is_, map(itemgetter(STEP), self.states), repeat(self.count))) and all(
                all(map(is_, map(itemgetter(path), self.states), known)) for path, known in self._leaves.items()
            )
        except KeyError:
            return False

    def leave(self) -> None:
        """Give every member a step count of its own again."""
        for state in self.states:
            if state.get(STEP) is self.count:
                state[STEP] = self.count.clone()

    def step(
        self,
        level: Level,
        grads: Sequence[Tensor],
        rates: Rates,
        inputs: Shown | None = None,
        notes: Sequence[Note] | None = None,
    ) -> None:
        """One step of every member.

        `inputs` gives what the layer of a parameter was shown, and is asked when that parameter's level acts. With
        `notes`, one for each member, levels report, one tensor at a time.
        """
        self.count += 1
        step = int(self.count)
        if rates.period > 1:
            sums = self._sums()
            torch._foreach_add_(sums, [grad.to(total.dtype) for grad, total in zip(grads, sums, strict=True)])
            if not due(step, rates.period):
                return
            grads, step = sums, step // rates.period
        if notes is None and inputs is None:
            self.move(level, grads, rates, step)
        else:
            nothing: list[None] = [None] * len(self.members)
            shown = [inputs(param) for param in self.params] if inputs else nothing
            self.each(level, grads, rates, step, shown, notes or nothing)
        if rates.period > 1:
            torch._foreach_zero_(self._sums())

    def move(self, level: Level, grads: Sequence[Tensor], rates: Rates, step: int) -> None:
        """Write the gradients into the memories, and step the parameters."""
        nothing: list[None] = [None] * len(self.members)
        self.each(level, grads, rates, step, nothing, nothing)

    def each(
        self,
        level: Level,
        grads: Sequence[Tensor],
        rates: Rates,
        step: int,
        inputs: Sequence[Inputs | None],
        notes: Sequence[Note | None],
    ) -> None:
        """`move`, one tensor after another."""
        grown = False
        for member, grad, shown, note in zip(self.members, grads, inputs, notes, strict=True):
            grown |= _alone(level, member, grad, rates, Signal(step, lr=rates.lr, inputs=shown, note=note))
        if grown:
            self.note_leaves()

    def _sums(self) -> list[Tensor]:
        for member in self.members:
            if SUM not in member.state:
                member.state[SUM] = torch.zeros_like(member.param, dtype=work_dtype(member.param))
        return [member.state[SUM] for member in self.members]


def _alone(level: Level, member: Member, grad: Tensor, rates: Rates, signal: Signal) -> bool:
    """One step of one member; says whether its state has grown."""
    param = member.param
    # a narrow parameter is stepped in the wide dtype and rounded once
    wide = param if param.dtype == work_dtype(param) else param.to(work_dtype(param))
    grad = rates.gradient(grad.to(wide.dtype), wide)
    view = member.view
    seen = matrix_view(grad, level, view)
    run = advance_ if view is None else advance_stack_
    direction = run(level, seen, member.tree, dataclasses.replace(signal, param=matrix_view(wide, level, view)))
    check_shape(level, direction, seen)
    grown = {path: leaf for path, leaf in leaves(member.tree) if member.state[path] is not leaf}
    member.state.update(grown)
    rates.apply(wide, back(direction.to(wide.dtype), wide, view))
    if wide is not param:
        param.copy_(wide)
    return bool(grown)


def check_shape(level: Level, direction: Tensor, grad: Tensor) -> None:
    """Raise ValueError if what a level has returned is no direction for `grad`."""
    if direction.shape != grad.shape:
        raise ValueError(
            f"{level.label}: step returned a direction of shape {tuple(direction.shape)} for a gradient of shape "
            f"{tuple(grad.shape)}; they must be the same"
        )
