"""Measures what levels keep and what a step of theirs costs, for the table of levels and for each level's page.

`sphinx-build` runs this; `python docs/figures/level_table.py` does so by hand. One weight matrix, float32, the
optimizer as it is; nothing is timed, so the numbers are the same on every machine whose kernels are the same.
"""

from __future__ import annotations

import dataclasses
import inspect
import textwrap
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import nestopt
from nestopt import Level
from nestopt.core.part import Part
from nestopt.optim import Nested

MADE = Path(__file__).parents[1] / "levels" / "made"

LEVELS = [
    "gd",
    "momentum",
    "preconditioned_momentum",
    "feature_momentum",
    "delta_momentum",
    "deep_momentum",
    "adam",
    "adamw",
    "regression_optimum",
    "ftrl",
    "second_moment",
    "matrix_adagrad",
    "shampoo",
    "soap",
    "newton_schulz",
    "muon",
    "m3",
    "cms",
    "dgd",
    "ggd",
    "average",
    "weight_average",
    "schedule_free",
]
SHAPE = (256, 512)
ROWS = 32
STEPS = 16
"""A period of m3 and of cms."""


class Traffic(TorchDispatchMode):
    """Counts the bytes that operations read and write; a view moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.is_view or func.overloadpacket.__name__ in _STILL:
            return out
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | (kwargs or {})
        written: list[Tensor] = []
        for argument in func._schema.arguments:
            tensors = _tensors(given.get(argument.name))
            changed = argument.alias_info is not None and argument.alias_info.is_write
            if changed and argument.name != "grads":  # fused kernels could unscale gradients, and are not asked to
                written += tensors
            if not (changed and (argument.name == "out" or func.overloadpacket.__name__ in _OVERWRITE)):
                self.bytes += _size(tensors)
        known = {id(tensor) for tensor in written}
        self.bytes += _size(written) + _size(new for new in _tensors(out) if id(new) not in known)
        return out


_STILL = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "detach", "_reshape_alias", "alias"})
_OVERWRITE = frozenset({"copy_", "zero_", "fill_"})


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one level on one matrix; costs are means over the steps counted.

    Attributes:
        state: bytes a parameter by state key.
        passes: bytes read and written for a step, over the bytes of the parameter.
        flops: of matrix products for a step, per parameter.
    """

    state: dict[str, float]
    passes: float
    flops: float


def measure(level: Level, shape: tuple[int, int] = SHAPE) -> Measured:
    """State and cost of `level` in nestopt's optimizer, for one float32 weight of a linear layer shown `ROWS` inputs.

    Cost is of all that a step takes beyond the forward and backward pass, such as what is summed up during these.
    """
    torch.manual_seed(0)
    layer = torch.nn.Linear(shape[1], shape[0], bias=False)
    optimizer = Nested([layer.weight], level, lr=1e-3)
    if "inputs" in level.needs:
        optimizer.watch(layer)
    plain = torch.nn.Linear(shape[1], shape[0], bias=False)
    moved = flops = 0
    start = getattr(level, "root_every", 1)  # the first step makes the state; in these shampoo always has a root to do
    for step in range(start + STEPS):
        inputs = torch.randn(ROWS, shape[1])
        with FlopCounterMode(display=False) as products, Traffic() as traffic:
            layer(inputs).square().mean().backward()
            optimizer.step()
        with FlopCounterMode(display=False) as others, Traffic() as base:
            plain(inputs).square().mean().backward()
        if step >= start:
            moved += traffic.bytes - base.bytes
            flops += products.get_total_flops() - others.get_total_flops()
        layer.weight.grad = plain.weight.grad = None
    size = layer.weight.numel()
    held = {key: _size([value]) / size for key, value in optimizer.state[layer.weight].items() if key != "step"}
    return Measured(held, moved / (STEPS * 4 * size), flops / (STEPS * size))


def what(level: Level) -> str:
    """The first paragraph of a level's docstring."""
    return " ".join((inspect.getdoc(type(level)) or "").split("\n\n")[0].split())


def memories(level: Level) -> str:
    """The kinds of memory that a level keeps, as `nestopt.describe` calls them, each once."""
    kinds = [memory["memory"] for memory in nestopt.describe(level).to_data()]
    return ", ".join(dict.fromkeys(kind for kind in kinds if kind != "none")) or "none"


def number(value: float) -> str:
    """In three digits or as a whole number."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def row(name: str, level: Level, found: Measured) -> str:
    cells = f"[`{name}`]({name}.md)<br>{what(level)}", memories(level), number(sum(found.state.values()))
    return f"| {' | '.join(cells)} | {number(found.passes)} | {number(found.flops)} |"


def page(level: Level, found: Measured) -> str:
    """State and cost for the level's own page."""
    keys = [f"| `{key}` | {number(size)} |" for key, size in found.state.items()]
    state = ["| state key | bytes a parameter |", "| --- | --- |", *keys] if keys else ["It keeps no state."]
    cost = (
        f"On a {SHAPE[0]} × {SHAPE[1]} matrix in float32 a step reads and writes {number(found.passes)} times the "
        f"parameter's bytes{_products(found)}. ([How this is measured](index.md#state-and-cost).)"
    )
    return "\n".join([*state, "", cost]) + "\n"


def defaults(name: str, level: Level) -> str:
    """The call that makes the level, with every argument at its default."""
    fields = sorted(dataclasses.fields(level), key=lambda field: field.kw_only)  # the period last
    given = ", ".join(f"{field.name}={_written(getattr(level, field.name))}" for field in fields)
    call = textwrap.fill(f"nestopt.levels.{name}({given})", 100, subsequent_indent="    ", break_long_words=False)
    return f"```python\n{call}\n```\n"


def _written(value: Any) -> str:
    if isinstance(value, Part):
        spec = nestopt.to_spec(value)
        if isinstance(spec, str):
            return f"{spec}()"
        own = {key: item for key, item in spec.items() if key != value.kind}
        return f"{spec[value.kind]}({', '.join(f'{key}={item!r}' for key, item in own.items())})"
    return repr(value)


def _products(found: Measured) -> str:
    return f", and its matrix products take {number(found.flops)} FLOPs a parameter" if found.flops else ""


def main() -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    head = "| level and what it is | memory | state, bytes a parameter | bytes moved, × parameter | FLOPs a parameter |"
    rows = [head, "| --- | --- | ---: | ---: | ---: |"]
    for name in LEVELS:
        level = nestopt.build("level", name)
        found = measure(level)
        rows.append(row(name, level, found))
        (MADE / f"{name}-defaults.inc").write_text(defaults(name, level), encoding="utf-8")
        (MADE / f"{name}-state.inc").write_text(page(level, found), encoding="utf-8")
    (MADE / "table.inc").write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
