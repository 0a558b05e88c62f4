"""Draws the pictures on the pages of levels: how each descends a problem that it shares with the others.

Every picture shows a level beside plain gradient descent and momentum: the same start, the same number of steps, each
with the learning rate of one grid that serves it best, by its loss at the end. `sphinx-build` runs this;
`python docs/figures/trajectories.py` does so by hand. Grounds are transparent, and what stands on the page is a grey
that light and dark pages both show.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

import nestopt
from nestopt import Level
from nestopt.core.objectives import Dot
from nestopt.levels import dgd, gd, ggd, m3, momentum, second_moment, weight_average
from nestopt.optim import Nested

MADE = Path(__file__).parents[1] / "levels" / "made"

STEPS = 100
RATES = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0)

DIVERGED = 10.0
"""A run whose loss passes this many times the first is given up."""

GREY = "#76808b"
COLOURS = ("#d55e00", "#0096c7", "#a35fb0")  # apart for every kind of colour vision, on white and on black
REFERENCES: dict[str, tuple[Level, str]] = {"gd": (gd(), ":"), "momentum": (momentum(0.9), "--")}
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "nestopt",
    "font.size": 10,
    "text.color": GREY,
    "axes.labelcolor": GREY,
    "axes.edgecolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}


class Problem(nn.Module):
    """Calling it gives the loss of `weight`."""

    words: str
    weight: nn.Parameter


class Plane(Problem):
    """A problem of two weights, which can be drawn from above."""

    view: tuple[float, float, float, float]

    def height(self, weights: Tensor) -> Tensor:
        """The loss at each of `weights [..., 2]`."""
        raise NotImplementedError


class Valley(Plane):
    words = "a curved valley, $f(x, y) = 0.1\\,(1-x)^2 + 0.3\\,(y-x^2)^2$ from $(-1.5, 2)$, least at $(1, 1)$"
    view = (-2.0, 2.0, -1.0, 2.8)

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-1.5, 2.0], dtype=torch.float64))

    def height(self, weights: Tensor) -> Tensor:
        x, y = weights.unbind(-1)
        return 0.1 * (1 - x) ** 2 + 0.3 * (y - x**2) ** 2

    def forward(self) -> Tensor:
        return self.height(self.weight)


class Layer(Plane):
    words = (
        "a linear layer of two weights that learns $y = 2x_1 + x_2$ from 64 correlated inputs, $f = $ mean "
        "$\\frac12(Wx - y)^2$ from $W = (-1.5, 2)$, least at $(2, 1)$"
    )
    view = (-2.0, 2.6, -1.0, 2.8)

    def __init__(self) -> None:
        super().__init__()
        draw = torch.randn(64, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self.inputs = draw @ torch.tensor([[1.0, 0.6], [0.0, 0.4]], dtype=torch.float64)
        self.answers = self.inputs @ torch.tensor([[2.0], [1.0]], dtype=torch.float64)
        self.linear = nn.Linear(2, 1, bias=False, dtype=torch.float64)
        nn.init.zeros_(self.linear.weight).data += torch.tensor([[-1.5, 2.0]])
        self.weight = self.linear.weight

    def height(self, weights: Tensor) -> Tensor:
        return 0.5 * (weights @ self.inputs.mT - self.answers.mT).square().mean(-1)

    def forward(self) -> Tensor:
        return 0.5 * (self.linear(self.inputs) - self.answers).square().mean()


class Target(Problem):
    words = (
        "16 × 24 weights that are to become $T$, $f = \\frac12\\lVert A\\,(W-T)\\,C\\rVert_F^2$ from $W = 0$, where "
        "$A$ and $C$ have singular values from 1 to 0.18 and the entries of $T$ are random"
    )

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.left, self.right = (_ill_conditioned(size, generator) for size in (16, 24))
        self.target = torch.randn(16, 24, generator=generator, dtype=torch.float64)
        self.weight = nn.Parameter(torch.zeros_like(self.target))

    def forward(self) -> Tensor:
        return 0.5 * (self.left @ (self.weight - self.target) @ self.right).square().sum()


def _ill_conditioned(size: int, generator: torch.Generator, condition: float = 30.0) -> Tensor:
    turn, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, -math.log10(condition) / 2, size, dtype=torch.float64)
    return turn * values @ turn.mT


@dataclasses.dataclass(frozen=True)
class Run:
    """How one level fared: at which learning rate, the loss before each step and at the end, the weights likewise."""

    rate: float
    losses: list[float]
    weights: Tensor

    @property
    def loss(self) -> float:
        """At the end; infinite if the run diverged."""
        return self.losses[-1]


def descend(kind: type[Problem], level: Level, rate: float) -> Run:
    """`STEPS` steps with nestopt's optimizer, at a rate that falls linearly to 0."""
    problem = kind()
    optimizer = Nested([problem.weight], level, lr=rate)
    if "inputs" in level.needs:
        optimizer.watch(problem)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / STEPS)
    losses, weights = [], [problem.weight.detach().clone()]
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = problem()
        losses.append(loss.item())
        if not losses[-1] <= DIVERGED * losses[0]:
            return Run(rate, [*losses, math.inf], torch.stack(weights))
        loss.backward()
        optimizer.step()
        schedule.step()
        weights.append(problem.weight.detach().clone())
    optimizer.eval()
    return Run(rate, [*losses, problem().item()], torch.stack(weights))


def best(kind: type[Problem], level: Level) -> Run:
    """The run that ends lowest of one at each of `RATES`; of several that end within 1 % of it, the one of least rate.

    Raises ValueError if that is at an end of the grid.
    """
    runs = [descend(kind, level, rate) for rate in RATES]
    least = min(run.loss for run in runs)
    found = next(run for run in runs if run.loss <= 1.01 * least)
    if found in (runs[0], runs[-1]):
        raise ValueError(f"{level.label}: the best learning rate is {found.rate:g}, at the end of the grid; extend it")
    return found


# -- drawing -----------------------------------------------------------------------------------------------------------


def draw(kind: type[Problem], shown: Mapping[str, Run], references: Mapping[str, Run], file: Path) -> None:
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        lines = [(name, run, {"color": GREY, "linestyle": REFERENCES[name][1]}) for name, run in references.items()]
        lines += [(name, run, {"color": colour}) for (name, run), colour in zip(shown.items(), COLOURS, strict=False)]
        if issubclass(kind, Plane):
            _draw_plane(left, kind(), lines)
            _draw_losses(right, lines)
        else:
            _draw_losses(left, lines)
            _draw_spectra(right, lines)
        figure.legend(
            *left.get_legend_handles_labels(),
            loc="outside upper center",
            ncols=min(4, len(lines)),
            frameon=False,
            handlelength=3,
        )
        figure.savefig(file, transparent=True, metadata={"Date": None})


Lines = list[tuple[str, Run, dict[str, Any]]]


def _draw_plane(axes: Axes, problem: Plane, lines: Lines) -> None:
    left, right, low, high = problem.view
    x, y = torch.meshgrid(torch.linspace(left, right, 50), torch.linspace(low, high, 50), indexing="xy")
    height = problem.height(torch.stack([x, y], -1).double()).detach()
    axes.contour(x, y, height, levels=[0.003 * 3**i for i in range(8)], colors=GREY, linewidths=0.5, alpha=0.5)
    for name, run, style in lines:
        path = run.weights.reshape(-1, 2)
        axes.plot(*path.mT, **style, marker="o", markersize=2, linewidth=1.3, label=f"{name}, lr {run.rate:g}")
        axes.plot(*path[-1], "o", color=style["color"], markersize=6, markeredgecolor="white", zorder=4)
    axes.set(xlim=(left, right), ylim=(low, high), xlabel="first weight", ylabel="second weight")


def _draw_losses(axes: Axes, lines: Lines) -> None:
    for name, run, style in lines:
        axes.semilogy(run.losses, **style, linewidth=1.6, label=f"{name}, lr {run.rate:g}")
    axes.set(xlabel="step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)


def _draw_spectra(axes: Axes, lines: Lines) -> None:
    for _, run, style in lines:
        values = spectrum(run)
        axes.semilogy(range(1, len(values) + 1), values, **style, linewidth=1.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="singular value of a step, by size", ylabel="relative to the largest")
    axes.spines[["top", "right"]].set_visible(False)


def spectrum(run: Run) -> Tensor:
    """The singular values of the change in a step over the largest of them, the median of all steps."""
    values = torch.linalg.svdvals(run.weights.diff(dim=0))
    return (values / values[:, :1].clamp_min(1e-300)).median(dim=0).values


# -- the pages ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Picture:
    problem: type[Problem]
    levels: Callable[[], dict[str, Level]]

    @classmethod
    def of(cls, problem: type[Problem], name: str) -> Picture:
        """Of the level `name` as its defaults have it."""
        return cls(problem, lambda: {name: nestopt.build("level", name)})


def _composed() -> dict[str, Level]:
    slow = momentum(0.9, dampening=0.9, period=8)
    return {
        "chain": nestopt.chain(second_moment(), momentum(0.9)),
        "parallel": nestopt.parallel(momentum(0.9), slow, weights=[1.0, 0.1]),
        "nest": nestopt.nest(gd(period=8), momentum(0.9)),
    }


def _links() -> dict[str, Level]:
    return {
        "sign": nestopt.build("level", "sign"),
        "normalize": nestopt.build("level", "normalize"),
        "cautious": nestopt.build("level", {"level": "cautious", "of": "momentum"}),
    }


def _recipes() -> dict[str, Level]:
    return {name: nestopt.build("level", name) for name in ("lion_chain", "mars", "grokfast")}


ON_VALLEY = (
    "gd momentum preconditioned_momentum feature_momentum delta_momentum adam adamw regression_optimum second_moment "
    "average schedule_free ftrl"
)
ON_TARGET = "deep_momentum matrix_adagrad shampoo soap newton_schulz muon cms"
PICTURES = {
    **{name: Picture.of(Valley, name) for name in ON_VALLEY.split()},
    **{name: Picture.of(Target, name) for name in ON_TARGET.split()},
    "dgd": Picture(Layer, lambda: {"dgd": dgd(), "dgd, δ = 0.1": dgd(delta=0.1)}),
    "ggd": Picture(Layer, lambda: {"ggd": ggd(), "ggd of signs": ggd(objective=Dot(), value="sign")}),
    "weight_average": Picture(Valley, lambda: {"weight_average, decay = 0.9": weight_average(momentum(0.9), 0.9)}),
    "m3": Picture(Target, lambda: {"m3": m3(), "m3, α = 0": m3(alpha=0.0)}),
    "composing": Picture(Valley, _composed),
    "links": Picture(Valley, _links),
    "recipes": Picture(Valley, _recipes),
}


def caption(kind: type[Problem], runs: Mapping[str, Run]) -> str:
    """What is seen, how learning rates were chosen, and where each run ended."""
    ends = "; ".join(f"{name} {run.loss:.1e} (lr {run.rate:g})" for name, run in runs.items())
    what = (
        "Left, the way down from above; right, the loss."
        if issubclass(kind, Plane)
        else ("Left, the loss; right, the singular values of a step relative to the largest, the median of all steps.")
    )
    return (
        f"On {kind.words}. {what} Grey: gradient descent (dotted) and momentum with β = 0.9 (dashed). All take "
        f"{STEPS} steps at a rate that falls linearly to 0 from the best, by the loss at the end, of the same "
        f"{len(RATES)} from {RATES[0]:g} to {RATES[-1]:g} (of rates within 1 % of it, the least; none that let the "
        f"loss pass {DIVERGED:g} times the first). Losses at the end: {ends}."
    )


def make(name: str, references: dict[type[Problem], dict[str, Run]]) -> None:
    """The picture for the page `name`, and its caption; `references` remembers the grey lines."""
    picture = PICTURES[name]
    kind = picture.problem
    if kind not in references:
        references[kind] = {key: best(kind, level) for key, (level, _) in REFERENCES.items()}
    shown = {key: references[kind].get(key) or best(kind, level) for key, level in picture.levels().items()}
    grey = {key: run for key, run in references[kind].items() if key not in shown}
    draw(kind, shown, grey, MADE / f"{name}.svg")
    alt = f"{', '.join(shown)} beside {' and '.join(grey)}: losses at the end are in the caption"
    text = f"```{{figure}} made/{name}.svg\n:alt: {alt}\n\n{caption(kind, shown | grey)}\n```\n"
    (MADE / f"{name}-figure.inc").write_text(text, encoding="utf-8")


def main() -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and a sum's order is then always the same
    try:
        references: dict[type[Problem], dict[str, Run]] = {}
        for name in PICTURES:
            make(name, references)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
