"""What teaches the MLPs of a HopeLM: the gradient of its loss, or the error of the residual stream, by depth."""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe
from benchmarks.report import grid, write
from nestopt.config import Config, load
from nestopt.models import HopeLM
from nestopt.models.continua import learning
from nestopt.train.data.text import held_out_text
from nestopt.train.evaluate import stream_bits_per_byte
from nestopt.train.loop import train
from nestopt.train.reading import learner

SIGNALS = ("residual", "exact")
RATES = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32)


def config_of(blocks: int, steps: int, given: Sequence[str]) -> Config:
    """The default run with so many blocks, all with attention to a window, whose MLPs learn as they read."""
    attention = {"level": "window_attention", "memory": {"memory": "window", "size": 128}}
    mlp = {"level": "cms", "periods": [32], "learn": "context", "teach": "loss", "rate": 0.08, "through": "first_order"}
    model = {"dim": 64, "blocks": blocks, "mixers": [attention], "mlp": mlp}
    quick = {"steps": steps, "eval_every": 0, "save_every": 0, "sample_bytes": 0, "threads": 1, "final_bytes": 2048}
    config = load({"model": model, "train": quick}, given)
    assert isinstance(config, Config)
    return config


def taught(config: Config, model: HopeLM, signal: str, period: int, rate: float) -> HopeLM:
    """The same weights, with MLPs that learn so."""
    rule = dataclasses.replace(learning(config.model), signal=signal, periods=(period,))
    found = learner(config, model, rule)
    assert found is not None
    with torch.no_grad():
        for key, p in found.named_parameters():
            if key.endswith(".rate"):
                p.fill_(math.log(rate))
    return found


@torch.no_grad()
def gradients(model: HopeLM, tokens: Tensor, period: int) -> list[Tensor]:
    """Of each block's weights, `[B, n]`, of the first period of `tokens` `[B, period + 1]`."""
    _, state = model(tokens)
    found = []
    for i, block in enumerate(model.blocks):
        level: Any = block.mlp.levels[f"every_{period}"]
        after = state[f"block_{i}"]["mlp"]["levels"][f"every_{period}"]["weights"]
        found.append(torch.cat([(level.weights()[k] - after[k]).flatten(1) for k in after], dim=1))
    return found


def bits(config: Config, model: HopeLM, text: Tensor, learn: Any) -> tuple[float, float]:
    """Bits per byte of a text read in streams, and the CPU seconds that it took."""
    begun = time.process_time()
    how = {"streams": config.train.eval_streams, "piece": config.data.window, "learn": learn}
    return stream_bits_per_byte(model, text, **how), time.process_time() - begun


def main(given: Sequence[str] | None = None) -> str:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--blocks", type=int, nargs="+", default=[3, 8, 24], help="depths (default 3 8 24)")
    parser.add_argument("--steps", type=int, default=400, help="of training (default 400)")
    parser.add_argument("--bytes", type=int, default=16384, help="held-out bytes (default 16,384)")
    parser.add_argument("--periods", type=int, nargs="+", default=[32, 64], help="tokens between writes")
    parser.add_argument("--set", nargs="+", default=[], metavar="key=value", help="of the default config")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the report, as Markdown")
    args = parser.parse_args(given)
    torch.set_num_threads(1)
    said = ["\n".join(f"{key}: {value}" for key, value in describe().items())]
    print(said[0], flush=True)
    for blocks in args.blocks:
        config = config_of(blocks, args.steps, args.set)
        with tempfile.TemporaryDirectory() as folder:
            config.train.out = folder
            model = train(config, quiet=True).run.load_model()
        text = torch.from_numpy(held_out_text(config.data.dataset.load().held_out, args.bytes))
        streams, period = config.train.eval_streams, args.periods[0]
        some = text[: streams * (period + 1)].view(streams, period + 1).long()
        residual, exact = (gradients(taught(config, model, s, period, 1e-3), some, period) for s in SIGNALS)
        cosines = [float(torch.cosine_similarity(a, b).mean()) for a, b in zip(residual, exact, strict=True)]
        of = f"{blocks} blocks; cosine of the residual signal's gradient with the true one, from the first block:"
        said.append(f"{of} {' '.join(f'{cosine:.2f}' for cosine in cosines)}")
        rows = [("signal", "period", "CPU seconds", *(f"rate {rate:g}" for rate in RATES))]

        still, seconds = bits(config, model, text, "mixer")
        rows.append(("none", "", f"{seconds:.1f}", f"{still:.3f}", *[""] * (len(RATES) - 1)))
        for signal in SIGNALS:
            for period in args.periods:
                found = [bits(config, taught(config, model, signal, period, rate), text, True) for rate in RATES]
                mean = sum(seconds for _, seconds in found) / len(found)
                rows.append((signal, str(period), f"{mean:.1f}", *(f"{value:.3f}" for value, _ in found)))
        said.append("\n".join(grid([list(row) for row in rows])))
        print("\n".join(said[-2:]), flush=True)
    if args.out:
        write(args.out, "\n\n".join(said) + "\n")
    return "\n".join(said)


if __name__ == "__main__":
    main()
