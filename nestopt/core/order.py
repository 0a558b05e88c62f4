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

    Within one frequency, the memory that is needed is the faster, whether directly or by way of others, of whatever
    frequency: a memory is as deep as the longest chain of those of its own frequency that it needs first.

    Raises:
        ValueError: memories need each other in a circle, or a name is given twice.
    """
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        twice = sorted({node.name for node in nodes if sum(other.name == node.name for other in nodes) > 1})
        raise ValueError(f"memories must have names of their own; given twice: {twice}")
    depths: dict[str, dict[int, int]] = {}

    def visit(node: Node, path: tuple[str, ...]) -> dict[int, int]:
        """Return, for each period, the longest chain of memories with it that ends here."""
        if node.name in path:
            raise ValueError(
                f"memories that need each other in a circle have no order: {' -> '.join((*path, node.name))}"
            )
        if node.name not in depths:
            longest: dict[int, int] = {}
            for name in node.after:
                if name in by_name:
                    for period, depth in visit(by_name[name], (*path, node.name)).items():
                        longest[period] = max(depth, longest.get(period, 0))
            depths[node.name] = {**longest, node.period: longest.get(node.period, 0) + 1}
        return depths[node.name]

    groups: dict[tuple[int, int], list[Node]] = {}
    for node in nodes:
        groups.setdefault((-node.period, -visit(node, ())[node.period]), []).append(node)
    return [groups[key] for key in sorted(groups)]
