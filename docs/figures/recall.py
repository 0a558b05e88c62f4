"""Draws the pictures on the pages of levels on tokens: what each memory still knows of its pairs as they arrive.

A level is shown pairs of a key and a value, one a token, and after each it is asked for all values so far, by their
keys, without being written to. `sphinx-build` runs this; `python docs/figures/recall.py` does so by hand. Grounds are
transparent, and what stands on the page is a grey that light and dark pages both show.
"""

from __future__ import annotations

import dataclasses
import math
import runpy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize, silu

import nestopt
from nestopt.core import AssociativeMemory, Gate, bind, gates_of
from nestopt.core.memories import Mlp, Window
from nestopt.core.part import Heads
from nestopt.core.tree import State, tree_map
from nestopt.levels import deltaproduct, dgd, dla, hgrn2, momentum, retnet, titans, ttt, window_attention

MADE = Path(__file__).parents[1] / "tokens" / "made"
SHARED = runpy.run_path(str(Path(__file__).with_name("trajectories.py")))
GREY, COLOURS, STYLE = SHARED["GREY"], SHARED["COLOURS"], SHARED["STYLE"]

DIM, PAIRS, HEADS = 32, 48, 4
LAST = 8
"""How many of the newest pairs one of the curves is about."""

WORST = 1.5
"""Errors from here on have one colour: one who always answers 0 has an error of 1."""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A level, and of its heads the one that is drawn."""

    level: AssociativeMemory
    head: int = 0


def pairs(level: AssociativeMemory) -> tuple[Tensor, Tensor]:
    """Keys and values `[1, PAIRS, HEADS, DIM]`, for every level and head the same, at random and of length 1.

    Keys are √DIM long where pairs are attended to: so long are those that an attention layer makes, which does not
    normalise them.
    """
    generator = torch.Generator().manual_seed(0)
    k, v = (normalize(torch.randn(PAIRS, DIM, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2))
    k = k * math.sqrt(DIM) if isinstance(level.memory, Window) else k
    return tuple(x[None, :, None].expand(1, PAIRS, HEADS, DIM) for x in (k, v))  # type: ignore[return-value]


def recall(shown: Shown) -> Tensor:
    """`[PAIRS, PAIRS]`: in row s, column t the error of pair s after t, ‖y - v‖ / ‖v‖; NaN before it was shown."""
    level = shown.level
    k, v = pairs(level)
    torch.manual_seed(0)  # an MLP starts at random
    starts = [level.learned_start(DIM, DIM) for _ in range(HEADS)]
    learned = {name: torch.stack([one[name].double() for one in starts]) for name in starts[0]}
    errors, state = torch.full((PAIRS, PAIRS), torch.nan, dtype=torch.float64), None
    for t in range(PAIRS):
        _, state = nestopt.ops.run(level, *(x[:, t : t + 1] for x in (k, k, v)), state=state, learned=learned)
        answers = asked(level, k[0, : t + 1, shown.head], state, shown.head)
        wrong = answers - v[0, : t + 1, shown.head]
        errors[: t + 1, t] = torch.linalg.vector_norm(wrong, dim=-1)
    return errors


def asked(level: AssociativeMemory, q: Tensor, state: State, head: int) -> Tensor:
    """What the memory in `state` answers to queries `[n, DIM]`, each asked of a copy that it does not change."""
    copies = tree_map(lambda x: x.expand(len(q), *x.shape[1:]), state)
    token = q[:, None, None].expand(-1, 1, HEADS, -1)
    if isinstance(level, deltaproduct):  # whose queries are several, side by side
        return nestopt.ops.run(level, token, token, token, state=copies, learn=False)[0][:, 0, head]
    if level.chunk_size == 1:
        theta = tree_map(lambda x: x[0, head], state["level"]["memory"])
        return bind(level).memory.read(theta, q)
    # within a chunk the memory is not there as such: so ask by a token that writes nothing and lets nothing fade
    quiet = {"lr": 0.0, "step_size": 0.0, "retention.keep": 1.0, "rule.beta": 0.0, "rule.of.beta": 0.0}
    gates = {
        path: q.new_full((len(q), 1, HEADS), quiet[path])
        for path, gate in gates_of(level).items()
        if not isinstance(gate, Heads)
    }
    y, _ = nestopt.ops.run(level, token, token, torch.zeros_like(token), gates=gates, state=copies)
    return y[:, 0, head]


# -- drawing -----------------------------------------------------------------------------------------------------------


def means(errors: Tensor) -> tuple[Tensor, Tensor]:
    """`[PAIRS]` each: the mean error of the last `LAST` pairs, and of all, after each token."""
    last = torch.stack([errors[max(0, t + 1 - LAST) : t + 1, t].mean() for t in range(PAIRS)])
    return last, errors.nanmean(0)


def draw(found: Mapping[str, Tensor], file: Path) -> None:
    with rc_context({**STYLE, "savefig.dpi": 200}):
        figure = Figure(figsize=(8.0, 3.3 * len(found)), layout="constrained")
        rows = figure.subplots(len(found), 2, squeeze=False, width_ratios=(1, 1.1))
        for (name, errors), (left, right) in zip(found.items(), rows, strict=True):
            edges = (0.5, PAIRS + 0.5, PAIRS + 0.5, 0.5)
            image = left.imshow(errors.numpy(), vmin=0, vmax=WORST, cmap="viridis", extent=edges)
            left.set(xlabel="pairs shown", ylabel="pair asked for")
            left.spines[:].set_visible(False)
            bar = figure.colorbar(image, ax=left, extend="max", shrink=0.85)
            bar.set_label("error of the answer")
            bar.outline.set_visible(False)
            _draw_means(right, name, errors)
        figure.savefig(file, transparent=True, metadata={"Date": None})


def _draw_means(axes: Axes, name: str, errors: Tensor) -> None:
    shown = range(1, PAIRS + 1)
    for values, words, colour in zip(means(errors), (f"last {LAST} pairs", "all pairs"), COLOURS, strict=False):
        axes.plot(shown, values, color=colour, linewidth=1.6, label=words)
    axes.axhline(1.0, color=GREY, linestyle=":", linewidth=1.2, label="an answer of 0")
    axes.set(xlabel="pairs shown", ylabel="mean error", ylim=(0, max(1.6, 1.05 * float(errors[~errors.isnan()].max()))))
    axes.set_title(name, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)


# -- the pages ---------------------------------------------------------------------------------------------------------


def _of(name: str) -> Callable[[], dict[str, Shown]]:
    """The level `name` as its defaults have it."""
    return lambda: {name: Shown(nestopt.build("level", name))}


RAW: dict[str, Any] = {"normalized": False, "lr": Gate(0.5), "memory": Mlp(), "forget": "all"}
"""The letter of a deep memory's equations, with a step from which these pairs can be learned."""

NAMES = (
    "attention forgetting_attention linear_attention gated_linear gla rwkv6 deltanet gated_deltanet kda rwkv7 comba "
    "deltaproduct oja omega yaad moneta memora atlas"
)
PICTURES: dict[str, Callable[[], dict[str, Shown]]] = {
    **{name: _of(name) for name in NAMES.split()},
    "window_attention": lambda: {"window_attention, size 16": Shown(window_attention(memory=Window(16)))},
    "hgrn2": lambda: {f"hgrn2, head {head}": Shown(hgrn2(), head) for head in (0, 3)},
    "retnet": lambda: {f"retnet, head {head}": Shown(retnet(), head) for head in (0, 3)},
    "ttt": lambda: {"ttt": Shown(ttt()), "ttt, raw η = 0.5": Shown(ttt(**RAW))},
    "titans": lambda: {
        "titans": Shown(titans()),
        "titans, raw η = 0.5": Shown(titans(**RAW)),
        "titans, raw, with delta decay": Shown(titans(rule=dgd(of=momentum(Gate(0.5))), **RAW)),
    },
    "dla": lambda: {"dla": Shown(dla()), "dla, raw η = 0.5": Shown(dla(**RAW))},
}


def caption(found: Mapping[str, Tensor], length: str) -> str:
    """What is seen, and how it ended."""
    ends = []
    for name, errors in found.items():
        last, every = (float(x[-1]) for x in means(errors))
        ends.append(f"{name}: {last:.2f} for the last {LAST}, {every:.2f} for all")
    return (
        f"{PAIRS} random pairs of {DIM} numbers, keys of length {length} and values of length 1, one a token; gates at "
        "their initial values. Left, after each pair (across) the error ‖y − v‖ / ‖v‖ of every pair so far (down), "
        f"asked for by its key: dark is known, bright is lost. Right, its mean. Mean errors after {PAIRS} pairs: "
        f"{'; '.join(ends)}."
    )


def make(name: str) -> None:
    """The picture for the page `name`, and its caption."""
    shown = PICTURES[name]()
    found = {key: recall(one) for key, one in shown.items()}
    draw(found, MADE / f"{name}.svg")
    length = f"√{DIM}" if isinstance(next(iter(shown.values())).level.memory, Window) else "1"
    alt = f"{', '.join(found)}: which of {PAIRS} pairs each still answers; mean errors are in the caption"
    text = f"```{{figure}} made/{name}.svg\n:alt: {alt}\n\n{caption(found, length)}\n```\n"
    (MADE / f"{name}-figure.inc").write_text(text, encoding="utf-8")


# -- the page on the step ----------------------------------------------------------------------------------------------

NAMED = {"raw, η = 0.5": 0.5, "normalized, lr = 1": 1.0, "layerwise, lr = 1": 1.0}
STEPS = {name: (name.split(",")[0], lr) for name, lr in NAMED.items()}
LONG = 1024


def surprises(alike: bool, step: str, lr: float) -> Tensor:
    """The root mean square error at each chunk's first state, `[chunks]`, of one MLP memory with momentum 0.9."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, v = normalize(random(1, 1 if alike else LONG, 1, DIM), dim=-1), normalize(random(1, LONG, 1, DIM), dim=-1)
    weights = [0.5 * random(DIM, 2 * DIM) / math.sqrt(2 * DIM), random(2 * DIM, DIM) / math.sqrt(DIM)]
    k = k.expand_as(v)
    settings: dict[str, Any] = {"lr": lr, "step": step, "decay": 0.99, "momentum": 0.9, "chunk": 16}
    found, state = [], None
    outer, inner = weights
    for keys, values in zip(k.split(16, dim=1), v.split(16, dim=1), strict=True):
        x = keys[0, :, 0]
        read = x + silu(x @ inner.T) @ outer.T
        found.append((read - values[0, :, 0]).square().sum(-1).mean().sqrt())
        _, state = nestopt.ops.deep_memory(keys, keys, values, weights=weights, **settings, state=state)
        outer, inner = (state["weights"][name][0, 0] for name in ("W1", "W2"))
    return torch.stack(found)


def make_step() -> None:
    """The picture for the page on the step, and its caption."""
    worst: dict[str, list[str]] = {}
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        for axes, keys in zip(figure.subplots(1, 2, sharey=True), ("random keys", "one key throughout"), strict=True):
            for (name, options), colour in zip(STEPS.items(), COLOURS, strict=True):
                errors = surprises(keys != "random keys", *options)
                worst.setdefault(keys, []).append(f"{name}: {_number(float(errors.max()))}")
                axes.semilogy(torch.arange(1, len(errors) + 1) * 16, errors, color=colour, linewidth=1.6, label=name)
            axes.set(xlabel="tokens", ylim=(0.3, 1e4), title=keys)
            axes.spines[["top", "right"]].set_visible(False)
        figure.axes[0].set_ylabel("error before each chunk")
        figure.axes[0].legend(frameon=False, fontsize=9)
        figure.savefig(MADE / "step.svg", transparent=True, metadata={"Date": None})
    words = (
        f"The root mean square error ‖M(k) − v‖ that each chunk of 16 tokens finds in an MLP memory of {DIM} numbers "
        f"and {2 * DIM} hidden units, with α = 0.99 and momentum θ = 0.9, always from the same random weights. Keys "
        "and values have length 1, and values are new at every token: nothing is to be learned below 1. The greatest: "
        + "; ".join(f"with {keys} {', '.join(found)}" for keys, found in worst.items())
        + "."
    )
    alt = "errors over tokens for raw and normalised steps; the greatest are in the caption"
    text = f"```{{figure}} made/step.svg\n:alt: {alt}\n\n{words}\n```\n"
    (MADE / "step-figure.inc").write_text(text, encoding="utf-8")


def _number(error: float) -> str:
    return f"{error:.2g}" if math.isfinite(error) else "not finite"


def main() -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and a sum's order is then always the same
    try:
        for name in PICTURES:
            make(name)
        make_step()
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
