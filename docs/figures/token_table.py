"""Makes the table of levels on tokens, and what each costs and keeps, for their pages.

`sphinx-build` runs this; `python docs/figures/token_table.py` does so by hand. FLOPs are counted in `nestopt.ops.run`
as it runs and state is what it returns; nothing is timed, so the numbers are the same on every machine. Beside them
stand formulas, which the tests compare with what is counted.
"""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import normalize
from torch.utils.flop_counter import FlopCounterMode

import nestopt
from nestopt.core import AssociativeMemory, Gate, gates_of
from nestopt.core.memories import Mlp, Window
from nestopt.core.part import Channels, Heads
from nestopt.core.pending import PENDING
from nestopt.core.tree import State, leaves
from nestopt.ops import fast_form

MADE = Path(__file__).parents[1] / "tokens" / "made"
SHARED = runpy.run_path(str(Path(__file__).with_name("level_table.py")))

DIM, TOKENS = 64, 512
MATRIX_CHUNKS = {
    "linear_attention": 32,
    "hgrn2": 32,
    "rwkv6": 32,
    "delta_rule": 32,
    "rwkv7": 32,
    "comba": 32,
    "deltaproduct": 32,
    "oja": 64,
    "omega": 64,
    "attention": 64,
    "forgetting_attention": 128,
}
"""The `chunk` of the operations on matrix memories, on a CPU."""


@dataclasses.dataclass(frozen=True)
class Size:
    """What costs depend on: D = D_k = D_v, C, h, c, and n, how many pairs there are."""

    dim: int
    chunk: int
    hidden: int
    window: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class Formula:
    """In symbols, and as a function of the same."""

    words: str
    value: Callable[[Size], float]


ALL_PAIRS = Formula("$2n(D_k + D_v)$", lambda s: 4 * s.pairs * s.dim)
WINDOW = Formula(
    "$4c\\,(1 - c/2n)\\,(D_k + D_v)$", lambda s: 8 * s.window * s.dim * (1 - s.window / (2 * s.pairs))
)  # the first c tokens have no block before them
BLOCKS = Formula("$(n + C)(D_k + D_v)$", lambda s: 2 * (s.pairs + s.chunk) * s.dim)
SUM = Formula("$4D_kD_v + 2C(D_k + D_v)$", lambda s: 4 * s.dim**2 + 4 * s.chunk * s.dim)
CORRECTED = Formula("$6D_kD_v + 4C(D_k + D_v)$", lambda s: 6 * s.dim**2 + 8 * s.chunk * s.dim)
SUM_BY_CHANNEL = Formula(
    "$4D_kD_v + (C - 2)D_k + 2CD_v$", lambda s: 4 * s.dim**2 + (s.chunk - 2) * s.dim + 2 * s.chunk * s.dim
)
CORRECTED_BY_CHANNEL = Formula(
    "$6D_kD_v + 2(C - 2)D_k + 2CD_v$", lambda s: 6 * s.dim**2 + 2 * (s.chunk - 2) * s.dim + 2 * s.chunk * s.dim
)
RANK_ONE = Formula(
    "$8D_kD_v + 4(C - 2)D_k + 6CD_v$", lambda s: 8 * s.dim**2 + 4 * (s.chunk - 2) * s.dim + 6 * s.chunk * s.dim
)
PRODUCT = Formula("$6D_kD_v/n + 4C(D_k + D_v)$", lambda s: 6 * s.dim**2 / s.window + 8 * s.chunk * s.dim)
"""Of C writes at once, n a token. Above: within halves of one token no product of matrices is made."""
OMEGA = Formula(
    "$(4c + 2)D_kD_v + 2(c + 1)C(D_k + D_v)$",
    lambda s: (4 * s.window + 2) * s.dim**2 + 4 * (s.window + 1) * s.chunk * s.dim,
)
MLP = Formula(
    "$18Dh + C(14D + 10h) + 2h$",
    lambda s: 18 * s.dim * s.hidden + s.chunk * (14 * s.dim + 10 * s.hidden) + 2 * s.hidden,
)
MLP_WITH_MOMENTUM = Formula(
    "$32Dh + C(14D + 10h) + 4C(C + 1) + 2h$",
    lambda s: MLP.value(s) + 14 * s.dim * s.hidden + 4 * s.chunk * (s.chunk + 1),
)
MLP_OF_DOT = Formula(
    "$28Dh + 6C(D + h) + 4C(C + 1) + 2h$",
    lambda s: 28 * s.dim * s.hidden + 6 * s.chunk * (s.dim + s.hidden) + 4 * s.chunk * (s.chunk + 1) + 2 * s.hidden,
)
"""Of chunks of 64 tokens, which are a block each."""
MLP_TOGETHER = Formula(
    "$14Dh + 6C(D + h) + 2h$", lambda s: 14 * s.dim * s.hidden + 6 * s.chunk * (s.dim + s.hidden) + 2 * s.hidden
)
MLP_AT_ONCE = Formula(
    "$(18 + 4/C)Dh + 2C(D + h)$",
    lambda s: (18 + 4 / s.chunk) * s.dim * s.hidden + 2 * s.chunk * (s.dim + s.hidden),
)
ORTHOGONALISED = Formula(
    "$6D^2h + 8Dh + (2D^2h + 2Dh + 20D^2h(1 + h) + 10D^3 + 10h^3)/C$",
    lambda s: (
        6 * s.dim**2 * s.hidden
        + 8 * s.dim * s.hidden
        + (
            2 * s.dim**2 * s.hidden
            + 2 * s.dim * s.hidden
            + 20 * s.dim**2 * s.hidden * (1 + s.hidden)
            + 10 * s.dim**3
            + 10 * s.hidden**3
        )
        / s.chunk
    ),
)
"""Where D is at most h, and h at most D²."""
FLOPS = {
    "attention": ALL_PAIRS,
    "window_attention": WINDOW,
    "forgetting_attention": BLOCKS,
    "linear_attention": SUM,
    "retnet": SUM,
    "gated_linear": SUM,
    "gla": SUM_BY_CHANNEL,
    "hgrn2": SUM_BY_CHANNEL,
    "rwkv6": SUM_BY_CHANNEL,
    "deltanet": CORRECTED,
    "gated_deltanet": CORRECTED,
    "kda": CORRECTED_BY_CHANNEL,
    "rwkv7": RANK_ONE,
    "comba": CORRECTED,
    "deltaproduct": PRODUCT,
    "oja": CORRECTED,
    "omega": OMEGA,
    "ttt": MLP,
    "titans": MLP_WITH_MOMENTUM,
    "dla": MLP_OF_DOT,
    "yaad": MLP_TOGETHER,
    "moneta": MLP_AT_ONCE,
    "memora": MLP_AT_ONCE,
    "atlas": ORTHOGONALISED,
}
"""Of matrix products, a token and head, by level."""

GROWS = Formula("$n(D_k + D_v)$", lambda s: 2 * s.pairs * s.dim)
GROWS_AND_FADES = Formula("$n(D_k + D_v + 1)$", lambda s: 2 * s.pairs * s.dim + s.pairs)
KEPT = Formula("$c(D_k + D_v)$", lambda s: 2 * s.window * s.dim)
ONE_MATRIX = Formula("$D_kD_v$", lambda s: s.dim**2)
MATRIX_AND_PAIRS = Formula("$D_kD_v + (c - 1)(D_k + D_v + 1)$", lambda s: s.dim**2 + (s.window - 1) * (2 * s.dim + 1))
MATRIX_AND_KEY = Formula("$D_kD_v + D_k$", lambda s: s.dim**2 + s.dim)
MATRIX_AND_KEYS = Formula("$D_kD_v + 2D_k$", lambda s: s.dim**2 + 2 * s.dim)
MATRIX_AND_NUMBERS = Formula("$D_kD_v + 2$", lambda s: s.dim**2 + 2)
SMALL_MATRIX = Formula("$D_kD_v/n^2$", lambda s: s.dim**2 / s.window**2)
WEIGHTS = Formula("$2Dh$", lambda s: 2 * s.dim * s.hidden)
WEIGHTS_AND_MOMENTA = Formula("$4Dh$", lambda s: 4 * s.dim * s.hidden)
FEATURED = Formula("$2h(D + D^2)$", lambda s: 2 * s.hidden * (s.dim + s.dim**2))
STATE = {
    **dict.fromkeys(FLOPS, ONE_MATRIX),
    "rwkv6": MATRIX_AND_KEY,
    "rwkv7": MATRIX_AND_KEYS,
    "comba": MATRIX_AND_NUMBERS,
    "deltaproduct": SMALL_MATRIX,
    "attention": GROWS,
    "window_attention": KEPT,
    "forgetting_attention": GROWS_AND_FADES,
    "omega": MATRIX_AND_PAIRS,
    "ttt": WEIGHTS,
    "titans": WEIGHTS_AND_MOMENTA,
    "dla": WEIGHTS_AND_MOMENTA,
    "yaad": WEIGHTS,
    "moneta": WEIGHTS_AND_MOMENTA,
    "memora": WEIGHTS_AND_MOMENTA,
    "atlas": FEATURED,
}
"""Numbers of a sequence and head, by level; of memories in chunks, at the start of one."""


def preset(name: str) -> AssociativeMemory:
    level = nestopt.build("level", name)
    assert isinstance(level, AssociativeMemory)
    return level


def size_of(level: AssociativeMemory, dim: int, pairs: int) -> Size:
    memory = level.memory
    window = memory.size if isinstance(memory, Window) else getattr(level, "window", getattr(level, "writes", 1))
    chunk = level.chunk_size if isinstance(memory, Mlp) else MATRIX_CHUNKS[fast_form(level) or ""]
    hidden = (memory.hidden or 2 * dim) if isinstance(memory, Mlp) else 0
    return Size(dim, chunk, hidden, window or 0, pairs)


@dataclasses.dataclass(frozen=True)
class Measured:
    """Of one level and head at some width.

    Attributes:
        flops: of matrix products a token.
        state: numbers kept after all tokens, at the start of a chunk.
        pending: numbers at most that tokens of a chunk that is not over add to that.
        grows: numbers that each further token adds for good.
    """

    flops: float
    state: int
    pending: int
    grows: int


def measure(level: AssociativeMemory, dim: int = DIM, tokens: int = TOKENS) -> Measured:
    """What `level` takes for `tokens` of one sequence and head, a multiple of its chunk, and what it then keeps."""
    torch.manual_seed(0)
    q, k, v = (normalize(torch.randn(1, tokens + 1, 1, dim), dim=-1) for _ in range(3))

    def after(count: int) -> State:
        shown = [x[:, :count] for x in (q, k, v)]
        # a gate that is not given is one number
        gates = {
            path: torch.full_like(shown[1], g.init) for path, g in gates_of(level).items() if isinstance(g, Channels)
        }
        return nestopt.ops.run(level, *shown, gates=gates)[1]

    with torch.no_grad():
        # torch counts nothing for its fused attention on CPUs, which has the same products
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
            state = after(tokens)
        held = numbers(state["level"])
        pending = numbers(after(tokens - 1).get(PENDING, {}))
        grows = numbers(after(tokens + 1)["level"]) - held
    return Measured(counted.get_total_flops() / tokens, held, pending, grows)


def numbers(state: State) -> int:
    return sum(leaf.numel() for _, leaf in leaves(state))


def cost(name: str, found: Measured) -> str:
    """State and cost for the level's own page."""
    sizes = f"D_k = D_v = {DIM}"
    level = preset(name)
    size = size_of(level, DIM, TOKENS)
    if isinstance(level.memory, Mlp):
        sizes = f"D = {DIM}, h = {size.hidden}, C = {size.chunk}"
    elif not isinstance(level.memory, Window):
        sizes += f", C = {size.chunk}"
    if size.window > 1:
        sizes += f", {'n' if hasattr(level, 'writes') else 'c'} = {size.window}"
    if isinstance(level.memory, Window):
        sizes += f", n = {TOKENS}"
    rows = [
        f"| of one sequence and head | | at ${sizes}$ |",
        "| --- | --- | ---: |",
        f"| FLOPs of matrix products a token | {FLOPS[name].words} | {found.flops:,.0f} |",
        f"| numbers of state | {STATE[name].words} | {found.state:,} |",
    ]
    if found.pending:
        gates = found.pending // (level.chunk_size - 1) - 2 * DIM
        words = f"at most $(C - 1)(2D + {gates})$"
        rows.append(f"| and of tokens of a chunk that is not over | {words} | {found.pending:,} |")
    return "\n".join([*rows, "", "([How this is measured](index.md#state-and-cost).)"]) + "\n"


def row(name: str, level: AssociativeMemory) -> str:
    """What the level is made of."""
    parts = [level.objective.label, level.rule.label, retention(level)]
    if isinstance(level.memory, Window):
        kept = "all" if level.memory.size is None else f"the last {level.memory.size}"
        parts = ["softmax", "append", f"{kept}; of each {retention(level)}" if level.fades_pairs else kept]
    cells = [f"[`{name}`]({name}.md)", level.memory.label, *parts, f"`{fast_form(level)}`"]
    return f"| {' | '.join(cells)} |"


def cost_row(name: str, level: AssociativeMemory, found: Measured) -> str:
    """What it keeps and costs."""
    state = f"{found.grows} a token" if found.grows else f"{found.state:,}"
    if found.pending:
        state += f" + {found.pending:,}"
    return f"| [`{name}`]({name}.md) | {level.chunk_size} | {state} | {found.flops:,.0f} |"


def retention(level: AssociativeMemory) -> str:
    """In words: what of a memory is kept."""
    if isinstance(level, nestopt.levels.hgrn2):
        return "by its keys, for each channel"
    keep = getattr(level.retention, "keep", None)
    if keep is None:
        return "all"
    if isinstance(keep, Heads):
        return f"{keep.init:g} and up, by head"
    if isinstance(keep, Channels):
        return f"a gate for each channel, from {keep.init:g}"
    return f"a gate, from {keep.init:g}" if isinstance(keep, Gate) else f"{keep:g}"


def main() -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    rows = ["| level | memory | objective | rule | kept | closed form |", "| --- | --- | --- | --- | --- | --- |"]
    costs = ["| level | tokens at a time | numbers of state | FLOPs a token |", "| --- | ---: | ---: | ---: |"]
    for name in FLOPS:
        level = preset(name)
        found = measure(level)
        rows.append(row(name, level))
        costs.append(cost_row(name, level, found))
        (MADE / f"{name}-cost.inc").write_text(cost(name, found), encoding="utf-8")
        (MADE / f"{name}-defaults.inc").write_text(SHARED["defaults"](name, level), encoding="utf-8")
    for name in ("self_modifying", "cms", "mesa", "log_linear"):
        own = SHARED["defaults"](name, nestopt.build("level", name))
        (MADE / f"{name}-defaults.inc").write_text(own, encoding="utf-8")
    (MADE / "table.inc").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (MADE / "costs.inc").write_text("\n".join(costs) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
