"""Memories of an optimizer: of nestopt's by the levels in its groups, of torch's and others' by what they keep."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestopt.core.level import Level
from nestopt.core.tree import nested
from nestopt.description import stacks
from nestopt.description.memory import Memory
from nestopt.description.rows import total

OBJECTIVES = {
    "momentum_buffer": "dot",
    "exp_avg": "l2 to g",
    "exp_avg_sq": "l2 to g²",
    "max_exp_avg_sq": "max",
    "exp_inf": "max of |g|",
    "square_avg": "l2 to g²",
    "grad_avg": "l2 to g",
    "acc_delta": "l2 to u²",
    "sum": "dot to g²",
    "row_var": "l2 to g², rows",
    "col_var": "l2 to g², columns",
    "variance": "l2 to g²",
    "prev": "last g",
    "ax": "l2 to W",
}
"""The objective that each state tensor of torch's own optimizers learns by."""

NEEDS = {
    "max_exp_avg_sq": ("exp_avg_sq",),
    "acc_delta": ("square_avg",),
    "momentum_buffer": ("square_avg", "grad_avg"),
    "step_size": ("prev",),
}
"""State tensors of torch's own optimizers that are computed from others of the same step."""

COUNTERS = {"step", "mu_product", "eta", "mu"}
"""State that says where the optimizer is, and remembers nothing of the gradients."""

SPEED = {"foreach", "fused", "capturable", "differentiable"}
GROUP_SUMS = ("group_sum", "inputs_sum.")
"""What begins the state keys of what a group with a period has summed up."""


@dataclasses.dataclass
class Family:
    """Parameter groups whose memories are the same but for their sizes.

    Attributes:
        name: unique within the optimizer.
        rule: what moves the weights, in words.
        period: steps between updates of the weights.
        params: of all its groups.
        memories: that the update of the weights needs.
    """

    name: str
    rule: str
    period: int
    params: list[Tensor]
    memories: list[Memory] = dataclasses.field(default_factory=list)


def families(optimizer: Optimizer, taken: Collection[str] = ()) -> tuple[list[Family], list[str]]:
    """Return the families of an optimizer, named apart from `taken`, and notes."""
    kinds: dict[Any, list[dict[str, Any]]] = {}
    for group in optimizer.param_groups:
        kinds.setdefault(_kind(optimizer, group), []).append(group)
    names, found, notes = set(taken), [], list[str]()
    for groups in kinds.values():
        first = groups[0]
        params = [p for group in groups for p in group["params"] if p.requires_grad or optimizer.state.get(p)]
        level = level_of(optimizer, first)
        label = level.label if level is not None and "stack" in first else type(optimizer).__name__.lower()
        period = _period(first)
        name = _unique(label if period == 1 else f"{label}_every_{period}", names)
        rule = stacks.words(level) if level is not None and "stack" in first else label
        family = Family(name, rule, period, params)
        if level is None:
            family.memories, said = _kept(optimizer, first, family)
            notes += said
        else:
            family.memories = _learned(optimizer, level, family)
        found.append(family)
    return found, notes


def level_of(optimizer: Optimizer, group: Mapping[str, Any]) -> Level | None:
    """Return the level that a group runs, if the optimizer is one that runs levels."""
    make = getattr(optimizer, "level", None)
    level = make(group) if callable(make) else group.get("stack")
    return level if isinstance(level, Level) else None


def _period(group: Mapping[str, Any]) -> int:
    period = group.get("period", 1)
    return period if isinstance(period, int) else 1


def _kind(optimizer: Optimizer, group: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what makes two groups one family."""
    level, period = level_of(optimizer, group), _period(group)
    if level is None:
        return (period, tuple(sorted(_probe(optimizer, group) or {})))
    return (period, stacks.words(level), tuple(level.nodes("")))


def _unique(label: str, names: set[str]) -> str:
    name, number = label, 1
    while name in names:
        number += 1
        name = f"{label}_{number}"
    names.add(name)
    return name


# -- optimizers that run levels ----------------------------------------------------------------------------------------


def _learned(optimizer: Optimizer, level: Level, family: Family) -> list[Memory]:
    parts = []
    for param in family.params:
        state = {key: value for key, value in optimizer.state.get(param, {}).items() if isinstance(value, Tensor)}
        sums = [state.pop(key) for key in list(state) if key.startswith(GROUP_SUMS)]
        state.pop("step", None)
        dtype = torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype
        shape = param.flatten(1).shape if param.ndim > 2 and "matrix" in level.needs else param.shape
        tree = nested(state) if state else stacks.begin(level, shape, "gradients", dtype)
        parts.append(stacks.measure(level, family.name, tree))
        if family.period > 1:
            held = sum(some.nbytes for some in sums) if sums else param.numel() * dtype.itemsize
            parts.append({family.name: stacks.Size(0, held)})
    return stacks.memories(level, family.name, "gradients", stacks.add(parts), family.period)


# -- any other ---------------------------------------------------------------------------------------------------------


def _kept(optimizer: Optimizer, group: Mapping[str, Any], family: Family) -> tuple[list[Memory], list[str]]:
    """Return one memory per state tensor: as it is, or as it will be after a first step."""
    label, ours = type(optimizer).__name__, _is_torchs(optimizer)
    will = _probe(optimizer, group)
    states = [_tensors(optimizer.state.get(param, {})) for param in family.params]
    keys = list(dict.fromkeys(key for state in [*states, will or {}] for key in state))
    notes = []
    if will is None and not any(states):
        notes.append(f"{label} keeps its memories in a way that shows only once it has taken a step.")
    elif not ours and keys:
        notes.append(f"{label} is described by the tensors it keeps: by what objective each learns is not known.")
    name_of = {key: f"{family.name}.{key}" if len(keys) > 1 else family.name for key in keys}
    found = []
    for key in keys:
        sizes = [_size(state, key, will, param) for state, param in zip(states, family.params, strict=True)]
        needs = tuple(name_of[other] for other in NEEDS.get(key, ()) if ours and other in keys)
        numbers, held = total(n for n, _ in sizes), total(b for _, b in sizes)
        objective = OBJECTIVES.get(key, "") if ours else ""
        found.append(
            Memory(name_of[key], "gradients", family.period, "vector", objective, family.rule, numbers, held, needs)
        )
    return found, notes


def _size(
    state: Mapping[str, list[Tensor]], key: str, will: Mapping[str, list[Tensor]] | None, param: Tensor
) -> tuple[int | None, int | None]:
    """Return numbers and bytes of one parameter's state tensor; None where only a step would tell."""
    if state:
        tensors = state.get(key, [])
        return sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
    expected = (will or {}).get(key)
    if expected is None or [t.shape for t in expected] != [PROBE]:
        return None, None
    return param.numel(), param.numel() * param.element_size()


PROBE = torch.Size((2, 3))


def _probe(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, list[Tensor]] | None:
    """Take a step of an optimizer like this, and return what it keeps of one matrix; None if that fails."""
    if not _is_torchs(optimizer) and torch.distributed.is_available() and torch.distributed.is_initialized():
        return None  # its step may wait for processes that are not described now
    cls = type(optimizer)
    accepted = set(inspect.signature(cls).parameters) - SPEED - {"params"}
    settings = {key: group.get(key, value) for key, value in optimizer.defaults.items() if key in accepted}
    param = torch.nn.Parameter(torch.zeros(PROBE))
    param.grad = torch.ones(PROBE)
    try:
        made = cls([param], **settings)
        with torch.enable_grad():
            made.step(lambda: 0.0)
    except Exception:  # someone else's code on a made-up parameter: a note says that nothing was learned
        return None
    return _tensors(made.state.get(param, {}))


def _tensors(state: Mapping[str, Any]) -> dict[str, list[Tensor]]:
    """Return the tensors of one parameter's state by key; lists of tensors count as one memory."""
    found = {}
    for key, value in state.items():
        tensors = [item for item in (value if isinstance(value, Sequence) else [value]) if isinstance(item, Tensor)]
        if tensors and key not in COUNTERS:
            found[key] = tensors
    return found


def _is_torchs(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")
