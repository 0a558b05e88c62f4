"""Layers in bfloat16 at full size beside attention, flash-linear-attention and titans-pytorch: time and memory."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import nestopt
from benchmarks import layer_peers
from benchmarks.gpu_parts.clock import Timed, interleave, peak
from benchmarks.gpu_parts.precision import layer_options, suffix
from benchmarks.gpu_parts.setting import Row, Setting, attempts, free, generator
from benchmarks.layer_blocks import AttentionBlock, MlpBlock
from benchmarks.layer_size import Size
from benchmarks.rows import Missing

ATTENTION = "attention block"
"""LayerNorm, `scaled_dot_product_attention` with its projections, residual: what ratios are to."""

FULL = Size(4096, 64, batch=8, dim=1024, heads=16)
TINY = Size(64, 16, batch=2, dim=32, heads=4)
ROUNDS = 9

Read = Callable[[Tensor], Tensor]
Build = Callable[[Size], tuple[nn.Module, Read]]


def run(setting: Setting) -> Iterator[Row]:
    size = TINY if setting.tiny else FULL
    ours, peers = _ours(size, setting.precisions), _peers()
    begun, whole = time.monotonic(), setting.left()
    for group, share in ((ours, 0.65), (peers, 1.0)):
        until = begun + share * whole - 1.0 if whole < 1e6 else begun + 1e6
        yield from _group(setting, size, {ATTENTION: _attention, **group}, until, peers=group is peers)


# -- candidates --------------------------------------------------------------------------------------------------------


def _attention(size: Size) -> tuple[nn.Module, Read]:
    block = AttentionBlock(size.dim, size.heads)
    return block, block


def _mlp(size: Size) -> tuple[nn.Module, Read]:
    block = MlpBlock(size.dim)
    return block, block


def _specs(size: Size) -> Mapping[str, Any]:
    """Levels as the named models have them (`nestopt.config.sizes`), and a few more."""
    periods = [4 * size.chunk, 16 * size.chunk] if size == FULL else [16, 32]
    return {
        "attention": "attention",
        "deltanet": "deltanet",
        "gated_deltanet": "gated_deltanet",
        "titans": {"level": "titans", "chunk": size.chunk, "read": "chunk"},
        "self_modifying": {"level": "self_modifying", "chunk": size.chunk, "projection_chunk": 4 * size.chunk},
        "cms, in context": {"level": "cms", "periods": periods, "learn": "context", "through": "first_order"},
        "ttt": {"level": "ttt", "chunk": size.chunk},
        "linear_attention": "linear_attention",
        "retnet": "retnet",
        "gated_linear": "gated_linear",
        "window_attention": "window_attention",
    }


def _ours(size: Size, precisions: tuple[str | None, ...]) -> dict[str, Build]:
    def build(spec: Any, precision: str | None, size: Size) -> tuple[nn.Module, Read]:
        layer = nestopt.layer(spec, size.dim, size.heads, **layer_options(precision))
        return layer, lambda x: layer(x)[0]

    found: dict[str, Build] = {"mlp block": _mlp}
    for precision in precisions:
        for name, spec in _specs(size).items():
            found[f"nestopt {name}{suffix(precision)}"] = functools.partial(build, spec, precision)
    return found


FLA: Mapping[str, tuple[str, dict[str, Any]]] = {
    "DeltaNet": ("deltanet", {"use_gate": False}),
    "GatedDeltaNet": ("gated_deltanet", {"expand_v": 1.0, "use_gate": False}),
    "LinearAttention": ("linear_attention", {}),
    "MultiScaleRetention": ("retnet", {"expand_v": 1.0, "use_output_gate": False}),
    "GatedLinearAttention": ("gated_linear", {"expand_k": 1.0, "use_output_gate": False}),
}
"""flash-linear-attention's layers by class: the level of ours beside it, and options that make the two as large."""


def _fla(name: str, size: Size) -> tuple[nn.Module, Read]:
    try:
        layers = importlib.import_module("fla.layers")
    except ImportError as error:
        raise Missing(f"flash-linear-attention 0.6.0 can't be imported: {error}") from None
    options = FLA[name][1]
    if name == "GatedDeltaNet":
        options = {**options, "head_dim": size.dim // size.heads}
    layer = getattr(layers, name)(hidden_size=size.dim, num_heads=size.heads, **options)
    return layer, lambda x: layer(x)[0]


def _titans_pytorch(size: Size) -> tuple[nn.Module, Read]:
    """One head of D → 4D → D, at the step size at which it does not diverge on random tokens."""
    found = layer_peers._titans_settled(size)
    return found.module, found.read


def _peers() -> dict[str, Build]:
    found: dict[str, Build] = {f"fla {name}": functools.partial(_fla, name) for name in FLA}
    return {**found, "titans-pytorch NeuralMemory": _titans_pytorch}


# -- times -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class _Candidate:
    """A layer at its place, and what a call of it takes."""

    module: nn.Module
    read: Read
    x: Tensor
    peaks: dict[str, float | None] = dataclasses.field(default_factory=dict)

    def forward(self) -> None:
        with torch.no_grad():
            self.read(self.x)

    def train(self) -> None:
        """Forward and backward, to the input and to the parameters."""
        self.drop()
        self.read(self.x).backward(self.x.detach())

    def drop(self) -> None:
        """Gradients of the call before: memory of a call is to be of that call alone."""
        self.module.zero_grad()
        self.x.grad = None

    def finite(self) -> bool:
        """Whether the last call's gradients all were."""
        grads = [self.x.grad, *(param.grad for param in self.module.parameters())]
        return all(bool(grad.isfinite().all()) for grad in grads if grad is not None)

    @property
    def modes(self) -> dict[str, Callable[[], None]]:
        return {"forward": self.forward, "training": self.train}


def _group(setting: Setting, size: Size, builds: Mapping[str, Build], until: float, *, peers: bool) -> Iterator[Row]:
    """First calls one after another, which say what fails and what memory is taken; then times, in turn."""
    random = generator(0)
    x = torch.randn(size.batch, size.tokens, size.dim, generator=random).to(setting.device, torch.bfloat16)
    candidates: dict[str, _Candidate] = {}

    def first(name: str) -> Row:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            module, read = builds[name](size)
        made = _Candidate(module.to(setting.device, torch.bfloat16), read, x.clone().requires_grad_())
        for mode, call in made.modes.items():
            call()  # whatever is loaded or compiled is none of its memory
            made.drop()
            made.peaks[mode] = peak(setting, call)
        if not made.finite():
            raise RuntimeError("its gradients are not finite")
        made.drop()
        candidates[name] = made
        return Row(name, "measured")

    rows = [(name, functools.partial(first, name)) for name in builds]
    for row in attempts(setting, rows, need_s=max(1.0, setting.until - until), peers=peers):
        if row.outcome != "measured":
            yield row
    if len(candidates) < 2:  # nothing beside attention
        return
    times: dict[str, dict[str, Timed]] = {}
    for i, mode in enumerate(("forward", "training")):
        calls = {name: made.modes[mode] for name, made in candidates.items()}
        half = time.monotonic() + (until - time.monotonic()) / (2 - i)
        times[mode] = interleave(setting, calls, 2 if setting.tiny else ROUNDS, half, ATTENTION)
    for name, made in candidates.items():
        yield Row(name, "measured", values=_values({mode: times[mode][name] for mode in times}, made.peaks))
    candidates.clear()
    free(setting)


def _values(times: Mapping[str, Timed], peaks: Mapping[str, float | None]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for mode, timed in times.items():
        taken = peaks[mode]
        found |= {
            f"{mode}, ms": 1e3 * timed.seconds,
            f"{mode}, × attention": timed.ratio,
            f"{mode}, peak GB": None if taken is None else taken / 1e9,
            f"{mode}, rounds": timed.rounds,
        }
    return found
