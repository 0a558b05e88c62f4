"""The optimizer that an engine is given: a nest, wherever its parameters lie."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from nestopt.core.inputs import INPUTS
from nestopt.core.level import Level
from nestopt.core.weights import around
from nestopt.optim.checkpoint import OWN, merged_group, plain_groups
from nestopt.optim.checks import names, warn_unseen
from nestopt.optim.layer_inputs.sums import Totals
from nestopt.optim.layer_inputs.watcher import Watcher, shown
from nestopt.optim.optimizer import Nested
from nestopt.optim.sharded.owners import owners, step_cost
from nestopt.optim.sharded.saved import CheckpointMismatch, Saved, SavedState, StateKeys, TensorSlice
from nestopt.optim.sharded.slices import Slice
from nestopt.optim.sharded.units import Flat, Group, Owned, Unit, Whole
from nestopt.optim.weights import show_anew

TAKEN = "steps_taken"
"""A group's key for how many steps it has taken."""


@dataclasses.dataclass(frozen=True)
class Placement:
    """How the parameters of one group, or some of them, lie.

    Attributes:
        group: the number of the group.
        handles: by what the group refers to them: the parameters, or what an engine has put in their place.
        tensors: what this process has of them, each in one piece of memory.
        table: which slices these hold; None: each tensor is the parameter of the same place, whole.
    """

    group: int
    handles: Sequence[Tensor]
    tensors: Sequence[Tensor]
    table: Sequence[Slice] | None = None


class Sharded(Optimizer):
    """Runs a nest whose parameters an engine has put elsewhere: in float32 copies, in slices over several processes.

    Groups and their settings are those of the nest, and schedules change them here. What is done with them is settled
    by `attach`, once the engine has made its arrangements; a step before that is none, and no clock ticks at it
    (DeepSpeed takes one to make room for states).

    Args:
        nested: made for the model's own parameters.
    """

    def __init__(self, nested: Nested) -> None:
        if nested.options.on_nonfinite != "ignore" or nested.options.capturable or nested.options.metrics:
            raise ValueError(
                f"{nested.options} is not for several processes, which would each decide for themselves; "
                "leave out on_nonfinite, capturable and metrics"
            )
        if any(own.across_processes for group in nested.param_groups for _, own in around(nested.level(group))):
            raise ValueError(
                "across_processes=True is for processes that each train a whole model by themselves; leave it out "
                "where an engine shares the work between them"
            )
        self.nested = nested
        # frozen parameters stay the model's: engines have no slices of them
        pairs = [zip(names(group, i), group["params"], strict=True) for i, group in enumerate(nested.param_groups)]
        trained = [{name: param for name, param in own if param.requires_grad} for own in pairs]
        groups = [(own, group) for own, group in zip(trained, nested.param_groups, strict=True) if own]
        self.names = [list(own) for own, _ in groups]
        self.models = {name: param for own, _ in groups for name, param in own.items()}
        super().__init__([_trained(group, own) for own, group in groups], nested.defaults)
        self._comm: Any = None
        self._units: dict[int, tuple[Unit, Placement]] = {}
        self._attached = self._warned = False
        self.spread: Callable[[], None] = lambda: None
        """Lets the model have what has been written, where its weights are copies."""
        self.skipping = False
        """Whether steps are to be none, as those before `attach`."""

    def level(self, group: Group) -> Level:
        """Return the level that a parameter group runs."""
        return self.nested.level(group)

    def attach(self, placements: Sequence[Placement], comm: Any = None) -> None:
        """Settle what is done with parameters that lie so.

        Args:
            placements: of all groups.
            comm: the group of processes over which slices lie; None: there are no others.

        Raises:
            RuntimeError: the processes have other levels, or slices that do not make the parameters up.
        """
        self._comm = comm
        if isinstance(self.nested.watcher, Watcher):
            self.nested.watcher.elsewhere = True
        tables: list[list[Sequence[Slice] | None]] = [[some.table for some in placements]]
        if comm is not None:
            self._check_alike(comm)
            tables = [[] for _ in range(dist.get_world_size(comm))]
            dist.all_gather_object(tables, [some.table for some in placements], group=comm)
        owner, seed = self._owners(placements, tables), torch.initial_seed()
        if comm is not None:
            seeds: list[Any] = [seed] * len(tables)
            dist.all_gather_object(seeds, seed, group=comm)
            seed = seeds[0]
        self._units = {}
        for i, some in enumerate(placements):
            group = self.param_groups[some.group]
            unit: Unit
            if some.table is None:
                unit = Whole(self.nested, group, self.names[some.group], some.tensors, seed)
            elif self.level(group).is_elementwise:
                unit = Flat(self.nested, group, some.tensors, some.table)
            else:
                own = [table[i] or () for table in tables]
                unit = Owned(self.nested, group, some.tensors, own, owner, comm, seed)
            self._units.update((id(handle), (unit, some)) for handle in some.handles)
        self._attached = True

    def _owners(self, placements: Sequence[Placement], tables: list[list[Sequence[Slice] | None]]) -> dict[str, int]:
        costs: dict[str, float] = {}
        for i, some in enumerate(placements):
            group = self.param_groups[some.group]
            level = self.level(group)
            if some.table is None or level.is_elementwise:
                continue
            for piece in (piece for table in tables for piece in table[i] or ()):
                if piece.name not in costs:
                    costs[piece.name] = step_cost(level, torch.Size(piece.shape), group.get("view"))
        return owners(costs, len(tables))

    def _check_alike(self, comm: Any) -> None:
        mine = [
            (own, repr(self.level(group)), group["weight_decay"], group.get("period", 1), repr(group.get("view")))
            for own, group in zip(self.names, self.param_groups, strict=True)
        ]
        found: list[Any] = [None] * dist.get_world_size(comm)
        dist.all_gather_object(found, mine, group=comm)
        for rank, other in enumerate(found):
            for i in range(max(len(other), len(found[0]))):
                here, there = (some[i] if i < len(some) else "nothing" for some in (found[0], other))
                if here != there:
                    raise RuntimeError(
                        f"the processes have other levels: in parameter group {i} process 0 has {_short(here)}, "
                        f"process {rank} has {_short(there)}; build the same optimizer in all of them"
                    )

    # -- steps -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of what the groups refer to now, as engines set it for each of their calls."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._attached or self.skipping:
            return loss
        for group in self.param_groups:
            for unit, placement in self._units_of(group):
                group[TAKEN] = unit.taken = unit.taken + 1
                inputs = self._inputs(unit, group)
                pairs = zip(placement.handles, placement.tensors, strict=True)
                unit.step([_gradient(handle, tensor) for handle, tensor in pairs], group, inputs)
        return loss

    def _units_of(self, group: Group) -> list[tuple[Unit, Placement]]:
        found: dict[int, tuple[Unit, Placement]] = {}
        for handle in group["params"]:
            if id(handle) not in self._units:
                raise RuntimeError(
                    f"a parameter group refers to a tensor of shape {list(handle.shape)} that it did not refer to when "
                    "the optimizer was attached; initialize the engine anew"
                )
            unit, placement = self._units[id(handle)]
            found[id(unit)] = unit, placement
        return list(found.values())

    def _inputs(self, unit: Unit, group: Group) -> dict[str, Totals | None]:
        level, watcher, shapes = self.level(group), self.nested.watcher, unit.shapes()
        if INPUTS not in level.needs:
            return {}
        found: dict[str, Totals | None] = dict.fromkeys(shapes)
        if isinstance(watcher, Watcher):
            for name in sorted(shapes):
                found[name] = watcher.totals_of(self.models[name], torch.Size(shapes[name]), self._comm)
        if unit.taken == 1 and not self._warned:
            unseen = [name for name, inputs in found.items() if len(shapes[name]) > 1 and not shown(inputs)]
            self._warned = bool(unseen)
            if unseen:
                warn_unseen(level, unseen)
        return found

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of what the groups refer to, and the layer inputs that belong to them."""
        super().zero_grad(set_to_none)
        self.forget_inputs()

    def forget_inputs(self) -> None:
        """Forget what layers were shown since the last step."""
        if isinstance(self.nested.watcher, Watcher):
            self.nested.watcher.forget()

    @property
    def of_weights(self) -> bool:
        """Whether there are weights to evaluate with that are not those that are trained."""
        return any(self.level(group).of_weights for group in self.param_groups)

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Do as `Nested.train`; all processes together."""
        if not self.of_weights:
            return
        for unit in self.units():
            unit.train(mode)
        self.spread()
        model = self.nested._model
        show_anew(model() if model is not None else None)

    def eval(self) -> None:
        """Do as `Nested.eval`; all processes together."""
        self.train(False)

    def explain(self) -> Any:
        """Explain as `Nested.explain` does."""
        return self.nested.explain()

    # -- what is saved ---------------------------------------------------------------------------------------------

    def units(self) -> list[Unit]:
        """In the order of the groups; the same on all processes."""
        return list({id(unit): unit for unit, _ in self._units.values()}.values())

    def weights(self) -> Iterator[tuple[str, TensorSlice]]:
        """Yield the parameters' numbers that this process has, by `model.NAME`."""
        for unit in self.units():
            yield from unit.weights()

    def states(self) -> Iterator[tuple[str, TensorSlice]]:
        """Yield the state that this process keeps, by `optimizer.NAME|KEY`."""
        for unit in self.units():
            yield from unit.state()

    def settings(self) -> list[dict[str, Any]]:
        """Settings and names of each group, as plain values; numbers that are tensors become numbers."""
        found = plain_groups([{k: v for k, v in g.items() if k != "params"} for g in self.param_groups])
        for group, own in zip(found, self.names, strict=True):
            group["param_names"] = list(own)
            group.update((key, value.item()) for key, value in list(group.items()) if isinstance(value, Tensor))
        return found

    def load(self, saved: Saved, settings: Sequence[dict[str, Any]]) -> None:
        """Put back settings, weights and state of what was saved, wherever it lay then.

        Raises:
            CheckpointMismatch: it is of another optimizer. Weights have not been changed then.
        """
        self._load_states(saved, settings)
        for unit in self.units():
            unit.load_weights(saved)

    def _load_states(self, saved: Saved, settings: Sequence[dict[str, Any]]) -> None:
        of = {frozenset(group["param_names"]): group for group in settings}
        if of.keys() != set(map(frozenset, self.names)) or len(of) != len(settings):
            raise CheckpointMismatch("it has its parameters in other groups")
        settings = [of[frozenset(own)] for own in self.names]
        keys = StateKeys(saved)
        if strange := keys.names() - self.models.keys():
            raise CheckpointMismatch(f"it has a state of {min(strange)}, which has none here")
        try:
            merged = [
                merged_group(self.nested, {**theirs, "params": group["params"]}, group, i)
                for i, (theirs, group) in enumerate(zip(settings, self.param_groups, strict=True))
            ]
        except ValueError as error:
            raise CheckpointMismatch(str(error)) from None
        for unit in self.units():
            unit.load_state(saved, keys)
        for group, new in zip(self.param_groups, merged, strict=True):
            group.update(new)
        if isinstance(watcher := self.nested._watcher, Watcher):
            named = zip(self.param_groups, self.names, strict=True)
            watcher.ask({self.models[name]: self.level(group) for group, names in named for name in names})
        for unit, placement in self._units.values():
            unit.taken = int(self.param_groups[placement.group].get(TAKEN, 0))

    def state_dict(self) -> dict[str, Any]:
        """Return what this process keeps, by name, in plain values: it loads at the same stage and by as many
        processes.

        That is what DeepSpeed's own checkpoints are made of; `nestopt.train.deepspeed.save` has no such limits.
        """
        kept = {name: {"values": s.values, "shape": s.shape, "start": s.start} for name, s in self.states()}
        return {"state": {}, "param_groups": self.settings(), "nest": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put back what `state_dict` of the same process gave; numbers of the groups too.

        Raises:
            CheckpointMismatch: it is of another optimizer, stage or number of processes.
        """
        own = SavedState({name: TensorSlice(**item) for name, item in state_dict["nest"].items()})
        self._load_states(own, state_dict["param_groups"])


def _trained(group: Group, own: dict[str, Tensor]) -> Group:
    """Return a group with these of its parameters, named if they were."""
    settings = {key: value for key, value in group.items() if key not in OWN}
    called = {"param_names": list(own)} if "param_names" in group else {}
    return {**settings, **called, "params": list(own.values())}


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 200 else text[:200] + " …"


def _gradient(handle: Tensor, tensor: Tensor) -> Tensor | None:
    """Return the gradient of `handle`, as a tensor like `tensor`."""
    grad = handle.grad
    if grad is None:
        return None
    local: Tensor = grad.to_local() if hasattr(grad, "to_local") else grad  # a DTensor's
    return local.to(tensor.dtype)
