"""The reference machine on tokens: any level, a plain loop over time, one memory per sequence and head.

Slow and right: it is what every form is tested against, and what runs where there is none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.associative import AssociativeMemory
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.pending import COUNT, PENDING, of_shape
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Accepted, Refused, TokenForm
from nestopt.core.token_state import cat, index, numbers
from nestopt.core.tree import State, leaves, nested, tree_map


class ReferenceForm(TokenForm):
    """Run any level token by token, or, where it has a `chunk_size` of more, a chunk of tokens after the other."""

    levels: ClassVar[tuple[type[Level], ...]] = (Level,)
    priority: ClassVar[int] = -100
    reference: ClassVar[bool] = True
    piece = 0

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        return Accepted(f"the reference machine, {'a chunk' if level.chunk_size > 1 else 'a token'} at a time")

    @property
    def takes_padding(self) -> bool:
        return not self.level.appends

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        gates = self.every_gate(tokens, gates)
        if self.level.owns_partial_chunk:
            apart = tokens.mask is not None or any(path.endswith(f"{PENDING}.{COUNT}") for path, _ in leaves(state))
            return (self._by_place if apart else self._whole)(tokens, gates, state)
        return self._chunks(tokens, gates, state) if self.level.chunk_size > 1 else self._each(tokens, gates, state)

    def _each(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        def token(q: Tensor, k: Tensor, v: Tensor, now: State, before: State, step: Tensor) -> tuple[Tensor, State]:
            return bind(self.level, now).token_step(q, k, v, before, Signal(step=step))

        def read(q: Tensor, v: Tensor, now: State, before: State, step: Tensor) -> Tensor:
            level = bind(self.level, now)
            if isinstance(level, AssociativeMemory):
                return level._answer(before["memory"], level.features(q))
            return level.token_read(q, len(v), before, Signal(step=step))

        batched = vmap(vmap(token))
        step, memory, ys = state["step"], state["level"], []
        for t in range(tokens.k.shape[2]):
            active = tokens.active[:, :, t]
            step = step + active
            now = {path: gate[:, :, t] for path, gate in gates.items()}
            q, k, v = (x[:, :, t] for x in (tokens.q, tokens.k, tokens.v))
            y, new = batched(q, k, v, now, memory, step.clamp_min(1))
            if tokens.reads:
                y = torch.where(active[..., None], y, vmap(vmap(read))(q, v, now, memory, step.clamp_min(1)))
            memory = _where(active, new, memory)
            ys.append(y)
        return torch.stack(ys, dim=2), {"step": step, "level": memory}

    def _chunks(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        pending, span = state[PENDING], self.level.chunk_size
        done, length = pending["k"].shape[2], tokens.k.shape[2]
        fresh = {"k": tokens.k, "v": tokens.v, "live": tokens.active, "gates": nested(gates)}
        held = tree_map(lambda old, new: torch.cat([old, new.to(old)], dim=2), pending, fresh)
        # tokens that were answered before ask nothing
        queries = torch.nn.functional.pad(tokens.q, (0, 0, done, 0))

        def chunk(q: Tensor, held: State, before: State, step: Tensor) -> tuple[Tensor, State]:
            gates = dict(leaves(held["gates"]))
            return self.level.chunk_step(q, held["k"], held["v"], gates, held["live"], before, Signal(step=step))

        batched = vmap(vmap(chunk))
        memory, ys, rest = state["level"], [], tree_map(lambda x: x[:, :, :0], held)
        step = state["step"] - pending["live"].sum(2)
        for first in range(0, done + length, span):
            part = slice(first, min(first + span, done + length))
            now = tree_map(lambda x: x[:, :, part], held)  # noqa: B023
            y, new = batched(queries[:, :, part], now, memory, step)
            ys.append(y)
            if part.stop - first == span:
                memory, step = new, step + now["live"].sum(2)
            else:
                rest = now
        total = state["step"] + tokens.count
        return torch.cat(ys, dim=2)[:, :, done:], {"step": total, "level": memory, PENDING: rest}

    def _by_place(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        """Run a level that keeps the tokens of its chunks itself: rows that are at one place of these after others.

        Which these are is asked of the device, which no form does that is fast.
        """
        mask = torch.ones_like(tokens.active[:, 0]) if tokens.mask is None else tokens.mask
        counts = [mask.sum(1), *(count for path, count in leaves(state) if path.endswith(f"{PENDING}.{COUNT}"))]
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, place in enumerate(torch.stack(counts, dim=1).tolist()):
            groups.setdefault(tuple(place), []).append(row)
        y, states = torch.zeros_like(tokens.v), []
        for (length, *_), rows in groups.items():
            now, chosen = index(state, rows), numbers(rows, len(mask), mask.device, "run")
            if length:
                at = mask[chosen].nonzero()[:, 1].view(len(rows), length)

                def own(x: Tensor, chosen: Tensor = chosen, at: Tensor = at) -> Tensor:
                    return x[chosen].gather(2, of_shape(at, x[chosen]))

                q, k, v, active = (own(x) for x in (tokens.q, tokens.k, tokens.v, tokens.active))
                part = dataclasses.replace(tokens, q=q, k=k, v=v, active=active, finite=active, mask=None)
                found, now = self._whole(part, {path: own(gate) for path, gate in gates.items()}, now)
                y = y.index_copy(0, chosen, torch.zeros_like(y[chosen]).scatter(2, of_shape(at, found), found))
            states.append(now)
        order = torch.tensor([row for rows in groups.values() for row in rows]).argsort()
        return y, index(cat(states), order)

    def _whole(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        """Run all tokens at once, of a level that keeps those of its chunks itself."""

        def chunk(
            q: Tensor, k: Tensor, v: Tensor, gates: State, live: Tensor, before: State, step: Tensor
        ) -> tuple[Tensor, State]:
            return self.level.chunk_step(q, k, v, gates, live, before, Signal(step=step))

        y, new = vmap(vmap(chunk))(
            tokens.q, tokens.k, tokens.v, dict(gates), tokens.active, state["level"], state["step"]
        )
        return y, {"step": state["step"] + tokens.count, "level": new}


def _where(live: Tensor, new: State, old: State) -> State:
    """`new` where `live` `[B, H]`, else `old`; a memory that has grown is taken as it is, whatever it took in."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        if new.shape != old.shape:
            return new
        return torch.where(live.reshape(*live.shape, *(1,) * (new.ndim - 2)), new, old)

    return tree_map(choose, new, old)
