"""The slow twin of `nestopt.ops.self_modifying`: loops over batch, heads and tokens, written from the equations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.levels.deep.deep_twin import Mlp, layerwise, step_norms

Box = dict[str, list[Tensor]]
"""A memory: its `"weights"`, W1 first, and `"momentum"`."""


def unit(x: Tensor) -> Tensor:
    return x / x.norm().clamp_min(1e-12)


def cut(y: Tensor, x: Tensor) -> Tensor:
    """y with the length of x, if it is longer."""
    return y * ((x.square().sum() + 1e-12) / (y.square().sum() + 1e-12)).clamp_max(1.0).sqrt()


def surprise(mlp: Mlp, weights: list[Tensor], k: Tensor, value: Tensor) -> list[Tensor]:
    """∇_W ½‖M(k; W) - value‖² by autograd; key and value are constants to it, but not to whoever differentiates on."""
    with torch.enable_grad():
        at = [w * 1 if w.requires_grad else w.clone().requires_grad_() for w in weights]
        y = mlp.read(at, k)
        return list(torch.autograd.grad(y, at, y - value, create_graph=True))


class Head:
    """All memories of one head of one sequence."""

    def __init__(self, boxes: dict[str, Box], readout: Mapping[str, tuple[Tensor, Tensor]], options: dict[str, Any]):
        self.boxes, self.readout, self.options = boxes, readout, options
        self.mlp = Mlp(options["activation"], True, options["norm"])
        self.tokens: list[dict[str, Any]] = []

    def made(self, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        shown = {"k": k, "v": v, "q": q, "eta": k, "alpha": k}
        at = {
            name: self.mlp.read(self.boxes[name]["weights"], x) if name in self.boxes else x
            for name, x in shown.items()
        }
        gates = {name: 1 / (1 + torch.exp(-(torch.dot(w, at[name]) + b))) for name, (w, b) in self.readout.items()}
        raw = self.options["step"] == "raw"
        value = at["v"] if raw or "v" not in self.boxes else cut(at["v"], v)
        lr = self.options["eta_max"] * gates["eta"] if raw else gates["eta"]
        return {"q": unit(at["q"]), "k": unit(at["k"]), "v": value, "lr": lr, "alpha": gates["alpha"]}

    def token(self, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, live: bool) -> Tensor:
        """The answer to one token, after which all memories whose chunk it ends are written."""
        made = self.made(q, k, v)
        y = self.mlp.read(self.boxes["memory"]["weights"], made["q"])
        self.tokens.append({**made, "theta": theta, "live": live})
        for name in self.boxes:
            size = self.options["chunk" if name == "memory" else "projection_chunk"]
            if len(self.tokens) % size == 0:
                self.boxes[name] = self.written(self.boxes[name], self.tokens[-size:])
        return y if live else torch.zeros_like(y)

    def written(self, box: Box, tokens: Sequence[dict[str, Any]]) -> Box:
        first, delta, raw = box["weights"], self.options["delta"], self.options["step"] == "raw"
        tokens = [token for token in tokens if token["live"]]
        if self.options["step"] == "layerwise":
            own = [cut(self.mlp.read(first, token["v"]), token["v"]) for token in tokens]
            given = [
                (token["k"], v, token["lr"], token["alpha"], token["theta"])
                for token, v in zip(tokens, own, strict=True)
            ]
            states = layerwise(self.mlp, first, box["momentum"], given, self.options | {"objective": "l2"})
            weights, momenta = states[-1] if states else (first, box["momentum"])
            return {"weights": weights, "momentum": momenta}
        inputs = [self.mlp.passes(first, token["k"])[0] for token in tokens]
        norms = step_norms(inputs, [self.mlp.sensitivity(first, token["k"]) for token in tokens], delta, ahead=True)
        weights, momenta = box["weights"], box["momentum"]
        for token, a, n in zip(tokens, inputs, norms, strict=True):
            alpha, theta, eta = token["alpha"], token["theta"], token["lr"]
            value = self.mlp.read(first, token["v"])
            if not raw:
                eta = eta * self.options["bound"] * alpha * (1 - theta) / (1e-4 + n)
                value = cut(value, token["v"])
            gradients = surprise(self.mlp, first, token["k"], value)
            momenta = [theta * s + eta * g for s, g in zip(momenta, gradients, strict=True)]
            weights = [
                alpha * w - delta * eta * torch.outer(w @ x, x) - s for w, x, s in zip(weights, a, momenta, strict=True)
            ]
        return {"weights": weights, "momentum": momenta}


def twin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    starts: Mapping[str, Sequence[Tensor]],
    readout: Mapping[str, tuple[Tensor, Tensor]],
    momentum: Tensor | None = None,
    momenta: Mapping[str, Sequence[Tensor]] | None = None,
    mask: Tensor | None = None,
    written: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, dict[str, list[Tensor]], dict[str, list[Tensor]]]:
    """y, and by memory the weights and momenta at the start of the chunk that is not over.

    `starts` and `momenta` are `[B, H, out, in]`, w `[H, D]`, b `[H]`, momentum `[B, T, H]`; all begins with a chunk.
    A token that is not `written` `[B, T]` takes a place in its chunk; padding, which `mask` leaves out, takes none.
    """
    options = {
        "delta": 1.0,
        "step": "normalized",
        "bound": 1.0,
        "eta_max": 1.0,
        "activation": "silu",
        "norm": False,
        "chunk": 16,
        "projection_chunk": 64,
    } | options
    batch, length, heads = q.shape[:3]
    theta = torch.zeros(q.shape[:3], dtype=q.dtype) if momentum is None else momentum
    ys, ends = [], []
    for b in range(batch):
        for h in range(heads):
            boxes = {
                name: {
                    "weights": [w[b, h] for w in weights],
                    "momentum": [torch.zeros_like(w[b, h]) for w in weights]
                    if momenta is None
                    else [s[b, h] for s in momenta[name]],
                }
                for name, weights in starts.items()
            }
            head = Head(boxes, {name: (w[h], c[h]) for name, (w, c) in readout.items()}, options)
            answers = [
                torch.zeros_like(v[b, t, h])
                if mask is not None and not mask[b, t]
                else head.token(*(x[b, t, h] for x in (q, k, v, theta)), written is None or bool(written[b, t]))
                for t in range(length)
            ]
            ys.append(torch.stack(answers))
            ends.append(head.boxes)

    def stacked(kind: str) -> dict[str, list[Tensor]]:
        return {
            name: [
                torch.stack([end[name][kind][i] for end in ends]).unflatten(0, (batch, heads))
                for i in range(len(weights))
            ]
            for name, weights in starts.items()
        }

    return torch.stack(ys).unflatten(0, (batch, heads)).transpose(1, 2), stacked("weights"), stacked("momentum")
