"""The clocks of a continuum on tokens: when each level writes what it was taught, sequence by sequence (NL eq. 71-72).

A level sums the gradients of its tokens and writes when its period is over; what it writes is seen from the next token
on. Sequences of a batch may be at different places of their periods: a write changes the rows that are due.

Which levels can be due is decided on the host, by the numbers of tokens that the rows have seen (`phases`), so that
nothing waits for a device and nothing is computed in vain; which rows are due, by tensors.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, Protocol, cast

import torch
from torch import Tensor

from nestopt.core.clock import due
from nestopt.core.device import remember
from nestopt.core.memories import Theta
from nestopt.core.tree import State, tree_map
from nestopt.levels.continuum.level import Auto, ticks_of
from nestopt.levels.continuum.scan import LevelGradient, Surprised
from nestopt.levels.continuum.write import LearnerStep

Phases = Sequence[int]
"""Tokens that the rows of a batch have seen: one number per row, or the different ones among them."""


class Writes(Protocol):
    """What writes at moments of its clocks: a continuum."""

    def until_write(self, phases: Phases) -> int:
        """Return how many tokens there are up to and with the next moment, in rows that are at `phases`."""
        ...


def between_writes(length: int, phases: Phases, continua: Iterable[Writes]) -> Iterator[tuple[slice, Phases]]:
    """Cut `length` tokens where any of the continua may write: each part, and the phases before it."""
    first, several = 0, list(continua)
    while first < length:
        last = min(first + min(one.until_write(phases) for one in several), length)
        yield slice(first, last), phases
        phases, first = [phase + last - first for phase in phases], last


@dataclasses.dataclass(frozen=True)
class TokenCounts:
    """Some tokens that a continuum was taught, none of which crosses a moment of its clocks.

    Attributes:
        size: how many.
        count: how many of them each row has, `[B]`: all, unless the row is over. None: all in every row.
        phases: what the rows had seen before.
        ahead: tokens still to be learned from before the last of this call is read, for `through="truncated"`.
    """

    size: int
    count: Tensor | None
    phases: Phases
    ahead: int = 0

    def may_write(self, period: int | Auto) -> bool:
        """Return whether a level with this period has a moment at the end of these tokens, in any row."""
        return self.size > 0 and any(due(phase + self.size, ticks_of(period)) for phase in self.phases)

    def all_write(self, period: int | Auto) -> bool:
        """Return whether it is known that a level with this period writes at the end of these tokens, in every row."""
        if isinstance(period, Auto) or self.count is not None:
            return False
        return all(due(phase + self.size, period) for phase in self.phases)


@dataclasses.dataclass(frozen=True)
class Clocks:
    """How the levels of a continuum are written; all methods are functions of a state.

    Attributes:
        chain: the levels' periods by name, the fastest first.
        writer: one step of the learner.
        nested: whether each level also learns where the next faster one starts (NL eq. 72).
        through: how the outer gradient passes a write (`nestopt.levels.continuum.level`).
        last: writes of each level that a call reads, and that it passes whole, with `through="truncated"`.
        surprise: how many times the mean surprise so far a token must have to teach a level; 0: none.
    """

    chain: Mapping[str, int | Auto]
    writer: LearnerStep
    nested: bool = False
    through: Literal["full", "truncated", "first_order", "stop"] = "full"
    last: int = 1
    surprise: float = 0.0

    def begin(self, starts: Mapping[str, Theta], batch: int) -> State:
        """Return the state before the first token, of levels that start at the weights `starts`, by level and name.

        `"step"`, the tokens seen `[B]`; and for each of `"levels"` its `"weights"` `[B, ...]`, and of the period that
        is not over the `"sum"` of gradients and its `"energy"`; the `"learner"`'s own state, if it has one. An `Auto`
        has its `"surprise"` since the last write, its `"surprise_so_far"` and its `"writes"`, `[B]` each (the second
        is there with `surprise` too), and a nested level `"below"`: where the next faster one starts, likewise.
        """
        device = next(iter(next(iter(starts.values())).values())).device
        levels: State = {}
        faster = None
        for name, period in self.chain.items():
            levels[name] = self._begun(starts[name], batch)
            if isinstance(period, Auto) or self.surprise:
                levels[name]["surprise_so_far"] = torch.zeros_like(levels[name]["energy"])
            if isinstance(period, Auto):
                levels[name]["surprise"] = torch.zeros_like(levels[name]["energy"])
                levels[name]["writes"] = torch.zeros(batch, dtype=torch.int64, device=device)
            if self.nested and faster is not None:
                levels[name]["below"] = self._begun(starts[faster], batch)
            faster = name
        return {"step": remember(torch.zeros(batch, dtype=torch.int64, device=device), [0]), "levels": levels}

    def _begun(self, start: Theta, batch: int) -> State:
        one: Theta = {name: self._passed(weight)[None] for name, weight in start.items()}
        zeros = {name: torch.zeros_like(weight.detach()) for name, weight in one.items()}
        energy = next(iter(zeros.values())).new_zeros(1)
        found: State = {"weights": one, "sum": zeros, "energy": energy}
        if own := self.writer.begin({name: weight.detach() for name, weight in one.items()}):
            found["learner"] = own
        return tree_map(lambda leaf: leaf.expand(batch, *leaf.shape[1:]), found)

    def _passed(self, x: Tensor) -> Tensor:
        return x.detach() if self.through == "stop" else x

    def taught(self, state: State) -> list[Surprised] | None:
        """Return which of the tokens to come teach each level; None is all."""
        if not self.surprise:
            return None
        levels = state["levels"]
        return [Surprised(self.surprise, levels[name]["surprise_so_far"], state["step"]) for name in self.chain]

    def until(self, phases: Phases) -> int:
        """Return how many tokens there are up to and with the next moment at which any level of any row may write."""
        return min(ticks - phase % ticks for ticks in map(ticks_of, self.chain.values()) for phase in phases)

    def constant(self, seen: TokenCounts, period: int | Auto) -> bool:
        """Return whether the outer gradient takes the level's write after these tokens for a constant."""
        if self.through != "truncated":
            return self.through != "full"
        ticks, last = ticks_of(period), max(seen.ahead, 0)
        # the moments that follow the end of the period these tokens are in
        return all(
            (phase + seen.size + last) // ticks - -(-(phase + seen.size) // ticks) >= self.last for phase in seen.phases
        )

    def after(
        self,
        state: State,
        gradients: Mapping[str, LevelGradient],
        seen: TokenCounts,
        starts: Mapping[str, Theta],
        rates: Mapping[str, Tensor],
    ) -> State:
        """Return the state after `seen` tokens, which taught the levels these `gradients`.

        Args:
            state: before them.
            gradients: by level, of its weights in `state`.
            seen: the tokens.
            starts: the learned weights, where `keep` leads back to.
            rates: of each level, a number.
        """
        step = state["step"] + (seen.size if seen.count is None else seen.count)
        if seen.count is None:
            step = remember(step, [phase + seen.size for phase in seen.phases])
        levels, faster = {}, None
        for name, period in self.chain.items():
            own, gradient, constant = state["levels"][name], gradients[name], self.constant(seen, period)
            own = {**own, **_added(own, gradient, constant)}
            now = cast(Tensor, due(step, ticks_of(period)))
            if seen.count is not None:
                now = now & (seen.count > 0)
            if "surprise_so_far" in own:
                own["surprise_so_far"] = own["surprise_so_far"] + gradient.surprise
            if isinstance(period, Auto):
                own["surprise"] = own["surprise"] + gradient.surprise
                now = now & period.passed(own["surprise"], own["surprise_so_far"], step)
            if faster is not None and "below" in own:
                own["below"] = {**own["below"], **_added(own["below"], gradients[faster], constant)}
            if seen.may_write(period):
                count = own["writes"] + 1 if isinstance(period, Auto) else step // period
                how = {"rate": self._passed(rates[name]), "count": count, "constant": constant}
                written = self._written(own, starts[name], how)
                if isinstance(period, Auto):
                    written |= {"surprise": torch.zeros_like(own["surprise"]), "writes": own["writes"] + 1}
                if faster is not None and "below" in own:
                    written["below"] = self._written(own["below"], starts[faster], how)
                    back = self._put_back(levels[faster], written["below"])
                    levels[faster] = back if seen.all_write(period) else _chosen(now, back, levels[faster])
                own = {**own, **written} if seen.all_write(period) else _chosen(now, {**own, **written}, own)
            levels[name] = own
            faster = name
        return {"step": step, "levels": levels}

    def _written(self, own: State, start: Theta, how: dict[str, object]) -> State:
        """Return the parts of a level's state that a write changes."""
        home = {name: self._passed(weight)[None] for name, weight in start.items()}
        learner = own.get("learner", {})
        weights, learner = self.writer.write(
            own["weights"],
            own["sum"],
            own["energy"],
            learner,
            home=home,
            **how,  # type: ignore[arg-type]
        )
        zeros = tree_map(_zero, {"sum": own["sum"], "energy": own["energy"]})
        return {"weights": weights, **zeros, **({"learner": learner} if "learner" in own else {})}

    def _put_back(self, own: State, below: State) -> State:
        """Return the faster level where it now starts, with nothing summed."""
        fresh = tree_map(_zero, {key: own[key] for key in ("sum", "energy")})
        if "learner" in own:
            begun = self.writer.begin({name: weight[:1].detach() for name, weight in below["weights"].items()})
            fresh["learner"] = tree_map(lambda leaf: leaf.expand(len(own["energy"]), *leaf.shape[1:]), begun)
        return {**own, "weights": below["weights"], **fresh}


def _zero(x: Tensor) -> Tensor:
    """Zeros like x that take no memory."""
    return x.new_zeros(()).expand(x.shape)


def _added(own: State, gradient: LevelGradient, constant: bool) -> State:
    """Return the sums of a level with what it was taught."""
    total: State = {name: own["sum"][name] + g for name, g in gradient.gradient.items()}
    found = {"sum": total, "energy": own["energy"] + gradient.energy}
    return tree_map(Tensor.detach, found) if constant else found


def _chosen(rows: Tensor, new: State, old: State) -> State:
    """Return `new` in `rows` `[B]`, `old` in the others."""

    def choose(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return tree_map(choose, new, old)
