"""Draws _static/two-contexts.svg: one level as an optimizer, as a layer, and as another level's rule.

Run `python docs/figures/two_contexts.py`. The page may be light or dark: boxes bring their own ground, and what stands
on the page is a grey that both show.
"""

from __future__ import annotations

from pathlib import Path
from xml.sax.saxutils import escape

STATIC = Path(__file__).parents[1] / "_static"

WIDTH, HEIGHT, MARGIN, GAP = 900, 392, 16, 24
COLUMN = (WIDTH - 2 * MARGIN - 2 * GAP) / 3
GREY, INK = "#76808b", "#17202a"
GRADIENTS, TOKENS, LEVEL = ("#fdecc8", "#b06f08"), ("#dbeafe", "#2563a8"), ("#d8f0df", "#2b7a4b")

COLUMNS = (
    (
        "on gradients: an optimizer",
        GRADIENTS,
        ("loss.backward()", "g = ∂L/∂W"),
        ("W ← W − lr · u", "the weights step along u"),
        ("nestopt.optimizer(model, level)", "equals torch.optim.SGD"),
    ),
    (
        "on tokens: a layer",
        TOKENS,
        ("each token binds k to v", "g = v kᵀ"),
        ("y = u q", "the query reads u"),
        ("nestopt.layer(level, dim=64)", "equals linear attention with decay"),
    ),
    (
        "as another level's rule",
        TOKENS,
        ("a memory M sees k and v", "g = η ∇ ½‖M(k) − v‖²"),
        ("M ← α M − u,  y = M(q)", "the memory steps along u"),
        ("titans(rule=level)", "equals the momentum of Titans"),
    ),
)


def text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" text-anchor="middle">{escape(words)}</text>'


def box(x: float, y: float, width: float, height: float, colours: tuple[str, str]) -> str:
    fill, stroke = colours
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{fill}" stroke="{stroke}" '
        'stroke-width="1.4"/>'
    )


def arrow(x: float, y0: float, y1: float, label: str) -> list[str]:
    line = f'd="M{x:g},{y0:g} L{x:g},{y1:g}" stroke="{GREY}" stroke-width="1.6" fill="none"'
    return [f'<path {line} marker-end="url(#tip)"/>', text(x + 14, (y0 + y1) / 2 + 5, label, "sign")]


def draw() -> str:
    style = (
        "text{font-family:'DejaVu Sans',Verdana,'Segoe UI',Helvetica,Arial,sans-serif;font-size:13px}"
        f".head{{fill:{GREY};font-size:15px;font-weight:bold}}.note{{fill:{GREY}}}.in{{fill:{INK}}}"
        f".sum{{fill:{INK};font-size:15px;font-weight:bold}}.sign{{fill:{GREY};font-size:15px;font-style:italic}}"
        f".code{{fill:{GREY};font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace;font-size:13px;font-weight:bold}}"
        f".level{{fill:{INK};font-family:'DejaVu Sans Mono',Menlo,Consolas,monospace;font-size:15px;font-weight:bold}}"
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'role="img">',
        "<title>One level in three places: shown gradients it is an optimizer, shown tokens a layer, shown another "
        "level's gradients that level's learning rule.</title>",
        f"<style>{style}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0,0 L8,4 L0,8 z" fill="{GREY}"/></marker></defs>',
        box(MARGIN, 152, WIDTH - 2 * MARGIN, 68, LEVEL),
        text(WIDTH / 2, 180, "level = momentum(0.9)", "level"),
        text(WIDTH / 2, 205, "one object:  m ← β m + g,  u = m", "in"),
    ]
    for i, (head, colours, above, below, (code, equal)) in enumerate(COLUMNS):
        x = MARGIN + i * (COLUMN + GAP)
        middle = x + COLUMN / 2
        parts += [text(middle, 28, head, "head"), box(x, 44, COLUMN, 62, colours)]
        parts += [text(middle, 69, above[0], "in"), text(middle, 93, above[1], "sum"), *arrow(middle, 106, 151, "g")]
        parts += [*arrow(middle, 220, 265, "u"), box(x, 266, COLUMN, 62, colours)]
        parts += [text(middle, 291, below[0], "sum"), text(middle, 315, below[1], "in")]
        parts += [text(middle, 354, code, "code"), text(middle, 376, equal, "note")]
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    (STATIC / "two-contexts.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
