"""Memories that make keys, values, queries and gates, and learn as they do.

The part of `self_modifying` before the memory that answers, on which these do not depend.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.pending import COUNT, RowChunks
from nestopt.kernels.products import GateProducts
from nestopt.levels.deep import mlp
from nestopt.levels.deep.mlp import Chunk, ChunkGates, Settings
from nestopt.levels.deep.scan import (
    WeightState,
    block_weights,
    both_gates,
    concat_tokens,
    damping,
    idle,
    recomputed,
    step,
    weights_after,
)
from nestopt.levels.deep.step_size import bounded
from nestopt.levels.deep.weight import BlockWeight

SOURCES = {"k": "k", "v": "v", "q": "q", "eta": "k", "alpha": "k"}
"""What each of these memories is shown."""

Readout = Mapping[str, tuple[Tensor, Tensor]]
"""w `[.., H, D]` and b `[.., H]` of the gates `"eta"` and `"alpha"`."""

Made = dict[str, Tensor]
"""Of tokens: `"q"`, `"k"`, `"v"` `[B, H, n, D]`, and `[B, H, n]`: `"live"`, `"lr"`, `"decay"`, perhaps `"momentum"`."""


@dataclasses.dataclass(frozen=True)
class ProjectionMemories:
    """What makes of a token what is learned of it.

    Attributes:
        names: of the memories, in the order of `SOURCES`.
        readout: of the gates.
        settings: of the memories; their chunk.
        eta_max: multiplies η of the raw step.
    """

    names: tuple[str, ...]
    readout: Readout
    settings: Settings
    eta_max: float

    def generate(self, given: Mapping[str, Tensor], reads: Mapping[str, Tensor]) -> Made:
        """Make of tokens `given` (q, k, v, live, perhaps momentum), and what the memories read of them by name."""
        at = {name: reads.get(name, given[source]) for name, source in SOURCES.items()}
        normalized, live = self.settings.step != "raw", given["live"]
        lr, keep = (self._gate(name, at[name]) for name in ("eta", "alpha"))
        found = {
            "q": F.normalize(at["q"], dim=-1),
            "k": F.normalize(at["k"], dim=-1),
            "v": bounded(at["v"], given["v"]) if normalized and "v" in reads else at["v"],
            "live": live,
            "lr": torch.where(live, lr if normalized else self.eta_max * lr, 0.0),
            "decay": torch.where(live, keep, 1.0),
        }
        found |= {"momentum": given["momentum"]} if "momentum" in given else {}
        if (was := given.get(_WAS)) is None:
            return found
        return found | {
            name: torch.where(was[..., None] if x.ndim > was.ndim else was, given[f"{_WAS}{name}"], x)
            for name, x in found.items()
            if name != "q"
        }

    def _gate(self, name: str, x: Tensor) -> Tensor:
        w, b = (part.to(x.dtype) for part in self.readout[name])
        return ((x @ w[..., None])[..., 0] + b[..., None]).sigmoid()


def project(
    boxes: dict[str, WeightState],
    given: Mapping[str, Tensor],
    pending: Made | None,
    maker: ProjectionMemories,
    mask: Tensor | None = None,
) -> tuple[Made, dict[str, WeightState], Made | None]:
    """Make of all tokens what is learned of them, and write it.

    Args:
        boxes: the memories as the chunk of the `pending` tokens found them.
        given: `"q"`, `"k"`, `"v"` `[B, H, T, D]`, `"live"` and perhaps `"momentum"` `[B, H, T]`.
        pending: what was made of the tokens of a chunk that is not over, without `"q"`; None is none.
        maker: of them.
        mask: `[B, T]`, True for tokens; None is all.

    Returns:
        What was made of the given tokens, the memories at the start of the chunk that is not over, and what was made of
        its tokens (None if nothing here learns).
    """
    if not boxes:
        return maker.generate(given, {}), boxes, None
    chunk, length = maker.settings.chunk, given["k"].shape[2]
    done = 0 if pending is None else pending["k"].shape[2]
    rows = RowChunks.of(pending, mask, given["k"], chunk)
    if done + length < chunk or (rows is not None and not rows.whole):  # nothing is written nor need be stacked
        reads = {
            name: mlp.read(block_weights(boxes[name]), given[SOURCES[name]], maker.settings.form)
            for name in maker.names
        }
        made = maker.generate(given, reads)
        now = _kept(made)
        return made, boxes, concat_tokens(pending, now) if rows is None else rows.kept(rows.joined(pending, now))
    if rows is not None:
        every = _with_pending(given, pending, rows)
        made, boxes, left = project(boxes, every, None, maker)
        assert left is not None
        return idle({name: rows.back(x) for name, x in made.items()}), boxes, rows.kept(left)
    rest = (done + length) % chunk
    sizes = [chunk - done, *[chunk] * ((done + length) // chunk - 1), *([rest] if rest else [])]
    pieces = _pieces(given, sizes)
    segment = _segment(maker.settings, len(pieces))
    stack, found = _stacked([boxes[name] for name in maker.names]), []
    for first in range(0, len(pieces), segment):
        part = pieces[first : first + segment]
        stack, made = _through(stack, part, pending if first == 0 else None, maker)
        found.append(made)
    made = _joined(found)
    names = zip(maker.names, _unstacked(stack, len(maker.names)), strict=True)
    return made, dict(names), {name: x[:, :, length - rest :] for name, x in _kept(made).items()}


_WAS = "was "
"""Before the names of what was made of a pending token."""


def _with_pending(given: Mapping[str, Tensor], pending: Made | None, rows: RowChunks) -> Made:
    """Return pending and given tokens at the places of `rows`: what these are shown, and what was made of those."""
    every = idle(rows.joined(None, given))
    if pending is None:
        return every
    none = {name: x.new_zeros(*x.shape[:2], given["k"].shape[2], *x.shape[3:]) for name, x in _kept(pending).items()}
    made = idle(rows.joined(pending, none))
    was = rows.was_pending[:, None]
    return every | {_WAS: was} | {f"{_WAS}{name}": x for name, x in made.items()}


def _kept(made: Made) -> Made:
    return {name: x for name, x in made.items() if name not in ("q", COUNT)}


def _segment(settings: Settings, count: int) -> int:
    """Return how many chunks lie between those whose weights are kept."""
    if not settings.checkpoint or not torch.is_grad_enabled():
        return count
    return settings.checkpoint


def _pieces(given: Mapping[str, Tensor], sizes: Sequence[int]) -> list[dict[str, Tensor]]:
    columns = [x.split(list(sizes), dim=2) if len(sizes) > 1 else (x,) for x in given.values()]
    return [dict(zip(given, row, strict=True)) for row in zip(*columns, strict=True)]


def _joined(parts: Sequence[Made]) -> Made:
    if len(parts) == 1:
        return parts[0]
    return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}


# -- all memories as one: their heads side by side ---------------------------------------------------------------------


def _stacked(boxes: Sequence[WeightState]) -> WeightState:
    weights = [torch.cat(same, dim=1) for same in zip(*(box[0] for box in boxes), strict=True)]
    momenta = [box[1] for box in boxes if box[1] is not None]
    return weights, [torch.cat(same, dim=1) for same in zip(*momenta, strict=True)] or None


def _unstacked(stack: WeightState, count: int) -> list[WeightState]:
    weights = zip(*(w.chunk(count, dim=1) for w in stack[0]), strict=True)
    if stack[1] is None:
        return [(list(own), None) for own in weights]
    momenta = zip(*(s.chunk(count, dim=1) for s in stack[1]), strict=True)
    return [(list(own), list(kept)) for own, kept in zip(weights, momenta, strict=True)]


def _repeated(x: Tensor, count: int) -> Tensor:
    """Return `[B, H, ..]` for each of `count` memories, `[B, count · H, ..]`."""
    return x.repeat(1, count, *(1,) * (x.ndim - 2))


def _through(
    stack: WeightState, pieces: Sequence[Mapping[str, Tensor]], pending: Made | None, maker: ProjectionMemories
) -> tuple[WeightState, Made]:
    """What is made of these tokens, each piece of which, after the pending ones, is a chunk, but perhaps the last."""

    def run(stack: WeightState) -> tuple[list[Tensor], WeightState]:
        found, before = [], pending
        for piece in pieces:
            weights = block_weights(stack)
            made = maker.generate(piece, _reads(weights, piece, maker))
            found.append(made)
            tokens = concat_tokens(before, _kept(made))
            before = None
            if tokens["k"].shape[2] == maker.settings.chunk:
                stack = _written(weights, tokens, maker)
        return list(_joined(found).values()), stack

    if maker.settings.checkpoint and torch.is_grad_enabled():
        values, stack = recomputed(run, stack)
    else:
        values, stack = run(stack)
    names = ("q", "k", "v", "live", "lr", "decay", *(["momentum"] if "momentum" in pieces[0] else []))
    return stack, dict(zip(names, values, strict=True))


def _reads(weights: Sequence[BlockWeight], piece: Mapping[str, Tensor], maker: ProjectionMemories) -> dict[str, Tensor]:
    asked = torch.cat([piece[SOURCES[name]] for name in maker.names], dim=1)
    answers = mlp.read(weights, asked, maker.settings.form)
    return dict(zip(maker.names, answers.chunk(len(maker.names), dim=1), strict=True))


def _written(weights: Sequence[BlockWeight], tokens: Made, maker: ProjectionMemories) -> WeightState:
    """Return the memories after a chunk, each of which writes values of its own."""
    count = len(maker.names)
    size = tokens["k"].shape[2]

    def at(gates: GateProducts) -> ChunkGates:
        gates = gates.each(lambda x: _repeated(x, count))
        before = gates.before() if maker.settings.delta or maker.settings.step == "layerwise" else None
        return ChunkGates(None, before, gates.rows(size - 1, size))

    each = (*(tokens[name] for name in ("k", "v", "lr")), damping(tokens, maker.settings))
    k, v, lr, damped = (_repeated(x, count) for x in each)
    chunk = Chunk(k, v, lr, damped, *both_gates(tokens, maker.settings, at))
    step(weights, v[:, :, :0], chunk, maker.settings)
    return weights_after(weights, chunk)


__all__ = ["SOURCES", "Made", "ProjectionMemories", "Readout", "project"]
