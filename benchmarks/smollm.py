"""SmolLM2 reads a text: frozen, with its MLPs learning, by dynamic evaluation, and with a bigram cache beside it."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from stack_smollm import manual, read, smollm2

from benchmarks.machine import describe
from benchmarks.report import grid, write
from nestopt.models import stack

NATS = math.log(2)


def cosines(model: Any, tokens: Tensor) -> list[float]:
    """Of each layer: how the residual signal's gradient of `down_proj` lies to the true one."""
    found: list[list[Tensor]] = []
    for signal in ("exact", "residual"):
        stacked = stack(model, tokens.shape[1] - 1, rate=1.0, signal=signal, bound=None, damping=None)
        with torch.no_grad():
            _, state = stacked(tokens, cache=True)
        of = [state[f"block_{i}"]["mlp"]["levels"]["mlp"]["weights"] for i in range(len(model.model.layers))]
        both = zip(of, model.model.layers, strict=True)
        found.append([w["parts.0.down_proj.weight"][0] - layer.mlp.down_proj.weight.detach() for w, layer in both])
    return [float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)) for a, b in zip(*found, strict=True)]


def dynamic_evaluation(model: Any, tokens: Tensor, window: int, period: int, rate: float) -> float:
    """Bits of a text: every period a step of SGD on the MLPs, in place, along the true gradient of its loss."""
    weights = [p for layer in model.model.layers for p in layer.mlp.parameters()]
    before, bits = [p.detach().clone() for p in weights], 0.0
    for first in range(0, tokens.shape[1] - 1, window):
        context, cache = tokens[:, first : first + window + 1], None
        for start in range(0, context.shape[1] - 1, period):
            part = context[:, start : min(start + period, context.shape[1] - 1)]
            out = model(part, cache=cache, use_cache=True)
            cache, targets = out.cache, context[0, start + 1 : start + 1 + part.shape[1]]
            loss = F.cross_entropy(out.logits[0], targets, reduction="sum")
            bits += loss.item() / NATS
            gradients = torch.autograd.grad(loss, weights)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            with torch.no_grad():
                torch._foreach_add_(weights, gradients, alpha=-rate)
    with torch.no_grad():
        torch._foreach_copy_(weights, before)
    return bits


def bigram_cache(tokens: Tensor, frozen: Sequence[float], share: float) -> float:
    """Bits of a text where a share of each probability is that of the bigrams read so far; beside the frozen model."""
    seen: dict[int, Counter[int]] = defaultdict(Counter)
    bits, flat = 0.0, tokens[0].tolist()
    for place, own in enumerate(frozen):
        now, following = flat[place], flat[place + 1]
        counts = seen[now]
        total = sum(counts.values())
        p = 2**-own
        bits -= math.log2((1 - share) * p + share * counts[following] / total if total else p)
        counts[following] += 1
    return bits


def main(given: Sequence[str] | None = None) -> list[list[str]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="read this file (default: what help() says of Python's language)")
    parser.add_argument("--tokens", type=int, default=2049, help="how many (default 2,049)")
    parser.add_argument("--window", type=int, default=256, help="tokens of a context (default 256)")
    parser.add_argument("--period", type=int, default=64, help="tokens between writes (default 64)")
    parser.add_argument("--sgd", type=float, nargs="+", default=[2e-4, 3e-4, 1e-3], help="rates of dynamic evaluation")
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 1.2e-2, 4e-2], help="of the exact signal")
    parser.add_argument("--residual", type=float, nargs="+", default=[1e-4, 3e-4], help="rates of the residual signal")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="of the readings, beside the frozen one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report, as Markdown")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    print("\n".join(f"{key}: {value}" for key, value in describe().items()), flush=True)
    model, tokenizer = smollm2()
    text = args.text.read_text(encoding="utf-8") if args.text else manual()
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.tokens).input_ids
    size = len(tokenizer.decode(tokens[0]).encode())
    of = ", ".join(f"{-1 - i}: {cosine:.2f}" for i, cosine in enumerate(reversed(cosines(model, tokens[:, :129]))))
    said = f"cosine of the residual signal's gradient with the true one, by layer from the last: {of}"
    print(said, flush=True)
    frozen: list[float] = []

    def stacked(**options: Any) -> float:
        bits, _ = read(stack(model, args.period, **options), tokens, args.window, None, learn=bool(options["rate"]))
        if not options["rate"]:
            frozen[:] = bits
        return sum(bits)

    evaluated = partial(dynamic_evaluation, model, tokens, args.window, args.period)
    exact: list[tuple[str, Any, Callable[[], float]]] = [
        (f"exact signal{name}", rate, partial(stacked, rate=rate, **options))
        for name, options in {"": {}, ", no bound": {"bound": None}}.items()
        for rate in args.rates
    ]
    readings: list[tuple[str, Any, Callable[[], float]]] = [
        ("frozen", "", partial(stacked, rate=0)),
        *(("bigram cache", f"share {x:g}", partial(bigram_cache, tokens, frozen, x)) for x in (0.05, 0.1, 0.2)),
        *(("dynamic evaluation", rate, partial(evaluated, rate)) for rate in args.sgd),
        *(("residual signal", rate, partial(stacked, rate=rate, signal="residual")) for rate in args.residual),
        *exact,
    ]
    rows = [["", "rate", "bits per byte", "CPU seconds"]]
    for name, rate, run in readings:
        if args.only and name not in ("frozen", *args.only):
            continue
        begun = time.process_time()
        rows.append([name, str(rate), f"{run() / size:.4f}", f"{time.process_time() - begun:.0f}"])
        print(" | ".join(rows[-1]), flush=True)
    report = "\n".join(grid(rows))
    print(report)
    if args.out:
        write(args.out, f"{said}\n\n{report}\n")
    return rows


if __name__ == "__main__":
    main()
