"""The slow twin of `nestopt.ops.deep_memory`: loops over batch, heads and tokens, written from the equations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SIGMA: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: z * (1 + torch.erf(z / math.sqrt(2))) / 2,
    "relu": lambda z: torch.where(z > 0, z, 0),
    "tanh": torch.tanh,
    "identity": lambda z: z * 1,
}


class Mlp:
    """One memory of one head, on one token at a time."""

    def __init__(self, activation: str, residual: bool, norm: bool) -> None:
        self.sigma, self.residual, self.norm = SIGMA[activation], residual, norm

    def read(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        out = self.passes(weights, x)[1][0]
        if self.norm:
            out = out / (out.square().mean() + 1e-6).sqrt()
        return x + out if self.residual else out

    def passes(self, weights: Sequence[Tensor], x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Each weight's input, and what it makes of it; W1 first."""
        inputs, outputs = [], []
        for i in reversed(range(len(weights))):
            inputs.insert(0, x)
            outputs.insert(0, weights[i] @ x)
            x = self.sigma(outputs[0])
        return inputs, outputs

    def gradient(self, weights: Sequence[Tensor], k: Tensor, v: Tensor, objective: str) -> list[Tensor]:
        """∇_W ℓ(M(k; W), v) by autograd."""
        with torch.enable_grad():
            at = [w if w.requires_grad else w.clone().requires_grad_() for w in weights]
            y = self.read(at, k)
            loss = (y - v).square().sum() / 2 if objective == "l2" else -(y * v).sum()
            return list(torch.autograd.grad(loss, at, create_graph=True))

    def pulled(self, weights: Sequence[Tensor], k: Tensor, error: Tensor) -> list[Tensor]:
        """∇_W ⟨M(k; W), error⟩ by autograd; k and the error are constants to it."""
        with torch.enable_grad():
            at = [w * 1 if w.requires_grad else w.clone().requires_grad_() for w in weights]
            return list(torch.autograd.grad(self.read(at, k), at, error, create_graph=True))

    def sensitivity(self, weights: Sequence[Tensor], x: Tensor) -> list[Tensor]:
        """Bounds of ‖∂y/∂(output of each weight)‖: products of Frobenius norms of W_l diag(σ′)."""
        _, outputs = self.passes(weights, x)
        out = outputs[0]
        bounds = [1 / (out.square().mean() + 1e-6).sqrt() if self.norm else torch.ones((), dtype=x.dtype)]
        for i in range(1, len(weights)):
            with torch.enable_grad():
                z = outputs[i] if outputs[i].requires_grad else outputs[i].clone().requires_grad_()
                (slope,) = torch.autograd.grad(self.sigma(z).sum(), z, create_graph=True)
            total = torch.zeros((), dtype=x.dtype)
            for row in weights[i - 1]:
                for entry, s in zip(row, slope, strict=True):
                    total = total + (entry * s) ** 2
            bounds.append(bounds[-1] * total.clamp_min(1e-30).sqrt())
        return bounds


def step_norms(
    inputs: Sequence[Sequence[Tensor]], bounds: Sequence[Sequence[Tensor]], delta: float, ahead: bool
) -> list[Tensor]:
    """n of each token (`nestopt.levels.deep.step_size`), of inputs and bounds by token and layer.

    `ahead`: whether the sum goes over all tokens, or over those up to the token itself.
    """

    def close(s: int) -> Tensor:
        """K_ts for all t."""
        dots = [torch.stack([torch.dot(a[layer], a_s) for a in inputs]).abs() for layer, a_s in enumerate(inputs[s])]
        read = sum(torch.stack([j[layer] for j in bounds]) * bounds[s][layer] * dot for layer, dot in enumerate(dots))
        return read + delta * torch.stack(dots).amax(0)  # type: ignore[no-any-return]

    rows = [close(s) for s in range(len(inputs))]
    own = torch.stack([row[s] for s, row in enumerate(rows)]) if rows else None
    weighed = [row * (row[s] / own).sqrt() for s, row in enumerate(rows)]
    return [(row if ahead else row[: s + 1]).sum() for s, row in enumerate(weighed)]


def kept(i: int, alpha: Tensor, options: dict) -> Tensor:
    """What of W_{i + 1} a token leaves."""
    return alpha if i == 0 or options.get("forget", "all") == "all" else torch.ones_like(alpha)


Write = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""k, v, η̃, α, θ."""


def layerwise(
    mlp: Mlp, first: list[Tensor], momenta: list[Tensor], tokens: Sequence[Write], options: dict
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The weights and momenta after each token of the layerwise write, W1 first, in two passes over the tokens."""
    delta, linear = options["delta"], options["objective"] == "l2"

    def outer(weights: list[Tensor], k: Tensor, v: Tensor, h: Tensor) -> tuple[Tensor, ...]:
        """∂ℓ/∂y, e, e ∂ℓ/∂W1, W1's input, and the share of ∂ℓ/∂y that the write of W1 leaves."""
        inputs, outputs = mlp.passes(weights, k)
        y = mlp.read(weights, k)
        error = y - v if linear else -v
        felt = 1 / (outputs[0].square().mean() + 1e-6) if mlp.norm else torch.ones_like(h)
        square = inputs[0] @ inputs[0]
        e = h / (1e-6 + 0.1 * (k @ k) + (felt + delta) / (1 + delta) * square)
        gradient = mlp.pulled(weights, k, error)[0]
        return error, e, e * gradient, inputs[0], 1 - e * (linear * felt + delta) * square

    def moved(i: int, w: Tensor, s: Tensor, g: Tensor, decay: Tensor, a: Tensor, token: Write) -> tuple[Tensor, Tensor]:
        _, _, _, alpha, theta = token
        s = theta * s + g
        return kept(i, alpha, options) * w - delta * decay * torch.outer(w @ a, a) - (1 - theta) * s, s

    shadow, inner = (first[0], momenta[0]), []
    for token in tokens:
        k, v, lr, alpha, _ = token
        h = lr * alpha * options["bound"] / (1 + delta)
        error, e, g, a, left = outer([shadow[0], *first[1:]], k, v, h)
        shadow = moved(0, *shadow, g, e, a, token)
        inputs, felt = mlp.passes(first, k)[0], mlp.sensitivity(first, k)
        rates = [
            0.25 / (len(first) - 1) * h / (1e-6 + 0.1 * (k @ k) + (felt[i] ** 2 + delta) * (inputs[i] @ inputs[i]))
            for i in range(1, len(first))
        ]
        found = mlp.pulled(first, k, left * error)[1:]
        inner.append([(b * g, b, a) for b, g, a in zip(rates, found, inputs[1:], strict=True)])
    now, states = list(zip(first, momenta, strict=True)), []
    for token, written in zip(tokens, inner, strict=True):
        k, v, lr, alpha, _ = token
        _, e, g, a, _ = outer([w for w, _ in now], k, v, lr * alpha * options["bound"] / (1 + delta))
        each = enumerate(zip(now, [(g, e, a), *written], strict=True))
        now = [moved(i, *own, *write, token) for i, (own, write) in each]
        states.append(([w for w, _ in now], [s for _, s in now]))
    return states


def one_chunk(
    mlp: Mlp,
    weights: list[Tensor],
    momenta: list[Tensor],
    tokens: list[tuple[Tensor, ...]],
    live: list[bool],
    options: dict,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Answers to a chunk's tokens (q, k, v, η̃, α, θ), and the weights and momenta after it."""
    first, answers = weights, []
    written = iter(())
    if options["step"] == "layerwise":
        there = [token[1:] for token, alive in zip(tokens, live, strict=True) if alive]
        written = iter(layerwise(mlp, weights, momenta, there, options))
    passes = [mlp.passes(first, k)[0] for _, k, *_ in tokens]
    bounds = [mlp.sensitivity(first, k) for _, k, *_ in tokens]
    there = [t for t in range(len(tokens)) if live[t]]
    found = step_norms(
        [passes[t] for t in there], [bounds[t] for t in there], options["delta"], options["read"] == "chunk"
    )
    norms = dict(zip(there, found, strict=True))
    for t, (q, k, v, lr, alpha, theta) in enumerate(tokens):
        before = weights
        if live[t] and options["step"] == "layerwise":
            weights, momenta = next(written)
        elif live[t]:
            eta = lr
            if options["step"] == "normalized":
                n = norms[t]
                if options["read"] != "chunk":
                    n = n * sum(1 / i for i in range(1, options["chunk"] + 1))
                eta = lr * options["bound"] * alpha * (1 - theta) / (1e-4 + n)
            gradient = mlp.gradient(first, k, v, options["objective"])
            momenta = [theta * s + eta * g for s, g in zip(momenta, gradient, strict=True)]
            weights = [
                kept(i, alpha, options) * w - options["delta"] * eta * torch.outer(w @ a, a) - s
                for i, (w, a, s) in enumerate(zip(weights, passes[t], momenta, strict=True))
            ]
        at = {"after": weights, "before": before, "chunk": first}[options["read"]]
        answers.append(mlp.read(at, q) if live[t] else torch.zeros_like(v))
    return answers, weights, momenta


def twin(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Sequence[Tensor],
    lr: Tensor,
    decay: Tensor | None = None,
    momentum: Tensor | None = None,
    momenta: Sequence[Tensor] | None = None,
    mask: Tensor | None = None,
    written: Tensor | None = None,
    activation: str = "silu",
    residual: bool = True,
    norm: bool = False,
    **options: object,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """y, and the weights and momenta at the start of the chunk that is not over.

    Weights and `momenta` are `[B, H, out, in]`, gates `[B, T, H]`; all begins with a chunk. A token that is not
    `written` `[B, T]` takes a place in its chunk; padding, which `mask` leaves out, takes none.
    """
    options = {
        "delta": 0.0,
        "objective": "l2",
        "step": "normalized",
        "bound": 1.0,
        "read": "after",
        "chunk": 64,
    } | options
    batch, length, heads = q.shape[:3]
    mlp, chunk = Mlp(activation, residual, norm), int(options["chunk"])  # type: ignore[call-overload]
    decay = torch.ones_like(lr) if decay is None else decay
    momentum = torch.zeros_like(lr) if momentum is None else momentum
    momenta = [torch.zeros_like(w) for w in weights] if momenta is None else momenta
    ys, ends = [], []
    for b in range(batch):
        for h in range(heads):
            now, kept = [w[b, h] for w in weights], [s[b, h] for s in momenta]
            answers: dict[int, Tensor] = {}
            there = [t for t in range(length) if mask is None or mask[b, t]]
            for begin in range(0, len(there), chunk):
                at = there[begin : begin + chunk]
                tokens = [tuple(x[b, t, h] for x in (q, k, v, lr, decay, momentum)) for t in at]
                live = [written is None or bool(written[b, t]) for t in at]
                found, after, moved = one_chunk(mlp, now, kept, tokens, live, options)
                answers |= dict(zip(at, found, strict=True))
                if len(at) == chunk:
                    now, kept = after, moved
            ys.append(torch.stack([answers.get(t, torch.zeros_like(v[b, t, h])) for t in range(length)]))
            ends.append((now, kept))

    def stacked(kind: int, i: int) -> Tensor:
        return torch.stack([end[kind][i] for end in ends]).unflatten(0, (batch, heads))

    y = torch.stack(ys).unflatten(0, (batch, heads)).transpose(1, 2)
    layers = range(len(weights))
    return y, [stacked(0, i) for i in layers], [stacked(1, i) for i in layers]
