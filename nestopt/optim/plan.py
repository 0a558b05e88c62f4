"""Which lanes an optimizer's parameters run in: settled once, and anew when anything about them has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor

from nestopt.core.level import Level
from nestopt.core.part import Part
from nestopt.core.tree import State, leaves
from nestopt.optim.checkpoint import keeps_shape
from nestopt.optim.checks import check_gradients, names
from nestopt.optim.lanes import STEP, SUM, Lane, Member, lanes_for
from nestopt.optim.views import Split, begin, layout, work_dtype

RESTLESS = 3
"""After so many changes of which parameters have a gradient, states are no longer moved into common buffers."""

Fill = Callable[[dict[str, Any], Tensor], None]
Accept = Callable[[Level, Tensor, str], None]


@dataclasses.dataclass
class Share:
    """What one parameter group does in a step: its lanes, each with the places of its members among the gradients."""

    level: Level
    params: list[Tensor]
    shapes: list[torch.Size | None]
    """Of the gradients; None for a parameter without one."""
    lanes: list[tuple[Lane, list[int] | None]]

    def __post_init__(self) -> None:
        self._sizes = [param.numel() for param in self.params]

    def fits(self, params: list[Tensor], shapes: list[torch.Size | None]) -> bool:
        """Whether the group still has these parameters, and the same of them gradients, of the same shapes as then."""
        return (
            shapes == self.shapes
            and len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and list(map(Tensor.numel, params)) == self._sizes
        )

    def serves(self, level: Level) -> bool:
        """Whether the lanes can run `level`, on states that nobody has replaced."""
        return alike(level, self.level) and all(lane.intact() for lane, _ in self.lanes)

    def leave(self) -> None:
        """Give the parameters step counts of their own again."""
        for lane, _ in self.lanes:
            lane.leave()


class Plan:
    """The shares of all groups.

    Args:
        fill: completes the state of a parameter that its group's level has outgrown.
        accept: raises for a parameter that a level can't be shown.
        compiled: as of `lanes_for`.

    Attributes:
        seed: what starts at random is drawn from this and the parameter's name; None: from torch's generator, one
            after another.
    """

    seed: int | None = None

    def __init__(self, fill: Fill, accept: Accept, *, compiled: bool = False) -> None:
        self._fill, self._accept, self._compiled = fill, accept, compiled
        self._shares: list[Share] = []
        self._known: list[dict[str, Any]] = []
        self._changes = 0

    def shares(
        self,
        groups: Sequence[dict[str, Any]],
        levels: Sequence[Level],
        grads: Sequence[Sequence[Tensor | None]],
        state: dict[Tensor, Any],
    ) -> list[Share]:
        """What each group has to do: as it was, unless something has changed.

        Raises RuntimeError for a gradient that no level takes, before anything is changed.
        """
        if len(groups) < len(self._shares) or not self._knows(state):
            self._forget()
        shapes = [[None if grad is None else grad.shape for grad in own] for own in grads]
        fits = [i < len(self._shares) and self._shares[i].fits(g["params"], shapes[i]) for i, g in enumerate(groups)]
        for i, (group, own) in enumerate(zip(groups, grads, strict=True)):
            # a sparse gradient has a shape like any other
            if not fits[i] or not {grad.layout for grad in own if grad is not None} <= {torch.strided}:
                check_gradients(group, i, own)
        for i, (group, level) in enumerate(zip(groups, levels, strict=True)):
            old = self._shares[i] if i < len(self._shares) else None
            if old is not None and fits[i] and old.serves(level):
                old.level = level
                continue
            if old is not None:
                self._changes += not fits[i]
                old.leave()
            self._shares[i : i + 1] = [self._settle(group, i, level, shapes[i], state)]
            self._known = list(state.values())
        return self._shares

    def _knows(self, state: dict[Tensor, Any]) -> bool:
        """Whether the states are still in the dicts that they were in."""
        return len(state) == len(self._known) and all(map(is_, state.values(), self._known))

    def _forget(self) -> None:
        for share in self._shares:
            share.leave()
        self._shares, self._known = [], []

    def _settle(
        self, group: dict[str, Any], index: int, level: Level, shapes: list[torch.Size | None], state: dict[Tensor, Any]
    ) -> Share:
        params, view = list(group["params"]), None if level.is_entrywise else group.get("view")
        called = names(group, index)
        # an empty tensor has nothing to learn, and no state
        places = [i for i, shape in enumerate(shapes) if shape is not None and shape.numel()]
        for i in places:
            self._accept(level, params[i], called[i])
        members = [self._member(level, params[i], state[params[i]], view, called[i]) for i in places]
        lanes = lanes_for(level, members, packed=self._changes < RESTLESS, compiled=self._compiled) if members else []
        where = {id(params[i]): i for i in places}
        found: list[tuple[Lane, list[int] | None]] = []
        for lane in lanes:
            order = [where[id(param)] for param in lane.params]
            found.append((lane, None if order == list(range(len(params))) else order))
        return Share(level, params, shapes, found)

    def _member(self, level: Level, param: Tensor, state: dict[str, Any], view: Split | None, name: str) -> Member:
        if not state:
            state[STEP] = torch.zeros((), dtype=torch.float32)
            with _drawn_for(name, self.seed, param.device):
                tree = begin(level, param.detach().to(work_dtype(param)), view)
            if taken := tree.keys() & {STEP, SUM}:
                state.clear()
                raise ValueError(
                    f"{level.label}: the state key {min(taken)!r} is the optimizer's own; give it another name"
                )
            state.update({path: leaf.clone() for path, leaf in leaves(tree)})
        else:
            # a level's parts without state have no key to be found by
            tree = layout(level, param, view)
            if any(path not in state for path, _ in leaves(tree)):
                self._fill(state, param)
            _check_state(level, param, state, tree, name)
        return Member(param, state, tree, view)


@contextlib.contextmanager
def _drawn_for(name: str, seed: int | None, device: torch.device) -> Iterator[None]:
    """Within, random numbers are those of a parameter's name, whichever process draws them, and in whatever order."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        mixed = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest()
        torch.manual_seed(int.from_bytes(mixed, "big"))
        yield


def _check_state(level: Level, param: Tensor, state: dict[str, Any], tree: State, name: str) -> None:
    """Raise RuntimeError for a state that `level` can't have left: put there by hand, or outgrown by a new `.data`."""
    wanted = {STEP: torch.zeros(()), **dict(leaves(tree))}
    if SUM in state:
        wanted[SUM] = param
    for key, want in wanted.items():
        have = state.get(key)
        if not isinstance(have, Tensor) or not keeps_shape(have, want):
            found = f"has shape {tuple(have.shape)}" if isinstance(have, Tensor) else f"is {have!r}"
            raise RuntimeError(
                f"{name}: the state {key!r} {found}, and {level.label} keeps a tensor of shape {tuple(want.shape)} for "
                f"a parameter of shape {tuple(param.shape)}; to start anew, optimizer.state.pop(parameter)"
            )


def chosen(grads: Sequence[Any], places: list[int] | None) -> Sequence[Any]:
    """Those of `grads` that a lane wants; None for all."""
    return grads if places is None else [grads[i] for i in places]


def alike(a: Part, b: Part) -> bool:
    """Whether two parts differ in nothing but the values of their numbers."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    for field in dataclasses.fields(a):  # type: ignore[arg-type]
        x, y = getattr(a, field.name), getattr(b, field.name)
        if type(x) is not type(y) or (not isinstance(x, float | Part | tuple | dict) and x is not y and x != y):
            return False
    inner_a, inner_b = list(a.parts()), list(b.parts())
    return len(inner_a) == len(inner_b) and all(
        key_a == key_b and alike(part_a, part_b)
        for (key_a, part_a), (key_b, part_b) in zip(inner_a, inner_b, strict=True)
    )
