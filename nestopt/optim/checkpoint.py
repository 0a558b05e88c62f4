"""The optimizer's state as plain data, and back.

torch's own loader casts state to the parameter's dtype; this one keeps it as the level made it.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from nestopt.config.errors import ConfigError
from nestopt.config.spec import as_saved, build, to_spec
from nestopt.core.compose import Parallel
from nestopt.core.gates import bind
from nestopt.core.inputs import request_of
from nestopt.core.level import Level
from nestopt.core.part import Part, plain
from nestopt.core.tree import leaves
from nestopt.optim.checks import check_group, check_parameters
from nestopt.optim.execute.update import STEP, SUM, TRAINED
from nestopt.optim.layer_inputs.sums import KEPT, layout_of_totals
from nestopt.optim.views import Split, layout, work_dtype

LATER = frozenset({"maximize", "decoupled_weight_decay", "differentiable", "ns_form", "coupled", "momentum"})
"""Settings that torch's optimizers do not save, or not in every version. All others must be there."""


OWN = frozenset({"params", "param_names", "why"})
"""What a parameter group has of its own; all else is a setting."""

WRAPPERS = frozenset({"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""What DistributedDataParallel, `torch.compile`, FSDP and activation checkpointing put into names."""


class Host(Protocol):
    """The optimizer whose state it is."""

    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]

    @property
    def takes_complex(self) -> bool:
        """Whether it steps complex parameters."""

    @property
    def renamed(self) -> Mapping[str, str]:
        """State keys of torch's optimizer of the same name, and ours."""

    @property
    def count_device(self) -> str | None:
        """Where step counts are; None: beside their parameters."""

    def level(self, group: dict[str, Any]) -> Level:
        """Return the level that a parameter group runs."""


def to_plain(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Turn levels in the groups of a state dict into specs."""
    return {**state_dict, "param_groups": plain_groups(state_dict["param_groups"])}


def plain_groups(groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return parameter groups with their levels as specs."""
    return [{key: _plain(value) for key, value in group.items()} for group in groups]


def _plain(value: Any) -> Any:
    if isinstance(value, Split):
        return {"split": value.parts, "dim": value.dim} | ({"transposed": True} if value.transposed else {})
    if isinstance(value, Mapping):
        return {plain(key): _plain(item) for key, item in value.items()}
    if not isinstance(value, Level):
        return plain(value)
    try:
        with as_saved():
            return to_spec(value)
    except ConfigError:
        # a class that no plugin has registered: the optimizer it is loaded into has it already
        return {"unregistered": repr(value)}


def fitted(optimizer: Host, state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return groups and state of a state dict as `optimizer` keeps them, copied; raise ValueError if they don't fit."""
    groups = optimizer.param_groups
    new_groups: list[dict[str, Any]] = []
    params: dict[Any, tuple[Tensor, Level, Split | None]] = {}
    found = _matched(state_dict["param_groups"], groups)
    for i, (group, (saved, indices)) in enumerate(zip(groups, found, strict=True)):
        new = merged_group(optimizer, saved, group, i)
        level = bind(optimizer.level(new))
        check_parameters(new, i, level, takes_complex=optimizer.takes_complex)
        view = None if level.is_elementwise else new.get("view")
        params |= {index: (param, level, view) for index, param in zip(indices, group["params"], strict=True)}
        new_groups.append(new)
    state: defaultdict[Tensor, Any] = defaultdict(dict)
    for index, saved_state in state_dict["state"].items():
        if index not in params:
            called = _names(state_dict["param_groups"]).get(index, "no parameter of its groups")
            raise ValueError(f"state[{index}]: the checkpoint has a state of {called}, which this optimizer has not")
        param, level, view = params[index]
        state[param] = checked_state(optimizer, saved_state, param, level, f"state[{index}]", view)
    return {"state": state, "param_groups": new_groups}


def _matched(
    saved: Sequence[dict[str, Any]], groups: Sequence[dict[str, Any]]
) -> list[tuple[dict[str, Any], list[Any]]]:
    """Return for each group the saved one and its parameters' numbers there, in the group's own order.

    Parameters are told by their names; by their places where either side has none, or no name is on both sides. A
    frozen parameter may be missing, and so has no number.

    Raises:
        ValueError: other groups, or a trained parameter that the checkpoint lacks.
    """
    theirs = {_bare(name): index for index, name in _names(saved).items()}
    mine = [[_bare(name) for name in group.get("param_names") or ()] for group in groups]
    of = {index: i for i, group in enumerate(saved) for index in group["params"]}
    here, number = {name for names in mine for name in names}, sum(len(group["params"]) for group in groups)
    if len(theirs) < len(of) or len(here) < number or theirs.keys().isdisjoint(here):
        if len(saved) != len(groups):
            raise ValueError(f"the checkpoint has {len(saved)} parameter groups, this optimizer {len(groups)}")
        for i, (old, new) in enumerate(zip(saved, groups, strict=True)):
            if (n := len(old["params"])) != (m := len(new["params"])):
                raise ValueError(f"param_groups[{i}]: the checkpoint has {n} parameters, this optimizer {m}")
        return [(group, list(group["params"])) for group in saved]
    found: list[tuple[dict[str, Any], list[Any]]] = []
    for i, (names, group) in enumerate(zip(mine, groups, strict=True)):
        for name, param in zip(names, group["params"], strict=True):
            if name not in theirs and param.requires_grad:
                raise ValueError(f"param_groups[{i}]: the checkpoint has no {name}, which this optimizer trains")
        there = sorted({of[theirs[name]] for name in names if name in theirs})
        if len(there) > 1:
            raise ValueError(
                f"param_groups[{i}]: its parameters are in the groups {there} of the checkpoint; make the groups as "
                "they were when it was saved"
            )
        # all of it frozen, and not there: as it is here
        found.append((saved[there[0]] if there else plain_groups([group])[0], [theirs.get(name) for name in names]))
    return found


def _names(groups: Iterable[dict[str, Any]]) -> dict[Any, str]:
    """Return the names of saved parameters by their numbers, where they have any."""
    named = [group for group in groups if len(group.get("param_names") or ()) == len(group["params"])]
    return {index: name for group in named for index, name in zip(group["params"], group["param_names"], strict=True)}


def _bare(name: str) -> str:
    """Return a name as the bare model has it, without what wraps it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def merged_group(optimizer: Host, saved: dict[str, Any], group: dict[str, Any], i: int) -> dict[str, Any]:
    """Return the settings of group `i`, as saved, with the parameters that it has here.

    Raises ValueError where they are of another optimizer.
    """
    path = f"param_groups[{i}]"
    saved = getattr(optimizer, "former", {}) | saved
    if missing := optimizer.defaults.keys() - saved - LATER:
        raise ValueError(f"{path}: the checkpoint lacks {sorted(missing)}; it was saved by another optimizer")
    new = {**group, **copy.deepcopy({key: value for key, value in saved.items() if key not in OWN})}
    if "stack" in group:
        new["stack"] = _level(saved["stack"], group["stack"], f"{path}.stack")
    if saved.get("view") != _plain(group.get("view")):
        raise ValueError(
            f"{path}.view: the checkpoint's is {saved.get('view')}, this optimizer's {group.get('view')}; give the "
            "group the view that it was saved with"
        )
    if "view" in group:
        new["view"] = group["view"]
    check_group(new)
    return new


def _level(saved: Any, present: Level, path: str) -> Level:
    """Return the saved stack, which may differ from the present one in its numbers only."""
    if isinstance(saved, dict) and "unregistered" in saved:
        if saved["unregistered"] != repr(present):
            raise ValueError(f"{path}: the checkpoint's is {saved['unregistered']}, this optimizer's {present!r}")
        return present
    with as_saved():
        level = build("level", saved, path)
    if _kinds(level) != _kinds(present):
        raise ValueError(
            f"{path}: the checkpoint was saved with another stack, {level!r}; this optimizer's is {present!r}"
        )
    return level


def _kinds(part: Part) -> Any:
    """Return what a part is made of, without its numbers."""
    inner = [(name, _kinds(inner)) for name, inner in part.parts()]
    # side by side there is no first and second
    return type(part), dict(inner) if isinstance(part, Parallel) else inner


def checked_state(
    optimizer: Host, saved: dict[str, Any], param: Tensor, level: Level, path: str, view: Split | None = None
) -> dict[str, Any]:
    """Return a copy of the state of one parameter on its device, if it is what the level keeps."""
    found = {optimizer.renamed.get(key, key): value for key, value in saved.items() if value is not None}
    if not found:
        return {}
    # torch's SGD and Muon do not count; what matters is that there was a first step
    step = torch.as_tensor(found.pop(STEP, 1.0), dtype=torch.float32)
    step = step.detach().to(optimizer.count_device or param.device, copy=True)
    expected = dict(leaves(layout(level, param, view)))
    if SUM in found:
        expected[SUM] = torch.empty_like(param, device="meta", dtype=work_dtype(param))
        if (wants := request_of(level)) is not None and any(key.startswith(KEPT) for key in found):
            # of groups and inputs there are as many as there were
            sizes = layout_of_totals(wants, param.shape, work_dtype(param), 0, 0)
            expected |= {KEPT + key: torch.empty(size, dtype=d, device="meta") for key, (size, d) in sizes.items()}
    if TRAINED in found:
        expected[TRAINED] = torch.empty_like(param, device="meta")
    for key in expected.keys() - found:
        former = re.sub(r"\brms$", "exp_avg_sq", key)
        if former in found and former not in expected:  # m3, whose V is kept as its root now
            found[key] = found.pop(former).sqrt()
    missing, surplus = expected.keys() - found, found.keys() - expected
    if missing or surplus:
        raise ValueError(
            f"{path}: does not belong to {level.label}: missing {sorted(missing)}, unknown {sorted(surplus)}; "
            "the checkpoint was saved with another stack, or before a level in it had its present name"
        )
    for key, want in expected.items():
        have = found[key]
        if not isinstance(have, Tensor):
            raise ValueError(f"{path}.{key}: is {type(have).__name__} in the checkpoint, and should be a tensor")
        if not keeps_shape(have, want):
            raise ValueError(f"{path}.{key}: has shape {tuple(have.shape)} in the checkpoint, {tuple(want.shape)} here")
    return {STEP: step} | {
        key: value.detach().to(param.device, expected[key].dtype, copy=True) for key, value in found.items()
    }


def keeps_shape(state: Tensor, layout: Tensor) -> bool:
    """Return whether `state` has the shape that it started with; a dimension that starts empty is one that grows."""
    return state.ndim == layout.ndim and all(n in (0, m) for n, m in zip(layout.shape, state.shape, strict=True))
