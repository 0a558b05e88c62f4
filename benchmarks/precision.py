"""How far the answers, states and gradients of memories are from float64, at each precision of their products.

    python benchmarks/precision.py                     # on a GPU if there is one, else on the CPU
    python benchmarks/precision.py --device cpu --tokens 256 4096 --only "titans|deltanet"

Every layer is made in float32; its twin has the same numbers in float64, and runs on the CPU.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a checkout that is not installed

import nestopt
from benchmarks.machine import describe
from nestopt.core.precision import PRECISIONS, Precision, refusal
from nestopt.core.tree import leaves
from nestopt.levels import cms, self_modifying, window_attention

LEVELS = (
    *("attention", "window_attention", "linear_attention", "retnet", "gated_linear", "deltanet", "gated_deltanet"),
    *("gla", "hgrn2", "rwkv6", "kda", "rwkv7", "comba", "deltaproduct"),
    *("oja", "omega", "mesa", "log_linear", "forgetting_attention"),
    *("ttt", "titans", "dla", "yaad", "moneta", "memora", "atlas", "mac", "self_modifying"),
)
CONTINUUM, HOPE = "cms, in context", "a Hope of 2 blocks"
NAMES = (*LEVELS, CONTINUUM, HOPE)


@dataclasses.dataclass(frozen=True)
class Size:
    batch: int = 2
    tokens: int = 1024
    dim: int = 256
    heads: int = 4


TINY = Size(1, 40, 16, 2)


@dataclasses.dataclass(frozen=True)
class Row:
    """Errors of one layer at one precision: lengths of differences from float64, relative to those of the numbers.

    Attributes:
        y: of the answers (of a model: the logits).
        state: of all floating-point numbers of the state after the last token; None where there are none.
        gradients: of those by the input and by all parameters, together.
    """

    name: str
    tokens: int
    precision: Precision
    y: float
    state: float | None
    gradients: float


def made(name: str, size: Size) -> tuple[nn.Module, Tensor]:
    """A layer in float32 and its input, or a model and its tokens; the same each time."""
    torch.manual_seed(0)
    x = torch.randn(size.batch, size.tokens, size.dim)
    if name == CONTINUUM:
        return nestopt.nn.CMS(size.dim, cms(periods=(16, 64), learn="context")), x
    if name != HOPE:
        heads = 4 * size.heads if name == "atlas" else size.heads  # features of 64 numbers would be 2,144
        return nestopt.layer(name, dim=size.dim, heads=heads), x
    mlp = cms(periods=(64,), learn="context", teach="loss")
    mixers = [self_modifying(), window_attention()]
    model = nestopt.models.HopeLM(dim=size.dim, blocks=2, heads=size.heads, mixers=mixers, mlp=mlp)
    return model, torch.randint(256, (size.batch, size.tokens))


def run(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Answers, the state's numbers and all gradients of a loss of the answers, in float64 on the CPU."""
    x = x.clone().requires_grad_(x.is_floating_point())
    y, state = module(x)
    if x.is_floating_point():
        generator = torch.Generator().manual_seed(1)
        loss = (y * torch.randn(y.shape, generator=generator).to(y)).sum()
    else:
        loss = F.cross_entropy(y[:, :-1].flatten(0, 1), x[:, 1:].flatten())
    inputs = [p for p in (x, *module.parameters()) if p.requires_grad]
    found = torch.autograd.grad(loss, inputs, allow_unused=True)
    kept = [leaf for _, leaf in leaves(state) if leaf.is_floating_point()]
    return y.detach().cpu().double(), _flat(kept), _flat(g for g in found if g is not None)


def _flat(tensors: Any) -> Tensor:
    parts = [x.detach().cpu().double().flatten() for x in tensors]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def rows(name: str, size: Size, device: torch.device) -> Iterator[Row]:
    """One for each precision that the device has."""
    module, x = made(name, size)
    true = run(copy.deepcopy(module).double(), x.double() if x.is_floating_point() else x)
    for precision in PRECISIONS:
        if refusal(precision, device, torch.float32):
            continue
        twin: Any = copy.deepcopy(module).to(device)
        twin.precision = precision
        y, state, gradients = (_far(a, b) for a, b in zip(run(twin, x.to(device)), true, strict=True))
        assert y is not None
        assert gradients is not None
        yield Row(name, size.tokens, precision, y, state, gradients)


def _far(found: Tensor, true: Tensor) -> float | None:
    return float((found - true).norm() / true.norm()) if true.numel() and true.norm() else None


def missing(device: torch.device) -> dict[str, str]:
    """The precisions that are not measured on a device, and why."""
    found = {precision: refusal(precision, device, torch.float32) for precision in PRECISIONS}
    return {precision: why for precision, why in found.items() if why}


def table(found: Sequence[Row]) -> str:
    """In Markdown: a line for each layer and length."""
    seen = [precision for precision in PRECISIONS if any(row.precision == precision for row in found)]
    head = ["level", "tokens", *(f"{precision} {what}" for precision in seen for what in ("y", "state", "gradients"))]
    lines = [head, ["---", "---:", *["---:"] * (len(head) - 2)]]
    by_line: dict[tuple[str, int], dict[str, Row]] = {}
    for row in found:
        by_line.setdefault((row.name, row.tokens), {})[row.precision] = row
    for (name, tokens), own in by_line.items():
        line = [name, f"{tokens:,}"]
        for precision in seen:
            row = own[precision]
            line += [_short(x) for x in (row.y, row.state, row.gradients)]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _short(error: float | None) -> str:
    return "–" if error is None else f"{error:.1e}".replace("e-0", "e-")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table, and write it where that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help=f"of a sequence (default: {Size.tokens})")
    parser.add_argument("--only", default="", metavar="REGEX", help="levels whose names it is found in")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that all of it runs")
    parser.add_argument("--markdown", metavar="FILE", help="write the table there, too")
    parser.add_argument("--json", metavar="FILE", help="write machine and rows there")
    args = parser.parse_args(argv)
    size, device = TINY if args.tiny else Size(), torch.device(args.device)
    found: list[Row] = []
    for tokens in args.tokens or [size.tokens]:
        for name in NAMES:
            if re.search(args.only, name):
                found += rows(name, dataclasses.replace(size, tokens=tokens), device)
                print(f"{name}, {tokens:,} tokens", file=sys.stderr)
    text = table(found)
    print(f"{size.batch} x tokens, dim {size.dim}, {size.heads} heads, on {device}; relative to float64\n\n{text}\n")
    for precision, why in missing(device).items():
        print(f"{precision}: not measured: {why}")
    if args.markdown:
        Path(args.markdown).write_text(text + "\n", encoding="utf-8")
    if args.json:
        data = {"machine": describe(), "device": str(device), "size": dataclasses.asdict(size)}
        data |= {"missing": missing(device), "rows": [dataclasses.asdict(row) for row in found]}
        Path(args.json).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
