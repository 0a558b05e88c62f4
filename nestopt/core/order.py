"""The order of levels (NL Def. 2): A is faster than B if it is updated more often, or as often and B needs A first."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Node:
    """One memory in a nest.

    Attributes:
        name: readable path, unique within a description.
        period: steps of the context between its updates; its frequency is 1 / period.
        after: names of the memories whose state at a step this one's update at that step needs.
        memory, objective, rule: what it is, in words, for `describe`.
        context: what it compresses.
    """

    name: str
    period: int
    after: tuple[str, ...] = ()
    memory: str = ""
    objective: str = ""
    rule: str = ""
    context: str = "gradients"


def ordered(nodes: Sequence[Node]) -> list[list[Node]]:
    """Sort memories into levels, slowest first. Memories of which neither comes before the other share a level.

    Within one frequency, a memory is as deep as the longest chain of memories that it needs first; the one that is
    needed is the faster. Raises ValueError when memories of one frequency need each other in a circle, or a name is
    given twice.
    """
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        twice = sorted({node.name for node in nodes if sum(other.name == node.name for other in nodes) > 1})
        raise ValueError(f"memories must have names of their own; given twice: {twice}")
    depth: dict[str, int] = {}

    def visit(node: Node, path: tuple[str, ...]) -> int:
        if node.name in path:
            raise ValueError(
                f"memories that need each other in a circle have no order: {' -> '.join((*path, node.name))}"
            )
        if node.name not in depth:
            same = [by_name[name] for name in node.after if name in by_name and by_name[name].period == node.period]
            depth[node.name] = 1 + max((visit(other, (*path, node.name)) for other in same), default=-1)
        return depth[node.name]

    groups: dict[tuple[int, int], list[Node]] = {}
    for node in nodes:
        groups.setdefault((-node.period, -visit(node, ())), []).append(node)
    return [groups[key] for key in sorted(groups)]
