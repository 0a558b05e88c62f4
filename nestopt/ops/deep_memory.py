"""MLP memories on tokens: test-time training, Titans, DLA and the self-modifying write, a chunk at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from nestopt.core.tree import State
from nestopt.kernels import chunk_write, mlp
from nestopt.kernels.chunk_write import Fading
from nestopt.kernels.step_size import step_sizes
from nestopt.ops.given import Tokens, check_finite, check_range, packed, per_token, tokens
from nestopt.ops.shapes import check_choice, check_whole

Read = Literal["after", "before", "chunk"]


def deep_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    weights: Sequence[Tensor],
    lr: float | Tensor,
    decay: float | Tensor | None = None,
    momentum: float | Tensor | None = None,
    delta: float = 0.0,
    objective: Literal["l2", "dot"] = "l2",
    step: Literal["normalized", "raw"] = "normalized",
    bound: float = 1.0,
    read: Read = "after",
    activation: str = "silu",
    residual: bool = True,
    norm: bool = False,
    state: Mapping[str, Any] | None = None,
    chunk: int = 64,
    checkpoint: int = 0,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    validate: bool = False,
    stats: dict[str, Tensor] | None = None,
) -> tuple[Tensor, State]:
    r"""An MLP that learns its tokens as they come, one for every sequence and head (NL eq. 83-91; Titans; TTT).

    With $M(x; W) = x + W_1\sigma(W_2 \dots\sigma(W_L x))$ and, per layer, its input $a_t$ and the error at its output,

    $$S_t = \theta_t S_{t-1} + \eta_t \nabla_W\ell(M(k_t; \bar W), v_t), \qquad
      W_t = \alpha_t W_{t-1} - \delta\eta_t (W_{t-1}a_t)a_t^\top - S_t, \qquad y_t = M(q_t; W_t)$$

    where $\bar W$ are the weights that the present chunk of tokens began with (eq. 90); `chunk=1` is the exact recurrence.
    Only weights pass from chunk to chunk; within one, all is matrix products.

    Args:
        q, k: `[B, T, H, D_k]`, T >= 1. Lengths of 1 are usual.
        v: `[B, T, H, D_v]`; D_v = D_k where there is a residual.
        weights: W1 `[.., D_v, hidden]`, …, W_L `[.., hidden, D_k]` at the start, the outermost first: `[out, in]` for all
            heads, `[H, out, in]`, or `[B, H, out, in]`. One weight is a matrix memory (give `residual=False`).
        lr: η̃ in (0, 1] of the normalised step; η >= 0 of the raw one. A number, `[H]` or `[B, T, H]`, as all gates.
        decay: α in [0, 1]; None keeps all.
        momentum: θ in [0, 1); None is none: S is the gradient, and there is no state for it.
        delta: δ, 0 for none and 1 for delta gradient descent (eq. 57, 88), by each layer's own input.
        objective: `"l2"`, ½‖M(k) - v‖², or `"dot"`, -⟨M(k), v⟩.
        step: `"normalized"`: η = η̃ · bound · α (1 - θ) / (ε + n), which does not diverge (`nestopt.kernels.step_size`
            says what n is, and why); `"raw"`: η as it is given, the letter of the equations.
        bound: of the chunk's whole step along any direction, in (0, 2): up to 1 it never overshoots.
        read: whether a token reads the memory `"after"` its own write, `"before"` it, or as its `"chunk"` found it, which is
            the fastest.
        activation: σ, one of silu, gelu, relu, tanh, identity.
        residual: whether x is added to the read.
        norm: whether what W1 gives is divided by its root mean square.
        state: from a former call with the same settings; `weights` are then not looked at.
        chunk: C, tokens whose gradients are taken together.
        checkpoint: recompute in the backward pass all but every so many chunks' weights; 0 keeps everything. Memory is
            least near the root of the number of chunks.
        mask: `[B, T]`, True for tokens. Padding takes its place in the chunk, but neither writes nor fades.
        cu_seqlens: for sequences end to end in one row, q `[1, N, H, D]`: where each begins, and the end.
        validate: check that all numbers are finite and gates in range, at the cost of waiting for the device.
        stats: a dict that is filled with what the memory did, one number per chunk `[B, H, chunks]`: `"surprise"`, the root
            mean square of the errors M(k) - v at the chunk's first state, `"step"`, the mean η, and `"weights"`, the
            norm of all weights at its start.

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and the state: `"weights"` and `"momentum"` by name (`[B, H, out, in]`, float32,
        or float64 if v is) at the start of a chunk that is not over, and its tokens so far in `"pending"`.

    A token that is not finite is not written, and only its own answer is NaN.

    Raises:
        ValueError: for shapes that do not fit, an option that is not allowed, or a state of another memory; with `validate`,
            for numbers out of range or not finite.
    """
    arguments = {"lr": lr, "decay": decay, "momentum": momentum, "mask": mask, "state": state}
    settings = Settings(
        form=mlp.Form(activation, residual, norm),
        delta=float(delta),
        objective=objective,
        step=step,
        bound=bound,
        read=read,
        chunk=chunk,
        checkpoint=checkpoint,
    )
    if validate:
        check_finite(q=q, k=k, v=v)
        _check_gates(lr, decay, momentum, step)

    def run(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> tuple[Tensor, State]:
        return _run(q, k, v, weights, settings, stats, **given)

    if cu_seqlens is not None:
        return packed(run, q, k, v, cu_seqlens, **arguments)
    return run(q, k, v, **arguments)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of `deep_memory` that are no tensors."""

    form: mlp.Form
    delta: float
    objective: str
    step: str
    bound: float
    read: Read
    chunk: int
    checkpoint: int

    def __post_init__(self) -> None:
        check_choice("objective", self.objective, ("l2", "dot"))
        check_choice("step", self.step, ("normalized", "raw"))
        check_choice("read", self.read, ("after", "before", "chunk"))
        check_choice("activation", self.form.activation, tuple(mlp.ACTIVATIONS))
        check_whole("chunk", self.chunk, 1)
        check_whole("checkpoint", self.checkpoint, 0)
        if not 0 < self.bound < 2:
            raise ValueError(f"bound={self.bound!r} is not allowed; give a number between 0 and 2")
        if not self.delta >= 0:
            raise ValueError(f"delta={self.delta!r} is not allowed; give a number of 0 or more")


def _check_gates(
    lr: float | Tensor, decay: float | Tensor | None, momentum: float | Tensor | None, step: str
) -> None:
    check_range("lr", lr, 0.0, 1.0 if step == "normalized" else float("inf"))
    if decay is not None:
        check_range("decay", decay, 0.0, 1.0)
    if momentum is not None:
        check_range("momentum", momentum, 0.0, 1.0, closed="[)")


# -- the memory between calls: weights at a chunk's start, and the tokens since ------------------------------------------


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    weights: Sequence[Tensor],
    settings: Settings,
    stats: dict[str, Tensor] | None,
    *,
    lr: float | Tensor,
    decay: float | Tensor | None,
    momentum: float | Tensor | None,
    mask: Tensor | None,
    state: Mapping[str, Any] | None,
) -> tuple[Tensor, State]:
    dtype = torch.promote_types(v.dtype, torch.float32)
    gates = {
        name: per_token(name, value, q, dtype)
        for name, value in (("lr", lr), ("decay", decay), ("momentum", momentum))
        if value is not None
    }
    given = tokens(q, k, v, mask, *gates.values())
    lengths = given.live.shape
    fresh = {"k": given.k, "v": given.v, "live": given.live}
    idle = {"lr": 0.0, "decay": 1.0, "momentum": 1.0}
    fresh |= {name: given.gate(gate, idle[name]).expand(lengths) for name, gate in gates.items()}
    with torch.autocast(q.device.type, enabled=False):
        now, pending = _begun(weights, fresh, settings, "momentum" in gates, state)
        y, now, rest = scan_chunks(now, given.q, pending, fresh, settings, stats)
    return given.answer(y), {**_named(now), "pending": rest}


Now = tuple[list[Tensor], list[Tensor] | None]
"""The weights and their momenta, W1 first."""


def _begun(
    weights: Sequence[Tensor],
    fresh: Mapping[str, Tensor],
    settings: Settings,
    has_momentum: bool,
    state: Mapping[str, Any] | None,
) -> tuple[Now, Mapping[str, Tensor] | None]:
    k, v = fresh["k"], fresh["v"]
    batch, heads = k.shape[:2]
    check_weights(weights, k, v, settings.form)
    shapes = [(batch, heads, *weight.shape[-2:]) for weight in weights]
    if state is None:
        begun = [weight.to(k.dtype).expand(shape) for weight, shape in zip(weights, shapes, strict=True)]
        return (begun, [torch.zeros_like(w) for w in begun] if has_momentum else None), None
    wanted = {"weights", "pending", *(["momentum"] if has_momentum else [])}
    if set(state) != wanted:
        raise ValueError(
            f"state has the keys {sorted(state)}; with these gates it must have {sorted(wanted)}. Is it the state of "
            "another memory?"
        )
    now = []
    for kind in sorted(wanted - {"pending"}, reverse=True):
        found = []
        for i, shape in enumerate(shapes, start=1):
            weight = state[kind].get(f"W{i}")
            if weight is None or tuple(weight.shape) != shape:
                have = "missing" if weight is None else f"{list(weight.shape)}"
                raise ValueError(
                    f"state[{kind!r}]['W{i}'] is {have}; for these weights and tokens it must be {list(shape)}. Is it the "
                    "state of another batch or another memory?"
                )
            found.append(weight.to(k.dtype))
        now.append(found)
    pending = state["pending"]
    if set(pending) != set(fresh):
        raise ValueError(f"state['pending'] has {sorted(pending)}; with these gates it must have {sorted(fresh)}")
    return (now[0], now[1] if has_momentum else None), pending


def check_weights(weights: Sequence[Tensor], k: Tensor, v: Tensor, form: mlp.Form) -> None:
    """Raise ValueError unless `weights` fit each other and k, v `[B, H, T, D]`."""
    if not weights:
        raise ValueError("weights are empty; give W1, or W1, …, W_L with the outermost first")
    batch, heads, into, out = k.shape[0], k.shape[1], k.shape[-1], v.shape[-1]
    leading = ((), (heads,), (batch, heads))
    sizes = [out, *(weight.shape[-2] for weight in weights[1:]), into]
    for i, weight in enumerate(weights):
        if weight.ndim < 2 or tuple(weight.shape[:-2]) not in leading or weight.shape[-2:] != (sizes[i], sizes[i + 1]):
            raise ValueError(
                f"weights[{i}] has the shape {list(weight.shape)}; for k [batch, heads, tokens, width] {list(k.shape)}, v "
                f"{list(v.shape)} and the weights beside it, it must be {[sizes[i], sizes[i + 1]]}, with or without the "
                f"heads ({heads}), or the batch and the heads ({batch}, {heads}), before it"
            )
    if form.residual and into != out:
        raise ValueError(f"residual=True needs keys and values of one width, not {into} and {out}; give residual=False")


def _named(now: Now) -> State:
    names: State = {"weights": {f"W{i}": w for i, w in enumerate(now[0], start=1)}}
    if now[1] is not None:
        names["momentum"] = {f"W{i}": s for i, s in enumerate(now[1], start=1)}
    return names


# -- chunks -----------------------------------------------------------------------------------------------------------


def scan_chunks(
    now: Now,
    q: Tensor,
    pending: Mapping[str, Tensor] | None,
    fresh: Mapping[str, Tensor],
    settings: Settings,
    stats: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Now, State]:
    """Run over `fresh` tokens `[B, H, T, ..]` after `pending` ones, which stand at the beginning of a chunk.

    Returns:
        y `[B, H, T, D_v]`, the memory at the start of the last chunk that is not over, and that chunk's tokens.
    """
    done = 0 if pending is None else pending["k"].shape[2]
    held = fresh if not done else {name: torch.cat([pending[name], x], dim=2) for name, x in fresh.items()}  # type: ignore[index]
    chunk, length = settings.chunk, done + q.shape[2]
    whole = length - length % chunk
    rest = {name: x[:, :, whole:] for name, x in held.items()}
    if settings.read == "chunk":
        queries = _pieces(q, chunk - done if done else chunk, chunk)
    else:  # reads within a chunk are taken with its writes: tokens that were answered before ask nothing
        queries = _pieces(torch.nn.functional.pad(q, (0, 0, done, 0)), chunk, chunk)
    ys: list[Tensor] = []
    chunks = _chunks(held, whole, chunk)
    group = settings.checkpoint or len(chunks) or 1
    notes: list[dict[str, Tensor]] | None = None if stats is None else []
    for first in range(0, len(chunks), group):
        part, asked = chunks[first : first + group], queries[first : first + group]

        def run(*tensors: Tensor, part: list[Chunk] = part, asked: list[Tensor] = asked) -> tuple[Tensor, ...]:
            memory = _joined(tensors, now[1] is not None)
            answers = []
            for tokens_, ask in zip(part, asked, strict=True):
                y, memory = step_chunk(memory, ask, tokens_, settings, notes)
                answers.append(y)
            return torch.cat(answers, dim=2), *memory[0], *(memory[1] or [])

        flat = (*now[0], *(now[1] or []))
        if settings.checkpoint and torch.is_grad_enabled():
            y, *flat_after = recomputed(run, *flat, use_reentrant=False)  # type: ignore[misc]
        else:
            y, *flat_after = run(*flat)
        now = _joined(flat_after, now[1] is not None)
        ys.append(y)
    if length > whole:
        asked_last = queries[len(chunks)]
        if settings.read == "chunk":
            ys.append(mlp.read(now[0], asked_last, settings.form)[0])
        else:
            ys.append(read_chunk(now, asked_last, _chunk(rest), settings))
    y = torch.cat(ys, dim=2) if len(ys) > 1 else ys[0]
    if stats is not None and notes:
        stats.update({name: torch.stack([note[name] for note in notes], dim=-1) for name in notes[0]})
    return (y if settings.read == "chunk" or not done else y[:, :, done:]), now, rest


@dataclasses.dataclass(frozen=True)
class Chunk:
    """The tokens of a chunk `[B, H, C, ..]` and what their gates come to."""

    k: Tensor
    v: Tensor
    live: Tensor
    lr: Tensor
    damping: Tensor
    fading: Fading


def _chunks(held: Mapping[str, Tensor], whole: int, chunk: int) -> list[Chunk]:
    """All whole chunks, what their gates come to computed at once."""
    if not whole:
        return []
    blocks = {name: x[:, :, :whole].unflatten(2, (-1, chunk)) for name, x in held.items()}
    fadings = Fading.of(blocks.get("decay"), blocks.get("momentum"), blocks["live"]).unbind(2, whole // chunk)
    columns = [blocks[name].unbind(2) for name in ("k", "v", "live", "lr")]
    damping = _damping(blocks).unbind(2)
    return [Chunk(*row, damping=d, fading=f) for *row, d, f in zip(*columns, damping, fadings, strict=True)]


def _chunk(held: Mapping[str, Tensor]) -> Chunk:
    fading = Fading.of(held.get("decay"), held.get("momentum"), held["live"])
    return Chunk(held["k"], held["v"], held["live"], held["lr"], _damping(held), fading)


def _damping(held: Mapping[str, Tensor]) -> Tensor:
    """α (1 - θ): by what the normalised step is shortened."""
    share = torch.ones_like(held["lr"]) if "decay" not in held else held["decay"]
    return share * (1 - held["momentum"]) if "momentum" in held else share


def _pieces(q: Tensor, first: int, size: int) -> list[Tensor]:
    """q `[B, H, T, D]` in pieces, the first of them of another length."""
    if q.shape[2] <= first:
        return [q]
    return [q[:, :, :first], *q[:, :, first:].split(size, dim=2)]


def _joined(flat: Sequence[Tensor], has_momentum: bool) -> Now:
    if not has_momentum:
        return list(flat), None
    half = len(flat) // 2
    return list(flat[:half]), list(flat[half:])


def step_chunk(
    now: Now, q: Tensor, tokens_: Chunk, settings: Settings, notes: list[dict[str, Tensor]] | None
) -> tuple[Tensor, Now]:
    """Read and write one whole chunk."""
    if settings.read == "chunk":
        y, used = mlp.read(now[0], q, settings.form)
        writes, now = _writes((used, now[1]), tokens_, settings, notes)
    else:
        writes, now = _writes(now, tokens_, settings, notes)
        y, now = _answers(now, q, writes, tokens_.fading, settings)
    momenta: Sequence[Tensor | None] = [None] * len(writes) if now[1] is None else now[1]
    moved = [
        chunk_write.advance(weight, momentum, written, tokens_.fading)
        for weight, momentum, written in zip(now[0], momenta, writes, strict=True)
    ]
    kept = None if now[1] is None else [momentum for _, momentum in moved if momentum is not None]
    return y, ([weight for weight, _ in moved], kept)


def read_chunk(now: Now, q: Tensor, tokens_: Chunk, settings: Settings) -> Tensor:
    """Read within a chunk that is not over."""
    writes, now = _writes(now, tokens_, settings, None)
    return _answers(now, q, writes, tokens_.fading, settings)[0]


def _writes(
    now: Now, tokens_: Chunk, settings: Settings, notes: list[dict[str, Tensor]] | None
) -> tuple[list[chunk_write.Write], Now]:
    """What the chunk writes to each weight."""
    at, steps, strength, weights = _directions(now[0], tokens_, settings, notes)
    writes, momenta = [], []
    for i in range(len(weights)):
        momentum = None if now[1] is None else now[1][i]
        written, momentum = chunk_write.write(
            momentum, at.inputs[i], steps[i], strength, at.outputs[i], tokens_.fading
        )
        writes.append(written)
        if momentum is not None:
            momenta.append(momentum)
    return writes, (weights, momenta or None)


def _directions(
    weights: list[Tensor], tokens_: Chunk, settings: Settings, notes: list[dict[str, Tensor]] | None
) -> tuple[mlp.Linearised, list[Tensor], Tensor | None, list[Tensor]]:
    """The memory linearised at its keys, η ∂ℓ/∂(output) of each weight, the strength of the delta decay; the weights."""
    at, weights = mlp.linearise(weights, tokens_.k, settings.form)
    wrong = at.y - tokens_.v if settings.objective == "l2" else -tokens_.v
    found, weights = mlp.errors(weights, at, wrong, settings.form)
    lr = tokens_.lr
    if settings.step == "normalized":
        sensitivities, weights = mlp.sensitivities(weights, at, settings.form)
        lr = step_sizes(
            lr,
            tokens_.damping,
            at.inputs,
            sensitivities,
            delta=settings.delta,
            bound=settings.bound,
            read=settings.read,
            chunk=settings.chunk,
        )
    if notes is not None:
        notes.append(_note(weights, at, tokens_, lr))
    return at, [lr[..., None] * d for d in found], settings.delta * lr if settings.delta else None, weights


def _note(weights: Sequence[Tensor], at: mlp.Linearised, tokens_: Chunk, lr: Tensor) -> dict[str, Tensor]:
    count = tokens_.live.sum(-1).clamp_min(1)
    wrong = (at.y - tokens_.v).detach().square().mean(-1) * tokens_.live
    return {
        "surprise": (wrong.sum(-1) / count).sqrt(),
        "step": lr.detach().sum(-1) / count,
        "weights": torch.stack([w.detach().square().sum((-2, -1)) for w in weights]).sum(0).sqrt(),
    }


def _answers(
    now: Now, q: Tensor, writes: Sequence[chunk_write.Write], fading: Fading, settings: Settings
) -> tuple[Tensor, Now]:
    """The read of each token with the weights as they are by then."""
    activation: Callable[[Tensor], Tensor] = mlp.ACTIVATIONS[settings.form.activation][0]
    x, weights = q, list(now[0])
    momenta: list[Tensor | None] = [None] * len(writes) if now[1] is None else list(now[1])
    for i in range(len(writes) - 1, -1, -1):
        x, weights[i], momenta[i] = chunk_write.read_within(
            weights[i], momenta[i], x, writes[i], fading, settings.read
        )
        if i:
            x = activation(x)
    kept = None if now[1] is None else [momentum for momentum in momenta if momentum is not None]
    return mlp.finish(x, q, settings.form), (weights, kept)


__all__ = ["Tokens", "deep_memory"]
