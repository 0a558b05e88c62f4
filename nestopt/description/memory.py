"""One memory as it is described, and the order of memories across contexts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from nestopt.core.order import Node, ordered

Context = Literal["tokens", "gradients"]

UNITS: dict[str, str] = {"tokens": "token", "gradients": "step"}
WEIGHTS = "weights"


@dataclasses.dataclass(frozen=True)
class Memory:
    """One memory of a description.

    Attributes:
        name: unique within the description; of a memory in a module, its path there.
        context: what it compresses, `"tokens"` or `"gradients"`.
        period: steps of its context between updates; None for weights that no optimizer has.
        memory: where its associations are kept (`"matrix"`, `"vector"`, ..., `"weights"` for what a model is made of).
        objective, rule: by what it learns; empty where that is not known.
        parameters: how many numbers it holds, or None where that is not known. On tokens: for one sequence.
        state: its size in bytes with the buffers of its clock, or None. On tokens: for one sequence.
        needs: names of the memories whose state at a step this one's update at that step needs.
        grows: whether it gets larger with every token.
    """

    name: str
    context: Context
    period: int | None
    memory: str = ""
    objective: str = ""
    rule: str = ""
    parameters: int | None = None
    state: int | None = None
    needs: tuple[str, ...] = ()
    grows: bool = False

    @property
    def frequency(self) -> str:
        """`"every token"`, `"every 16 steps"`, ..., or `"fixed"`."""
        if self.period is None:
            return "fixed"
        unit = UNITS[self.context]
        return f"every {unit}" if self.period == 1 else f"every {self.period} {unit}s"

    def to_data(self) -> dict[str, Any]:
        data = dataclasses.asdict(self)
        return {"name": self.name, "frequency": self.frequency, **data, "needs": list(self.needs)}

    @classmethod
    def from_node(cls, node: Node, context: Context, **more: Any) -> Memory:
        """Make the memory of a core node, which counts its period in steps of `context`."""
        return cls(
            name=node.name,
            context=context,
            period=node.period,
            memory=node.memory,
            objective=node.objective,
            rule=node.rule,
            needs=node.after,
            **more,
        )


def in_levels(memories: Sequence[Memory]) -> list[list[Memory]]:
    """Return levels, slowest first: what is fixed, then what learns from step to step, then from token to token.

    Within a context the order is that of NL Def. 2. A sequence passes between two optimizer steps, so tokens are the
    faster context. Raises ValueError for a name given twice.
    """
    by_name = {memory.name: memory for memory in memories}
    if len(by_name) != len(memories):
        names = [memory.name for memory in memories]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"memories must have names of their own; given twice: {twice}")
    fixed = [memory for memory in memories if memory.period is None]
    levels = [fixed] if fixed else []
    for context in ("gradients", "tokens"):
        nodes = [Node(m.name, m.period, m.needs) for m in memories if m.context == context and m.period is not None]
        levels += [[by_name[node.name] for node in level] for level in ordered(nodes)]
    return levels
