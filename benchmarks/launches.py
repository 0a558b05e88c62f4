"""What layers and optimizers do on an accelerator: launches, bytes, products by dtype; counted on meta tensors.

No GPU is needed and nothing is timed, so the numbers are the same on every machine with the same torch. Beside them
stands the floor: the least time they take at the rates of an H100 as stated, or of a JSON file from benchmarks/gpu.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import nestopt
from nestopt.config import Config
from nestopt.core.level import Level
from nestopt.core.registry import registry
from nestopt.core.tree import tree_map
from nestopt.levels.continuum.level import Cms
from nestopt.models.cost import Cost, cost_of
from nestopt.ops import fast_form
from nestopt.train.planning import Rates, Sharing
from nestopt.train.planning.parts import Parts

LIMITS = Path(__file__).parents[1] / "tests" / "accelerator" / "limits.json"

FORWARD, TRAINING, STEP = MODES = "forward", "forward and backward", "a token"
IN_CONTEXT = "cms, in context"
LINKS = frozenset({"cautious", "centralize", "clip", "gradient_correction", "normalize", "sign"})
RECIPES = frozenset({"adamuon", "grokfast", "lion_chain", "mars", "normuon", "soap"})
"""Parts of chains, chains, and a basis around a level: made for gradients, and nobody's layers."""
OF_WEIGHTS = frozenset({"schedule_free", "weight_average", "weight_decay", "trust_ratio", "lamb", "adamw", "ftrl"})
OF_GRADIENTS = frozenset({"dgd", "ggd"}) | OF_WEIGHTS | LINKS | RECIPES
"""Levels that need a parameter or a layer's inputs, and so are no layers; and these."""
COMPOSED = frozenset({"chain", "nest", "parallel"})
STACKS = (
    *("gd", "momentum", "adam", "adamw", "regression_optimum", "delta_momentum", "deep_momentum"),
    *("muon", "m3", "shampoo", "matrix_adagrad"),
)
"""On the hidden matrices, with adamw on the rest, as `nestopt.optimizer` routes them."""


@dataclasses.dataclass(frozen=True)
class Size:
    """Of a layer's input and of the layer, whose parameters are in bfloat16."""

    batch: int
    tokens: int
    dim: int
    heads: int

    def __str__(self) -> str:
        return f"B {self.batch}, T {self.tokens:,}, dim {self.dim:,}, {self.heads} heads"


LARGE, SMALL = Size(8, 4096, 1024, 16), Size(2, 128, 64, 4)
FEW_TOKENS = 8
"""Of a layer that the reference machine runs, token by token."""

TRANSFORMERS: dict[str, dict[str, Any]] = {
    "large": {**nestopt.config.sizes.named("transformer-340m"), "tie": False},
    "small": {
        "dim": 64,
        "blocks": 2,
        "heads": 4,
        "mixer": "attention",
        "mlp": {"level": "cms", "periods": [1]},
        "gate_output": False,
    },
}


def layers() -> dict[str, Level]:
    """Every level of the library that can be a layer, by name, as it is by default."""
    names = registry.names("level")
    own = {name for name in names if registry.get("level", name).__module__.startswith("nestopt.")}
    found = {name: nestopt.build("level", name) for name in sorted(own - OF_GRADIENTS - COMPOSED)}
    return {**found, IN_CONTEXT: nestopt.levels.cms(periods=(16, 64), learn="context", teach="local")}


def closed(level: Level) -> bool:
    """Whether it runs by a closed form, or is a continuum, so that long sequences make sense."""
    return isinstance(level, Cms) or fast_form(level) is not None


def layer_costs(level: Level, size: Size) -> Iterator[tuple[str, Cost]]:
    """By mode; of a token on average over the level's chunk. A continuum takes no single tokens."""
    with torch.device("meta"):
        layer = nestopt.layer(level, size.dim, size.heads).to(torch.bfloat16)
    x = torch.empty(size.batch, size.tokens, size.dim, dtype=torch.bfloat16, device="meta")

    @torch.no_grad()
    def forward() -> Any:
        return layer(x)[1]

    def train() -> None:
        answer, _ = layer(x.requires_grad_())
        answer.backward(torch.empty_like(answer))

    forward()  # what is made once is there
    yield FORWARD, cost_of(forward, "meta")
    yield TRAINING, cost_of(train, "meta")
    if not isinstance(level, Cms):
        yield STEP, _token_cost(layer, x[:, 0].detach(), forward(), getattr(level, "span", 1))


@torch.no_grad()
def _token_cost(layer: Any, token: Tensor, state: Any, span: int) -> Cost:
    state = tree_map(torch.empty_like, state)  # which are no views of what a longer call has left

    def decode() -> None:
        now = state
        for _ in range(span):
            _, now = layer.step(token, now)

    decode()
    return cost_of(decode, "meta") * (1 / span)


def stack_cost(stack: str, model: Mapping[str, Any]) -> Cost:
    """A step of the optimizer, in float32, on average over its clocks."""
    config = Config.from_data({"model": model, "optimizer": {"stack": stack}})
    return Parts.of(config).step(Sharing()).cost


# -- the large size: floors --------------------------------------------------------------------------------------------


def floors(rates: Rates, quiet: bool = False) -> str:
    """The tables of layers by mode, and of optimizers."""
    chosen = {name: level for name, level in layers().items() if closed(level)}
    rows: dict[str, list[list[str]]] = {mode: [] for mode in MODES}
    for name, level in tqdm(chosen.items(), desc="layers", leave=False, disable=quiet):
        for mode, cost in layer_costs(level, LARGE):
            rows[mode].append(row(name, cost, rates))
    stacks = [
        row(stack, stack_cost(stack, TRANSFORMERS["large"]), rates)
        for stack in tqdm(STACKS, desc="optimizers", leave=False, disable=quiet)
    ]
    parts = [f"### {mode.capitalize()}\n\n{table(rows[mode])}" for mode in MODES]
    return "\n\n".join([*parts, f"### A step of an optimizer\n\n{table(stacks)}"]) + "\n"


def row(name: str, cost: Cost, rates: Rates) -> list[str]:
    """What it does, the least time it takes, and what then takes the time."""
    times = rates.seconds(cost)
    binding = max(times, key=times.__getitem__)
    short, wide = (cost.products.get(dtype, 0) / 1e12 for dtype in ("bfloat16", "float32"))
    amounts = f"{cost.bytes / 1e9:.3g}", f"{short:.3g}", f"{wide:.3g}"
    return [f"`{name}`", f"{cost.ops:,.0f}", *amounts, f"{times[binding] * 1e3:.3g}", binding]


def table(rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    head = ["", "launches", "GB", "TFLOP bfloat16", "TFLOP float32", "floor, ms", "binds"]
    lines = [head, ["---", *["---:"] * 5, "---"], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# -- the small size: limits --------------------------------------------------------------------------------------------


def small_costs(name: str) -> dict[str, Cost]:
    """Of a layer by mode, few tokens of those that the reference machine runs."""
    level = layers()[name]
    size = SMALL if closed(level) else dataclasses.replace(SMALL, tokens=FEW_TOKENS)
    return dict(layer_costs(level, size))


def numbers(cost: Cost) -> dict[str, float]:
    """What has a limit, by name."""
    products = {f"{dtype} FLOPs": flops for dtype, flops in sorted(cost.products.items())}
    return {"launches": cost.ops, "bytes": cost.bytes, **products}


def write_limits(path: Path, quiet: bool = False) -> None:
    """All counts of the small size, as they are now."""
    found: dict[str, Any] = {"torch": torch.__version__.split("+")[0], "layers": {}, "optimizers": {}}
    for name in tqdm(layers(), desc="layers", leave=False, disable=quiet):
        found["layers"][name] = {mode: numbers(cost) for mode, cost in small_costs(name).items()}
    for stack in tqdm(STACKS, desc="optimizers", leave=False, disable=quiet):
        found["optimizers"][stack] = numbers(stack_cost(stack, TRANSFORMERS["small"]))
    path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", metavar="FILE.json", help="of a device, from benchmarks/gpu.py (default: as stated)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    parser.add_argument("--limits", action="store_true", help=f"instead: count anew what {LIMITS.name} has")
    args = parser.parse_args(argv)
    if args.limits:
        write_limits(LIMITS)
        return
    rates = Rates.read(args.rates) if args.rates else Rates.stated()
    text = f"{LARGE}, bfloat16. Rates: {rates.source}.\n\n{floors(rates)}"
    print(text)
    if args.markdown:
        args.markdown.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
