"""Which executor steps which parameter: settled once, and anew when anything about them has changed."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import is_
from typing import Any

import torch
from torch import Tensor

from nestopt.core.contract import begun, stepped, strangers
from nestopt.core.gates import bind
from nestopt.core.inputs import INPUTS
from nestopt.core.level import Level
from nestopt.core.part import FINITE, Part
from nestopt.core.signal import Note, Signal
from nestopt.core.tree import State, leaves
from nestopt.optim.checkpoint import keeps_shape
from nestopt.optim.checks import check_finite, check_gradients, check_whole, names
from nestopt.optim.execute.capturable import check_capturable
from nestopt.optim.execute.choose import executors
from nestopt.optim.execute.update import STEP, SUM, TRAINED, Executor, Slot, placed
from nestopt.optim.layer_inputs.sums import KEPT, Totals
from nestopt.optim.views import Split, begin, layout, local, matrix_view, work_dtype

RESTLESS = 3
"""After so many changes of which parameters have a gradient, states are no longer moved into common buffers."""

Form = tuple[torch.Size, torch.layout] | None
"""Of a gradient; None where there is none."""


@dataclasses.dataclass
class Share:
    """What one parameter group does in a step.

    Attributes:
        level: with its gates bound.
        of_weights: whether it acts on the weights, after the step.
        params, ids: of the group.
        forms: of its gradients.
        executors: of the parameters that have one.
    """

    level: Level
    of_weights: bool
    params: list[Tensor]
    ids: list[int]
    forms: list[Form]
    executors: list[Executor]

    def leave(self) -> None:
        """Give the parameters step counts of their own again."""
        for executor in self.executors:
            executor.leave()


class Plan:
    """The shares of all groups.

    Args:
        fill: completes the state of a parameter that its group's level has outgrown.
        accept: raises for a parameter that is no matrix, if its level can't be shown it.
        inputs: gives what the layer of a parameter was shown, for levels that ask for it.
        note: gives where the level of a parameter reports, by the number of its group; None: nobody listens.
        compiled: as of `executors`.
        seed: what starts at random is drawn from this and the parameter's name; None: from torch's own seed and it.
            With one this is one of several processes, which can't give up a step alone.

    Attributes:
        shares: by group.
        breakable: whether a level says that gradients which are not finite break it, so that each step looks at them.
        known: the states of all parameters, by the dicts that they are in.
    """

    def __init__(
        self,
        fill: Callable[[dict[str, Any], Tensor], None],
        accept: Callable[[Level, Tensor, str], None],
        inputs: Callable[[Tensor], Totals | None],
        note: Callable[[int, Tensor], Note] | None = None,
        *,
        compiled: bool = False,
        seed: int | None = None,
    ) -> None:
        self._fill, self._accept, self._inputs, self._note = fill, accept, inputs, note
        self._compiled, self._seed = compiled, seed
        self.shares: list[Share] = []
        self.known: list[dict[str, Any]] = []
        self.breakable = False
        self._changes = 0
        self._tried: set[type[Level]] = set()

    def settle(
        self,
        groups: Sequence[dict[str, Any]],
        levels: Sequence[Level],
        grads: Sequence[Sequence[Tensor | None]],
        state: dict[Tensor, Any],
    ) -> None:
        """Bring the shares up to date, of the groups in which something has changed.

        Raises RuntimeError for a gradient that no level takes, before anything is changed.
        """
        self.breakable = self._seed is None and any(FINITE in level.needs for level in levels)
        if self.breakable:
            check_finite(groups, levels, grads)
        if len(groups) < len(self.shares) or not (
            len(state) == len(self.known) and all(map(is_, state.values(), self.known))
        ):
            for share in self.shares:
                share.leave()
            self.shares, self.known = [], []
        forms = [[None if grad is None else (grad.shape, grad.layout) for grad in own] for own in grads]
        for i, group in enumerate(groups):
            check_gradients(group, i, grads[i])
            check_whole(group, i, levels[i], grads[i])
        for i, (group, level) in enumerate(zip(groups, levels, strict=True)):
            old = self.shares[i] if i < len(self.shares) else None
            if old is not None:
                fits = old.ids == list(map(id, group["params"])) and old.forms == forms[i]
                if fits and alike(level, old.level) and all(executor.intact() for executor in old.executors):
                    old.level = level
                    continue
                self._changes += not fits
                old.leave()
            self._try(bind(level), group, grads[i])
            self.shares[i : i + 1] = [self._share(group, i, level, forms[i], state)]
            self.known = list(state.values())

    def _try(self, level: Level, group: dict[str, Any], grads: Sequence[Tensor | None]) -> None:
        """Try each level that is not nestopt's once, on copies: what is wrong with it is said before it is run."""
        shown = [(p, g) for p, g in zip(group["params"], grads, strict=True) if g is not None and g.numel()]
        for stranger in strangers(level):
            if shown and type(stranger) not in self._tried:
                self._tried.add(type(stranger))
                check_stranger(level, stranger, *shown[0], group.get("view"))

    def _share(
        self, group: dict[str, Any], index: int, level: Level, forms: list[Form], state: dict[Tensor, Any]
    ) -> Share:
        params, view = list(group["params"]), None if level.is_elementwise else group.get("view")
        slots = []
        for i, (param, name, form) in enumerate(zip(params, names(group, index), forms, strict=True)):
            if form is not None and form[0].numel():  # an empty tensor has nothing to learn, and no state
                if param.ndim < 2 and not level.is_elementwise:
                    self._accept(level, param, name)
                slots.append(self._slot(level, param, state[param], view, name, i))
        asks = INPUTS in level.needs
        made = executors(
            level, slots, packed=self._changes < RESTLESS, compiled=self._compiled, alone=asks or self._note is not None
        )
        for executor in made:
            executor.inputs = self._inputs if asks else None
            executor.note = partial(self._note, index) if self._note else None
        return Share(level, level.of_weights, params, list(map(id, params)), forms, made)

    def _slot(
        self, level: Level, param: Tensor, state: dict[str, Any], view: Split | None, name: str, place: int
    ) -> Slot:
        if not state:
            with _drawn_for(name, torch.initial_seed() if self._seed is None else self._seed, param.device):
                tree = begin(level, param.detach().to(work_dtype(param)), view)
            _check_keys(level, tree)
            state[STEP] = torch.zeros((), dtype=torch.float32)
            state.update({path: leaf.clone() for path, leaf in leaves(tree)})
        else:
            # a level's parts without state have no key to be found by
            tree = layout(level, param, view)
            if any(path not in state for path, _ in leaves(tree)):
                self._fill(state, param)
            _check_state(level, param, state, tree, name)
            for path, leaf in {**dict(leaves(tree)), SUM: torch.empty(0, dtype=work_dtype(param))}.items():
                if path in state:  # the model may have been cast or moved since
                    state[path] = state[path].to(param.device, leaf.dtype)
            state.update({key: value.to(param.device) for key, value in state.items() if key.startswith(KEPT)})
        return Slot(param, state, placed(tree, state), view, place)


def check_capturable_group(group: dict[str, Any], index: int, level: Level) -> None:
    """Raise ValueError for a level of a group whose step can't be captured; ContractError for one that breaks rules."""
    level, seen = bind(level, step=None), set()
    view = None if level.is_elementwise else group.get("view")
    for name, param in zip(names(group, index), group["params"], strict=True):
        kind = (param.shape, param.dtype, param.device)
        if kind not in seen and param.numel():
            seen.add(kind)
            for stranger in strangers(bind(level)):
                check_stranger(level, stranger, param, torch.ones_like(param), view)
            check_capturable(level, param, group.get("period", 1), view, name)


def check_stranger(level: Level, stranger: Level, param: Tensor, grad: Tensor, view: Split | None = None) -> None:
    """Raise ContractError where `stranger`, a level within `level`, breaks the contract on a tensor like `param`."""
    if param.device.type == "meta":  # without numbers there is nothing to compare
        return
    kept = (local(x.detach().to(work_dtype(param), copy=True)) for x in (param, grad))
    seen, shown = (matrix_view(x, level, view) for x in kept)
    if view is not None and view.stacked and not level.is_elementwise:
        seen, shown = seen[0], shown[0]
    with _drawn_for("", 0, param.device):
        state = begun(stranger, seen)
        _check_keys(stranger, state)
        stepped(stranger, shown, state, Signal(stranger.period, seen, 1e-3))


def _check_keys(level: Level, tree: State) -> None:
    if taken := tree.keys() & {STEP, SUM, TRAINED}:
        raise ValueError(f"{level.label}: the state key {min(taken)!r} is the optimizer's own; give it another name")


@contextlib.contextmanager
def _drawn_for(name: str, seed: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers by a parameter's name within, whichever process draws them, and in whatever order."""
    generator: Any = torch.default_generator
    if device.type not in ("cpu", "meta") and (
        own := getattr(torch.get_device_module(device), "default_generators", ())
    ):
        generator = own[device.index]
    before = generator.get_state()
    try:
        generator.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=7).digest(), "big"))
        yield
    finally:
        generator.set_state(before)


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


def alike(a: Part, b: Part) -> bool:
    """Return whether two parts differ in nothing but the values of their numbers."""
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
