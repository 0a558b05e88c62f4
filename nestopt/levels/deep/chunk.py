"""The write of one chunk, and its read: no weight is copied for a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nestopt.levels.deep import layerwise, mlp
from nestopt.levels.deep.mlp import Chunk, Linearised, Settings, Weights
from nestopt.levels.deep.own_values import bounded
from nestopt.levels.deep.step_size import step_sizes


def step(weights: Weights, q: Tensor, tokens: Chunk, settings: Settings) -> Tensor:
    """Read and write one chunk: `[B, H, C, D_v]`."""
    if settings.read == "chunk":
        asked = torch.cat([q, tokens.v], dim=-2) if settings.own_values else q
        y, at = mlp.read_and_linearise(weights, asked, tokens.k, settings.form)
        v = tokens.v
        if settings.own_values:
            y, v = y.split([q.shape[-2], v.shape[-2]], dim=-2)
            if settings.step != "raw":
                v = bounded(v, tokens.v)
        write(weights, at, v, tokens, settings)
        return y
    write(weights, mlp.linearise(weights, tokens.k, settings.form), tokens.v, tokens, settings)
    # each token reads the weights as they are by then
    x = q
    for i in range(len(weights) - 1, -1, -1):
        gates = tokens.gates(i).before if settings.read == "before" else tokens.gates(i).now
        assert gates is not None
        x = weights[i].read(x, gates)
        if i:
            x = mlp.ACTIVATIONS[settings.form.activation][0](x)
    return mlp.finish(x, q, settings.form)


def write(weights: Weights, at: Linearised, v: Tensor, tokens: Chunk, settings: Settings) -> None:
    """Write values v `[B, H, C, D_v]` under the keys of `tokens`, that the memory was linearised at."""
    if settings.step == "layerwise":
        layerwise.write(weights, at, v, tokens, settings)
        return
    found, lr = mlp.errors(weights, at, settings.error(at.y, v), settings.form), tokens.lr
    near: Sequence[Tensor | None] = [None] * len(weights)
    if settings.step == "normalized" or settings.delta:
        near = [weights[0].product(a, a.mT) for a in at.inputs]
    if settings.step == "normalized":
        lr = step_sizes(
            lr,
            tokens.damping,
            [product for product in near if product is not None],
            mlp.sensitivities(weights, at, settings.form),
            delta=settings.delta,
            bound=settings.bound,
            read=settings.read,
            chunk=settings.chunk,
        )
    strength = settings.delta * lr if settings.delta else None
    for i, (weight, error, products) in enumerate(zip(weights, found, near, strict=True)):
        weight.write(lr[..., None] * error, strength, products, tokens.gates(i).before)
