"""Draws what deep memories remember before and after training, beside each other, for the gallery.

What a layer learns by its outer loss is where its memories begin and what its gates say. Both are trained here, to
answer random pairs; then the memory is shown pairs that it has never seen. `sphinx-build` runs this;
`python docs/figures/trained.py` does so by hand.
"""

from __future__ import annotations

import runpy
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn.functional import normalize

import nestopt
from nestopt.core import AssociativeMemory, gates_of
from nestopt.core.tree import State
from nestopt.levels import titans, ttt

MADE = Path(__file__).parents[1] / "tokens" / "made"
RECALL = runpy.run_path(str(Path(__file__).with_name("recall.py")))
DIM, WORST, STYLE = (RECALL[name] for name in ("DIM", "WORST", "STYLE"))

PAIRS = 16
"""As many as such a memory can hold: of the 48 that the levels' own pages show it, training saves few."""
LEVELS = {"titans": titans(chunk=4), "ttt": ttt(chunk=4)}
STEPS, BATCH, RATE = 200, 8, 0.03
QUIET = {"lr": 0.0, "retention.keep": 1.0, "rule.beta": 0.0}
"""Gates of a token that writes nothing and lets nothing fade."""


def random_pairs(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values `[batch, PAIRS, 1, DIM]` of length 1."""
    k, v = (normalize(torch.randn(batch, PAIRS, 1, DIM, generator=generator), dim=-1) for _ in range(2))
    return k, v


def answers(level: AssociativeMemory, learned: State, logits: State, k: Tensor, v: Tensor, seen: int) -> Tensor:
    """What the memory answers to the first `seen` keys after it was shown them: `[batch, seen, DIM]`."""
    k, v = k[:, :seen], v[:, :seen]
    shape = k.shape[:3]
    gates = {path: torch.sigmoid(logit).expand(shape) for path, logit in logits.items()}
    _, state = nestopt.ops.run(level, k, k, v, gates=gates, learned=learned)
    quiet = {path: torch.full(shape, QUIET[path]) for path in logits}
    y, _ = nestopt.ops.run(level, k, k, torch.zeros_like(v), gates=quiet, state=state, learned=learned)
    return y[:, :, 0]


def train(level: AssociativeMemory) -> tuple[State, State, State, State]:
    """Where the memory begins and what its gates are (as logits), before training and after."""
    torch.manual_seed(0)
    start = {name: weight[None] for name, weight in level.learned_start(DIM, DIM).items()}
    gate = {path: torch.logit(torch.tensor(float(one.init))) for path, one in gates_of(level).items()}
    learned, logits = ({name: x.clone().requires_grad_() for name, x in of.items()} for of in (start, gate))
    optimizer = nestopt.optim.Adam([*learned.values(), *logits.values()], lr=RATE)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        k, v = random_pairs(BATCH, generator)
        loss = (answers(level, learned, logits, k, v, PAIRS) - v[:, :, 0]).square().sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return start, gate, *({name: x.detach() for name, x in of.items()} for of in (learned, logits))


def recall(level: AssociativeMemory, learned: State, logits: State) -> Tensor:
    """`[PAIRS, PAIRS]`: in row s, column t the error of pair s after t, of pairs that were in no training."""
    k, v = random_pairs(1, torch.Generator().manual_seed(2))
    errors = torch.full((PAIRS, PAIRS), torch.nan)
    with torch.no_grad():
        for t in range(1, PAIRS + 1):
            errors[:t, t - 1] = (answers(level, learned, logits, k, v, t) - v[:, :t, 0])[0].norm(dim=-1)
    return errors


def make(name: str) -> None:
    """The picture of the level `name`, and its caption."""
    level = LEVELS[name]
    start, gate, learned, logits = train(level)
    found = {"untrained": recall(level, start, gate), "trained": recall(level, learned, logits)}
    with rc_context({**STYLE, "savefig.dpi": 200}):
        figure = Figure(figsize=(7.0, 3.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        edges = (0.5, PAIRS + 0.5, PAIRS + 0.5, 0.5)
        for axes, (words, errors) in zip(panels, found.items(), strict=True):
            image = axes.imshow(errors.numpy(), vmin=0, vmax=WORST, cmap="viridis", extent=edges)
            axes.set(title=f"{name}, {words}", xlabel="pairs shown")
            axes.spines[:].set_visible(False)
        panels[0].set_ylabel("pair asked for")
        bar = figure.colorbar(image, ax=panels, extend="max", shrink=0.85)
        bar.set_label("error of the answer")
        bar.outline.set_visible(False)
        figure.savefig(MADE / f"{name}-trained.svg", transparent=True, metadata={"Date": None})
    ends = {words: float(errors[:, -1].mean()) for words, errors in found.items()}
    gates = ", ".join(
        f"{path} {float(torch.sigmoid(gate[path])):.3f} → {float(torch.sigmoid(logits[path])):.3f}" for path in gate
    )
    text = (
        f"{name}: mean error of all {PAIRS} pairs at the end {ends['untrained']:.2f} untrained and "
        f"{ends['trained']:.2f} trained ({STEPS} steps; gates: {gates})."
    )
    figure_text = f"```{{figure}} tokens/made/{name}-trained.svg\n:alt: {text}\n\n{text}\n```\n"
    (MADE / f"{name}-trained.inc").write_text(figure_text, encoding="utf-8")


def main() -> None:
    MADE.mkdir(parents=True, exist_ok=True)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name in LEVELS:
            make(name)
    finally:
        torch.set_num_threads(threads)


if __name__ == "__main__":
    main()
