"""Draws the pictures of memories that make their own values, and of continua on several clocks.

`sphinx-build` runs this; `python docs/figures/continua.py` does so by hand. Grounds are transparent, and what stands on
the page is a grey that light and dark pages both show.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

from nestopt.core.memories import Mlp
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves
from nestopt.levels import cms, self_modifying
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.nn import CMS

MADE = Path(__file__).parents[1] / "tokens" / "made"
SHARED = runpy.run_path(str(Path(__file__).with_name("trajectories.py")))
GREY, COLOURS, STYLE = SHARED["GREY"], SHARED["COLOURS"], SHARED["STYLE"]

# -- self-modifying memories -------------------------------------------------------------------------------------------

DIM, PAIRS, PASSES = 32, 16, 24
KINDS = {
    "defaults": self_modifying(),
    "without delta decay": self_modifying(delta=0.0),
    "the letter, η = 0.1": self_modifying(normalized=False, lr=0.1),
}
LARGEST = 1e4
"""Where a curve is cut off."""


def surprises(level: SelfModifying, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """At each token how far `memory` is from its own value of it, ‖M(k) − v̂‖ / ‖v‖, and the norm of all memories."""
    torch.manual_seed(0)  # memories start at random
    start = {name: x.to(k) for name, x in level.learned_start(DIM, DIM).items()}
    state = level.init_tokens(DIM, DIM, k, start)
    errors, norms = [], []
    live = torch.ones(1, dtype=torch.bool)
    for t in range(len(k)):
        weights = {name: state["projections"][name]["weights"] for name in level.adaptive}
        made = level.made(weights, state["readout"], k[t : t + 1], k[t : t + 1], v[t : t + 1])
        theta = state["memory"]["weights"]
        wrong = level.memory.read(theta, made["k"]) - level.own_values(theta, made["v"])
        errors.append(torch.linalg.vector_norm(wrong) / torch.linalg.vector_norm(v[t]))
        norms.append(_norm(state, level))
        _, state = level.chunk_step(k[t : t + 1], k[t : t + 1], v[t : t + 1], {}, live, state, Signal(t))
    return torch.stack(errors), torch.stack(norms)


def _norm(state: State, level: SelfModifying) -> Tensor:
    boxes = [state["memory"], *(state["projections"][name] for name in level.adaptive)]
    return torch.stack([x.square().sum() for box in boxes for _, x in leaves(box["weights"])]).sum().sqrt()


def draw_self_modifying() -> str:
    """The picture, and its caption."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    k, v = (normalize(random(PAIRS, DIM), dim=-1).repeat(PASSES, 1) for _ in range(2))
    mean, other = random(2, DIM)
    x = random(PAIRS * PASSES, DIM) + mean
    keys, values = normalize(x, dim=-1), x + other
    ends, largest = [], []
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for (name, level), colour in zip(KINDS.items(), COLOURS, strict=True):
            errors, _ = surprises(level, k, v)
            means = errors.view(PASSES, PAIRS).mean(1)
            _plain(left, range(1, PASSES + 1), means, colour, name)
            ends.append(f"{name} {means[-1]:.2f}")
            _, norms = surprises(level, keys, values)
            _plain(right, range(1, len(norms) + 1), norms, colour, name)
            most = float(norms.nan_to_num(torch.inf).max())
            largest.append(f"{name} {most:.3g}" if most < LARGEST else f"{name} without end")
        left.set(xlabel="times that the pairs were shown", ylabel="error to its own value", ylim=(0, None))
        right.set(xlabel="tokens", ylabel="norm of all memories", yscale="log", ylim=(1, LARGEST))
        left.legend(frameon=False, fontsize=9)
        figure.savefig(MADE / "self_modifying.svg", transparent=True, metadata={"Date": None})
    return (
        f"Left, {PAIRS} random pairs of {DIM} numbers, of length 1, shown again and again: the mean over pairs of "
        "‖M(k) − v̂‖ / ‖v‖, how far the memory that answers is from the value that it makes for itself, when each "
        f"comes. At the last pass: {'; '.join(ends)}. Right, random tokens with a mean: the norm of all five memories' "
        f"weights. The largest: {'; '.join(largest)}."
    )


def _plain(axes: Axes, x: range, y: Tensor, colour: str, label: str) -> None:
    axes.plot(x, y, color=colour, linewidth=1.6, label=label)
    axes.spines[["top", "right"]].set_visible(False)


# -- continua ----------------------------------------------------------------------------------------------------------

WIDTH, STRETCH = 16, 1024
CONTINUA = {
    "periods (1)": {"periods": (1,)},
    "periods (16)": {"periods": (16,)},
    "periods (1, 16)": {"periods": (1, 16)},
}


def followed(options: dict[str, object]) -> Tensor:
    """The error at each token of a continuum that is to map x to A x, then to B x, then to A x again."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 3 * STRETCH, WIDTH, generator=generator, dtype=torch.float64)
    maps = torch.randn(2, WIDTH, WIDTH, generator=generator, dtype=torch.float64) / WIDTH**0.5
    wanted = torch.cat([part @ maps[i].T for part, i in zip(x.split(STRETCH, dim=1), (0, 1, 0), strict=True)], dim=1)
    torch.manual_seed(0)
    level = cms(
        **options,  # type: ignore[arg-type]
        memory=Mlp(hidden=4 * WIDTH, residual=False),
        learn="context",
        teach="loss",
        normalized=True,
        rate=1.0,
    )
    module = CMS(WIDTH, level).double()
    state, found, first = module.init_state(1), [], 0
    with torch.no_grad():
        while first < x.shape[1]:
            last = min(first + module.until_write([first]), x.shape[1])
            part = slice(first, last)
            error = module.read(x[:, part], state) - x[:, part] - wanted[:, part]
            found.append(error.square().mean(-1).sqrt()[0])
            state = module.observe(x[:, part], error, state, phases=[first])
            first = last
    return torch.cat(found)


def draw_continua() -> str:
    """The picture, and its caption."""
    ends = []
    with rc_context(STYLE):
        figure = Figure(figsize=(8.0, 3.2), layout="constrained")
        axes = figure.subplots()
        for (name, options), colour in zip(CONTINUA.items(), COLOURS, strict=True):
            errors = followed(options)
            means = errors.view(-1, 64).mean(1)
            axes.plot(torch.arange(len(means)) * 64 + 32, means, color=colour, linewidth=1.6, label=name)
            thirds = [float(errors[i * STRETCH - 64 : i * STRETCH].mean()) for i in (1, 2, 3)]
            back = float(errors[2 * STRETCH : 2 * STRETCH + 64].mean())
            ends.append(f"{name} {thirds[0]:.2f}, {thirds[1]:.2f}, {back:.2f}, {thirds[2]:.2f}")
        for i in (1, 2):
            axes.axvline(i * STRETCH, color=GREY, linestyle=":", linewidth=1.2)
        for i, word in enumerate("ABA"):
            axes.text((i + 0.5) * STRETCH, 1.0, word, ha="center", va="bottom", transform=axes.get_xaxis_transform())
        axes.set(xlabel="tokens", ylabel="error", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
        figure.savefig(MADE / "continuum.svg", transparent=True, metadata={"Date": None})
    return (
        f"A continuum of width {WIDTH} is to add A x to each random token x, after {STRETCH} tokens B x, and then A x "
        "again: its root mean square error, the mean of 64 tokens. Over the 64 tokens at the end of the first stretch, "
        f"at the end of the second, at the return of A, and at the end: {'; '.join(ends)}."
    )


def main() -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and a sum's order is then always the same
    try:
        for name, draw in {"self_modifying": draw_self_modifying, "continuum": draw_continua}.items():
            words = draw()
            alt = "curves; the numbers at their ends are in the caption"
            text = f"```{{figure}} made/{name}.svg\n:alt: {alt}\n\n{words}\n```\n"
            (MADE / f"{name}-figure.inc").write_text(text, encoding="utf-8")
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
