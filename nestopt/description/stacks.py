"""Memories of a level: those of its nodes, with the sizes of the state that each has."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.clock import READ, SUM, start
from nestopt.core.compose import Chain, Parallel
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.memories import Memory as Store
from nestopt.core.memories import Window
from nestopt.core.nesting import Nest
from nestopt.core.order import Node
from nestopt.core.part import PARAM
from nestopt.core.tree import State, leaves
from nestopt.core.weights import OfWeights
from nestopt.description.memory import Context, Memory
from nestopt.levels.continuum.level import Cms


@dataclasses.dataclass(frozen=True)
class Size:
    """Numbers that a memory is made of, and all bytes that are kept for it."""

    numbers: int = 0
    bytes: int = 0

    def __add__(self, other: Size) -> Size:
        return Size(self.numbers + other.numbers, self.bytes + other.bytes)

    def times(self, count: int) -> Size:
        return Size(self.numbers * count, self.bytes * count)


Sizes = dict[str, Size]


def words(level: Level) -> str:
    """Return a level in a few words: `"momentum → muon"`, `"adam + (momentum every 16)"`."""
    if isinstance(level, Chain | Parallel):
        joint = " → " if isinstance(level, Chain) else " + "
        said = joint.join(
            _bracketed(child) if len(level.levels) > 1 else words(child) for child in level.levels.values()
        )
    elif isinstance(level, Nest):
        said = f"nest({words(level.outer)}, {words(level.inner)}{', of weights' if level.of_weights else ''})"
    elif isinstance(level, OfWeights):
        said = f"{level.label}({words(level.inner)})"
    else:
        said = level.label
    if level.period == 1:
        return said
    return f"({said}) every {level.period}" if isinstance(level, Chain | Parallel) else f"{said} every {level.period}"


def _bracketed(level: Level) -> str:
    alone = level.period == 1 and not isinstance(level, Chain | Parallel)
    return words(level) if alone else f"({words(level)})"


def memories(level: Level, name: str, context: Context, sizes: Sizes | None, period: int = 1) -> list[Memory]:
    """List the memories of `level` as `name`; those that keep nothing are none.

    Args:
        level: on its own, or of a layer or optimizer.
        name: of what it returns, the begin of each name.
        context: what it is shown.
        sizes: of `measure`; None where no shape is known.
        period: of what it is in.
    """
    if context == "tokens" and (level.of_weights or PARAM in level.needs):
        begin(level, (2, 2), context)  # which says why not, if not
    nodes = level.nodes(name, period)
    owned = {} if sizes is None else _owned(sizes, nodes)
    growing = {node.name for node in nodes if node.rule == "append"} if _unbounded(level) else set()
    needs: dict[str, tuple[str, ...]] = {}  # of what keeps nothing
    if any(node.memory == "none" for node in nodes):
        kept = owned or _owned(measure(level, name, begin(level, (2, 2), context)), nodes)
        needs = {
            node.name: node.after for node in nodes if node.memory == "none" and not kept.get(node.name, Size()).bytes
        }
    found = []
    for node in nodes:
        if node.name in needs:
            continue
        if node.memory == "none":  # but for the sum of its clock
            node = dataclasses.replace(node, memory="sum")
        node = dataclasses.replace(node, after=_through(node.after, needs))
        size, grows = owned.get(node.name, Size()), node.name in growing
        known = sizes is not None and not grows
        found.append(
            Memory.from_node(
                node,
                context,
                parameters=size.numbers if known else None,
                state=size.bytes if known else None,
                grows=grows,
            )
        )
    return found


def _through(after: tuple[str, ...], needs: Mapping[str, tuple[str, ...]]) -> tuple[str, ...]:
    """Return `after` with what the names in `needs` need in their place."""
    found = (_through(needs[name], needs) if name in needs else (name,) for name in after)
    return tuple(dict.fromkeys(itertools.chain.from_iterable(found)))


def keeps_nothing(level: Level, name: str, found: Sequence[Memory]) -> list[str]:
    """Say which levels within `level` are not among the memories `found` of it: one note, or none."""
    listed = {memory.name for memory in found}
    rules = dict.fromkeys(node.rule for node in level.nodes(name) if node.name not in listed)
    if not rules:
        return []
    does, whose, place = ("keeps", "its", "is") if len(rules) == 1 else ("keep", "their", "are")
    return [f"{' and '.join(rules)} {does} no memory of {whose} own, and {place} on no level."]


def begin(level: Level, shape: Sequence[int], context: Context, dtype: torch.dtype | None = None) -> State:
    """Start the state of `level` for a tensor of `shape` (on tokens `(D_v, D_k)`), on the meta device."""
    like = torch.empty(tuple(shape), dtype=dtype, device="meta")
    if context == "tokens":
        dim_v, dim_k = shape
        return bind(level).init_tokens(dim_k, dim_v, like, {})
    return start(bind(level), like)


def measure(level: Level, name: str, state: Mapping[str, Any]) -> Sizes:
    """Return how much of `state` belongs to which of the memories that `level.nodes(name)` lists."""
    own = {key: value for key, value in state.items() if key not in (SUM, READ)}
    clock = [state[key] for key in (SUM, READ) if isinstance(state.get(key), Tensor)]
    if isinstance(level, Chain | Parallel | Cms):
        children = level.clocks().levels if isinstance(level, Cms) else level.levels
        found = add(measure(child, f"{name}.{key}", own.get(key, {})) for key, child in children.items())
    elif isinstance(level, OfWeights) and level.of_weights:
        parts = {key: part for key, part in level.parts() if isinstance(part, Level)}
        kept = {f"{name}.{key}": _size([leaf]) for key, leaf in own.items() if isinstance(leaf, Tensor)}
        found = add([*(measure(part, f"{name}.{key}", own.get(key, {})) for key, part in parts.items()), kept])
    elif isinstance(level, Nest):
        found = _nest(level, name, own)
    elif isinstance(level, AssociativeMemory) and "memory" in own:
        found = _associative(level, name, own)
    else:
        paths = dict(leaves(own))
        found = {(f"{name}.{path}" if len(paths) > 1 else name): _size([leaf]) for path, leaf in paths.items()}
    first = next(iter(found), name)
    return add([found, {first: Size(0, _size(clock).bytes)}])


def _nest(level: Nest, name: str, state: State) -> Sizes:
    inner = measure(level.inner, f"{name}.inner", state.get("inner", {}))
    found, starts = [inner], []
    for path, leaf in leaves(state.get("start", {})):
        below = state.get("outer", {})
        for key in path.split("."):
            below = below.get(key, {})
        found.append(measure(level.outer, f"{name}.outer", below))
        starts.append(leaf)
    return add([*found, {f"{name}.start": _size(starts)}])


def _associative(level: AssociativeMemory, name: str, state: State) -> Sizes:
    theta: dict[str, Tensor] = state["memory"]
    if isinstance(level.memory, Window) and level.memory.size is not None:
        # as it is once it is full
        theta = {key: leaf.new_empty(level.memory.size, leaf.shape[-1], device="meta") for key, leaf in theta.items()}
    buffers = [leaf for key in ("chunk", "sum") if key in state for leaf in state[key].values()]
    buffers += [state["average"]] if "average" in state else []  # of deep momentum, of the gradients that it is shown
    rules = (measure(level.rule, f"{name}.rule", own) for own in state.get("rule", {}).values())
    return add([{name: _size(theta.values()) + Size(0, _size(buffers).bytes)}, *rules])


def _unbounded(level: Level) -> bool:
    """Return whether a memory that keeps pairs as they are has no bound on how many."""
    if isinstance(level, AssociativeMemory) and type(level.memory).append is not Store.append:
        return getattr(level.memory, "size", None) is None
    return any(_unbounded(part) for _, part in level.parts() if isinstance(part, Level))


def _owned(sizes: Sizes, nodes: Sequence[Node]) -> Sizes:
    """Return sizes by node: what is under no node's name belongs to the nearest one above, else to the first."""
    names, owned = {node.name for node in nodes}, []
    for name, size in sizes.items():
        owner = name
        while owner and owner not in names:
            owner = owner.rpartition(".")[0]
        owned.append({owner or nodes[0].name: size})
    return add(owned)


def add(parts: Iterable[Sizes]) -> Sizes:
    """Return sums by name."""
    found: Sizes = {}
    for part in parts:
        for name, size in part.items():
            found[name] = found.get(name, Size()) + size
    return found


def _size(tensors: Iterable[Tensor]) -> Size:
    tensors = list(tensors)
    return Size(sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors))
