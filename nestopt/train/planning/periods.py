"""What a continuum costs per number of levels and period, before it is trained."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from nestopt.config import Config, ConfigError, ModelConfig
from nestopt.core.memories import Mlp
from nestopt.levels.continuum.level import Cms
from nestopt.models.build import build_model
from nestopt.models.continua import with_learning
from nestopt.models.cost import Cost, state_bytes, step_cost
from nestopt.nn.hope import Learn
from nestopt.train.errors import extra
from nestopt.train.run import check_precision
from nestopt.train.tables import grid

with extra("train"):
    from tqdm import tqdm


@dataclasses.dataclass(frozen=True)
class Machine:
    """How fast a machine is at this kind of work, as measured.

    Attributes:
        per_flop, per_byte, per_op: seconds each.
    """

    per_flop: float
    per_byte: float
    per_op: float

    def seconds(self, cost: Cost) -> float:
        return self.per_flop * cost.flops + self.per_byte * cost.bytes + self.per_op * cost.ops

    @classmethod
    def measured(cls, section: ModelConfig, batch: int, window: int, *, repeat: int = 3) -> Machine:
        """Measure this one: least squares of relative errors over small models as wide, none of which is planned."""
        costs, seconds = [], []
        for model, size, length in _PROBES:
            probe = section.model_copy(update={"blocks": 1, "mlps": [], "segment": 0})
            probe = with_periods(probe, model)
            rows, tokens = max(1, batch // size), max(2, window // length)
            costs.append(step_cost(probe, rows, tokens))
            seconds.append(step_seconds(probe, rows, tokens, repeat=repeat))
        table = np.array([[c.flops, c.bytes, c.ops] for c in costs], dtype=np.float64)
        scale = table.max(axis=0)
        found = _nonnegative(table / scale / np.array(seconds)[:, None], np.ones(len(seconds))) / scale
        return cls(*map(float, found))


_PROBES: list[tuple[tuple[int, ...] | None, int, int]] = [
    (None, 1, 1),
    (None, 2, 1),
    (None, 1, 4),
    ((24,), 1, 1),
    ((24,), 2, 2),
    ((12, 40), 1, 2),
    ((48,), 1, 1),
]
"""Periods in context (None: static), and by what batch and window are divided."""


def _nonnegative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the least squares of a x = b with x >= 0: of so few unknowns, the best over all subsets."""
    best, least = np.zeros(a.shape[1]), np.inf
    for mask in range(1, 1 << a.shape[1]):
        chosen = [i for i in range(a.shape[1]) if mask >> i & 1]
        x, *_ = np.linalg.lstsq(a[:, chosen], b, rcond=None)
        error = float(((a[:, chosen] @ x - b) ** 2).sum())
        if (x >= 0).all() and error < least:
            best, least = np.zeros(a.shape[1]), error
            best[chosen] = x
    return best


def with_periods(section: ModelConfig, periods: tuple[int, ...] | None) -> ModelConfig:
    """Return the section with these periods in context, where its continua learn so; None is one static MLP.

    All have as many weights as the section's own: the levels share its hidden units.
    """
    return with_learning(section, lambda mlp: _with_periods(mlp, section.dim, periods))


def _with_periods(own: Cms, dim: int, periods: tuple[int, ...] | None) -> Cms:
    memory = own.block(dim)
    count = len(own.periods)
    if isinstance(memory, Mlp) and memory.hidden is not None:
        hidden = max(1, memory.hidden * count // (1 if periods is None else len(periods)))
        memory = dataclasses.replace(memory, hidden=hidden)
    if periods is None:
        return Cms(periods=(1,), memory=memory)
    teach = own.teach if own.learn == "context" else "loss"
    return dataclasses.replace(own, periods=periods, memory=memory, learn="context", teach=teach, weights=None)


def step_seconds(section: ModelConfig, batch: int, window: int, *, learn: Learn = True, repeat: int = 5) -> float:
    """Return the least time of a forward and backward pass, after one that is not counted."""
    model = build_model(section)
    tokens = torch.randint(section.vocab, (batch, window))
    best = float("inf")
    for i in range(repeat + 1):
        begin = time.perf_counter()
        logits, _ = model(tokens, learn=learn)
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        if i:
            best = min(best, time.perf_counter() - begin)
        model.zero_grad()
    return best


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the plan.

    Attributes:
        periods: of the levels in context; None: one static MLP.
        cost: of a forward and backward pass of one batch.
        state: bytes of one sequence's state.
        seconds: expected.
        measured: seconds, where they were measured.
    """

    periods: tuple[int, ...] | None
    cost: Cost
    state: int
    seconds: float
    measured: float | None = None


PERIODS: tuple[tuple[int, ...] | None, ...] = (
    None,
    (16,),
    (32,),
    (64,),
    (128,),
    (16, 64),
    (32, 128),
    (16, 32, 64, 128),
)


def choice(text: str) -> tuple[int, ...] | None:
    """Return periods as they are typed: `16,64`; `static` is None.

    Raises:
        ConfigError: for anything else.
    """
    if text == "static":
        return None
    try:
        periods = tuple(int(part) for part in text.split(","))
    except ValueError:
        periods = (0,)
    if min(periods) < 1:
        raise ConfigError.refuse("--periods", text, "give whole numbers of tokens, 1 or more, such as 16,64; or static")
    return periods


def plan(
    config: Config,
    periods: Sequence[tuple[int, ...] | None] = PERIODS,
    *,
    machine: Machine | None = None,
    check: bool = False,
    quiet: bool = True,
) -> list[Row]:
    """Plan the cost of a training step for each choice of levels and periods of the config's model.

    Args:
        config: its model, batch and window are planned for.
        periods: choices of levels; None is one static MLP.
        machine: how fast; None measures this one, on small models (some seconds).
        check: also measure each, to see how near the expectation is.
        quiet: no progress bar.

    Raises:
        ConfigError: a precision of memories that the CPU, on which this is planned and measured, lacks.
    """
    check_precision(config, torch.device("cpu"))
    section, data = config.model, config.data
    if threads := config.threads:
        torch.set_num_threads(threads)  # as training will
    machine = Machine.measured(section, data.batch, data.window) if machine is None else machine
    rows = []
    for choice in tqdm(periods, desc="planning", leave=False, disable=quiet):
        chosen = with_periods(section, choice)
        cost = step_cost(chosen, data.batch, data.window)
        measured = step_seconds(chosen, data.batch, data.window) if check else None
        rows.append(Row(choice, cost, state_bytes(chosen), machine.seconds(cost), measured))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return the plan as text; slowdowns are against its first row."""
    head = ["levels", "periods", "GFLOP", "GB moved", "state/sequence", "step", "slowdown"]
    checked = any(row.measured is not None for row in rows)
    lines = [head + (["measured", "error"] if checked else [])]
    for row in rows:
        line = [
            "static" if row.periods is None else str(len(row.periods)),
            "-" if row.periods is None else ", ".join(map(str, row.periods)),
            f"{row.cost.flops / 1e9:.2f}",
            f"{row.cost.bytes / 1e9:.2f}",
            f"{row.state / 2**20:.2f} MiB",
            f"{row.seconds * 1e3:.0f} ms",
            f"{row.seconds / rows[0].seconds:.2f}",
        ]
        if row.measured is not None:
            line += [f"{row.measured * 1e3:.0f} ms", f"{row.seconds / row.measured - 1:+.0%}"]
        lines.append(line)
    return "\n".join(grid(lines))
