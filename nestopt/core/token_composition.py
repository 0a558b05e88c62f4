"""Compositions on tokens: forms made of forms. Each part runs by its own, and they are combined."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.compose import Chain, Parallel
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.nesting import Nest
from nestopt.core.part import FieldError
from nestopt.core.pending import PENDING, RowChunks
from nestopt.core.signal import Signal
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_choice import make_form
from nestopt.core.token_form import Accepted, FormSetting, Refused, TokenForm
from nestopt.core.tree import State, leaves, nested, replaced, tree_map

Run = Callable[[TokenBatch, Mapping[str, Tensor], State], tuple[Tensor, State]]
"""`forward` or `step` of a form."""


class _Composition(TokenForm):
    """A form made of forms, whose states are in its own by the name of the part: `"level"` → name → state."""

    reference: ClassVar[bool] = True

    def __init__(self, level: Level, setting: FormSetting) -> None:
        super().__init__(level, setting)
        self.parts = {path: make_form(part, setting) for path, part in self.parts_of(level)}
        pieces = [form.piece for form in self.parts.values()]
        self.piece = math.lcm(*pieces) if all(pieces) else 0
        self.chunk = math.lcm(*(form.chunk for form in self.parts.values()))

    @staticmethod
    def parts_of(level: Level) -> Iterator[tuple[str, Level]]:
        """Return the levels within, by dotted path."""
        return ((path, part) for path, part in level.parts() if isinstance(part, Level))

    @property
    def takes_padding(self) -> bool:
        return all(form.takes_padding for form in self.parts.values())

    def pending(self, state: State) -> int:
        return max(form.pending(state["level"][name]) for name, form in self._named())

    def init(
        self, batch: int, heads: int, dim_k: int, dim_v: int, like: Tensor, learned: Mapping[str, Tensor]
    ) -> State:
        step = torch.zeros(batch, heads, dtype=torch.int64, device=like.device)
        level: State = {
            name: form.init(batch, heads, dim_k, dim_v, like, within(learned, name)) for name, form in self._named()
        }
        return {"step": step, "level": level}

    @property
    def has_constants(self) -> bool:
        return any(form.has_constants for form in self.parts.values())

    def with_learned(self, state: State, learned: Mapping[str, Tensor]) -> State:
        new = {
            name: form.with_learned(state["level"][name], within(learned, name))
            for name, form in self._named()
            if form.has_constants
        }
        return {**state, "level": {**state["level"], **new}}

    def explain(self, indent: str = "") -> list[str]:
        parts = (line for form in self.parts.values() for line in form.explain(indent + "  "))
        return [*super().explain(indent), *parts]

    def _named(self) -> Iterator[tuple[str, TokenForm]]:
        """Return the parts' forms by the last word of their path."""
        return ((path.split(".")[-1], form) for path, form in self.parts.items())


def within(flat: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return those of a part, of tensors by dotted path."""
    return {name.removeprefix(f"{path}."): x for name, x in flat.items() if name.startswith(f"{path}.")}


def _clock(level: Level) -> str:
    return f"period={level.period}: it is shown sums of gradients"


class _OfSeveral(_Composition):
    """A form that shows tokens to each of its parts, and combines what they answer."""

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        return self._through([form.run for form in self.parts.values()], tokens, gates, state)

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        return self._through([partial(form.run, step=True) for form in self.parts.values()], tokens, gates, state)

    @abstractmethod
    def _through(
        self, runs: list[Run], tokens: TokenBatch, gates: Mapping[str, Tensor], state: State
    ) -> tuple[Tensor, State]:
        """Show the tokens to the parts, each of which has its `forward` or `step` in `runs`."""


class ParallelForm(_OfSeveral):
    """Show every part the same tokens, and add their answers up, each times its weight."""

    levels: ClassVar[tuple[type[Level], ...]] = (Parallel,)

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        if level.period > 1:
            return Refused(_clock(level))
        return Accepted("each part by its own form, and their answers added up")

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        def reading(form: TokenForm) -> Run:
            return lambda tokens, gates, state: (form.read(tokens, gates, state), state)

        return self._through([reading(form) for form in self.parts.values()], tokens, gates, state)[0]

    def _through(
        self, runs: list[Run], tokens: TokenBatch, gates: Mapping[str, Tensor], state: State
    ) -> tuple[Tensor, State]:
        assert isinstance(self.level, Parallel)
        weights = self.level.weights or [1.0] * len(runs)
        total, new = None, {}
        for run, weight, path in zip(runs, weights, self.parts, strict=True):
            name = path.split(".")[-1]
            y, new[name] = run(tokens, within(gates, path), state["level"][name])
            y = y if weight == 1.0 else weight * y
            total = y if total is None else total + y
        assert total is not None  # there is one part at least
        return total, {"step": state["step"] + tokens.count, "level": new}


class ChainForm(_OfSeveral):
    """Show each part, as the value of a key, what the one before it answers at that key; the last is asked."""

    levels: ClassVar[tuple[type[Level], ...]] = (Chain,)

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        if level.period > 1:
            return Refused(_clock(level))
        if not level.of_tokens:
            return Refused("its levels are all of gradients: they make one direction, which is asked")
        return Accepted("each part by its own form, on what the one before it answers")

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        path, last = list(self.parts.items())[-1]
        return last.read(tokens, within(gates, path), state["level"][path.split(".")[-1]])

    def _through(
        self, runs: list[Run], tokens: TokenBatch, gates: Mapping[str, Tensor], state: State
    ) -> tuple[Tensor, State]:
        new, shown = {}, tokens
        for i, (run, path) in enumerate(zip(runs, self.parts, strict=True)):
            name, is_last = path.split(".")[-1], i == len(runs) - 1
            asked = shown.replace(q=tokens.q if is_last else tokens.k)
            y, new[name] = run(asked, within(gates, path), state["level"][name])
            shown = shown if is_last else shown.replace(v=y)
        return y, {"step": state["step"] + tokens.count, "level": new}


class NestForm(_Composition):
    """Run the inner level by its form, a context of tokens after the other; between them the outer level learns.

    A context is `outer.period` tokens of a sequence. State: `"inner"` is that of the inner form, `"start"` where each
    of its tensors begins a context, `"outer"` what the outer level remembers of these, `"writes"` `[B, H]` how often it
    has learned, and `"pending"` which tokens of a context that is not over were written.
    """

    levels: ClassVar[tuple[type[Level], ...]] = (Nest,)

    def __init__(self, level: Level, setting: FormSetting) -> None:
        super().__init__(level, setting)
        assert isinstance(level, Nest)
        self.inner, self.chunk, self.piece = self.parts["inner"], level.outer.period, 0
        if self.chunk % self.inner.chunk:
            problem = f"is not allowed on tokens: its period must be a multiple of the inner level's {self.inner.chunk}"
            raise FieldError(level.label, "outer", level.outer, f"{problem} tokens of a chunk")

    @staticmethod
    def parts_of(level: Level) -> Iterator[tuple[str, Level]]:
        assert isinstance(level, Nest)
        return iter([("inner", level.inner)])

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, Nest)
        if level.of_weights:
            return Refused("weights are an optimizer's")
        if level.period > 1:
            return Refused(_clock(level))
        return Accepted(f"the inner level by its own form, in contexts of {level.outer.period} tokens")

    def pending(self, state: State) -> int:
        return state[PENDING]["live"].shape[2]

    def init(
        self, batch: int, heads: int, dim_k: int, dim_v: int, like: Tensor, learned: Mapping[str, Tensor]
    ) -> State:
        state = super().init(batch, heads, dim_k, dim_v, like, learned)
        begins = {path: leaf for path, leaf in leaves(state["level"]["inner"]["level"]) if self._learns(path, leaf)}
        outer = bind(self.level.outer)  # type: ignore[attr-defined]
        starts = vmap(vmap(outer.init, randomness="different"), randomness="different")
        level = {
            "inner": state["level"]["inner"],
            "start": nested(begins),
            "outer": nested({path: starts(leaf) for path, leaf in begins.items()}),
            "writes": torch.zeros_like(state["step"]),
        }
        live = torch.zeros(batch, heads, 0, dtype=torch.bool, device=like.device)
        return {"step": state["step"], "level": level, PENDING: {"live": live}}

    def _learns(self, path: str, leaf: Tensor) -> bool:
        """Return whether the outer level learns where this tensor of the inner level's state starts."""
        keys = path.split(".")
        return leaf.is_floating_point() and PENDING not in keys and keys[0] not in self.inner.level.constant_keys

    def run(
        self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State, *, step: bool = False
    ) -> tuple[Tensor, State]:
        rows = RowChunks.of(state[PENDING], tokens.mask, tokens.k, self.chunk)
        if rows is None:
            return self.forward(tokens, gates, state)
        live = rows.joined(state[PENDING], {"live": tokens.active})["live"]
        # the inner level has seen those that are pending
        shown = rows.taken & ~rows.was_pending
        now = {"q": tokens.q, "k": tokens.k, "v": tokens.v, "live": tokens.active}
        held = rows.joined(None, {**now, "gates": self.every_gate(tokens, gates)})
        q, k, v, active = (held[name] for name in now)
        every = dataclasses.replace(tokens, q=q, k=k, v=v, active=active, finite=active, mask=shown)
        y, new = self._contexts(every, held["gates"], state, live)
        return rows.back(y), {**new, PENDING: rows.kept(new[PENDING])}

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        return self._contexts(tokens, gates, state, torch.cat([state[PENDING]["live"], tokens.active], dim=2))

    def _contexts(
        self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State, live: Tensor
    ) -> tuple[Tensor, State]:
        """Run the tokens, which are the last of those that `live` `[B, H, n]` says it of, from a context's start on."""
        level, ys, first, length = state["level"], [], 0, tokens.k.shape[2]
        begun = live.shape[2] - length
        left = self.chunk - begun
        lengths = [min(left, length), *[self.chunk] * ((length - left) // self.chunk)]
        lengths += [length - sum(lengths)] if length > sum(lengths) else []
        for piece in tokens.split(lengths):
            part = slice(first, first + piece.k.shape[2])
            here = {path: gate[:, :, part] for path, gate in gates.items()}
            y, inner = self.inner.run(piece, within(here, "inner"), level["inner"])
            ys.append(y)
            level, first = {**level, "inner": inner}, part.stop
            if (end := begun + first) % self.chunk == 0:
                last = {path: gate[:, :, -1] for path, gate in within(here, "outer").items()}
                level = self._learned(level, live[:, :, end - self.chunk : end].any(2), last)
        y = ys[0] if len(ys) == 1 else torch.cat(ys, dim=2)
        rest = live[:, :, live.shape[2] - live.shape[2] % self.chunk :]
        return y, {"step": state["step"] + tokens.count, "level": level, PENDING: {"live": rest}}

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        return self.inner.read(tokens, within(gates, "inner"), state["level"]["inner"])

    def _learned(self, level: State, wrote: Tensor, gates: State) -> State:
        """The state after a context, in which the sequences and heads of `wrote` `[B, H]` have learned something."""
        arrived, begins, goes_on, outer = dict(leaves(level["inner"]["level"])), {}, {}, {}
        writes = level["writes"] + wrote

        def step(path: str, at: Tensor, end: Tensor, state: State, now: State, step: Tensor) -> tuple[Tensor, State]:
            learner = bind(self.level.outer, now)  # type: ignore[attr-defined]
            move, new = learner.step(at - end, state, Signal(step=step).on(at))
            return self.level.next_start(path, at, end, move), new  # type: ignore[attr-defined]

        def chosen(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(wrote.reshape(*wrote.shape, *(1,) * (new.ndim - 2)), new, old)

        for path, at in leaves(level["start"]):
            before = level["outer"]
            for key in path.split("."):
                before = before[key]
            new, after = vmap(vmap(partial(step, path)))(at, arrived[path], before, gates, writes.clamp_min(1))
            begins[path], goes_on[path] = chosen(new, at), chosen(new, arrived[path])
            outer[path] = tree_map(chosen, after, before)
        inner = {**level["inner"], "level": replaced(level["inner"]["level"], goes_on)}
        return {"inner": inner, "start": nested(begins), "outer": nested(outer), "writes": writes}
