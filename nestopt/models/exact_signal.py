r"""A model's own next-token loss as the teach signal of its continua, backpropagated (NL eq. 71).

A *segment* is what a sequence reads from one moment at which any of its continua may write to the next; its weights are
the same all along. Each continuum is taught $\partial L/\partial y$, with y its output and L the loss of the segment's
positions, through all blocks and mixers that come after, at the weights and from the mixers' states that the segment
was read with. What was read before it is a constant, so that one backward pass of a segment is all there is to do.

A position's loss is known when the next token comes: a segment is learned from before the token after it is read.
Where it began in a call and ends in another, the state has its tokens and the mixers' states at its start, and it is
read once more: pieces of any length teach what the whole does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nestopt.core.device import by_contract, numbers_in, remember, upload
from nestopt.core.token_state import cat, index
from nestopt.core.tree import State, tree_map
from nestopt.levels.continuum.clock import TokenCounts, between_writes
from nestopt.levels.continuum.scan import LevelGradient
from nestopt.models import next_token
from nestopt.models.loss_signal import TAUGHT, Continuum
from nestopt.nn.rows import Rows


class Passed(NamedTuple):
    """What reading some tokens gave.

    Attributes:
        hidden: the residual stream after the last block, `[B, n, dim]`.
        inputs, outputs: of each continuum that is taught, `[B, n, dim]` each.
        state: of the model after them, nothing of its continua written.
    """

    hidden: Tensor
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    state: State


class Bounded(Continuum, Protocol):
    """A continuum whose gradient can be looked at before it is learned from."""

    def gradient(
        self, x: Tensor, delta: Tensor | None, state: State, live: Tensor | None, seen: TokenCounts
    ) -> tuple[LevelGradient, Tensor]:
        r"""Return PG, what the learner is to be shown of tokens that were read with the weights in `state`.

        And $\mathrm{rate}\,\langle G, P G\rangle$ of each sequence, `[B]`.
        """
        ...

    def learn(self, gradient: LevelGradient, state: State, seen: TokenCounts) -> State:
        """Learn from that; write where the period is over."""
        ...


def nothing_open(width: int, batch: int, mixers: State, device: torch.device) -> State:
    """Return what the state has of a segment that is not over, before the first token.

    `"tokens"` `[batch, width]`, the first `"count"` `[batch]` of which are read, and the mixers' states at its
    `"start"`.
    """
    count = remember(torch.zeros(batch, dtype=torch.int64, device=device), [0])
    tokens = torch.zeros(batch, width, dtype=torch.int64, device=device)
    return {"tokens": tokens, "count": count, "start": mixers}


@dataclasses.dataclass(frozen=True)
class ExactSignal:
    r"""How a model reads from write to write, its continua taught by its loss.

    With a `bound` κ, what a sequence's learners are shown of a segment, $P_\ell G_\ell$ of its gradients $G_\ell$ (P is
    the identity, or the damping of `nestopt.models.trained_mlp`), is multiplied by

    $$s = \min\Big(1,\ \frac{\kappa\,L}{\sum_\ell \mathrm{rate}_\ell\,\langle G_\ell, P_\ell G_\ell\rangle}\Big)$$

    so that what a step of plain gradient descent is foreseen to take off the segment's loss L is κL at most. That is
    Polyak's step, never longer than the rate says. Where the loss is convex in the weights W, as in the linearised
    model, and some $W_*$ have no loss on the segment, no rate makes a write lead away from them for κ of 2 or less: in
    the norm of $P^{-1}$, with $\eta = s\cdot\mathrm{rate}$ and so $\eta\,\langle G, P G\rangle \le \kappa L$,

    $$\lVert W - \eta P G - W_*\rVert^2 = \lVert W - W_*\rVert^2 - 2\eta\,\langle G, W - W_*\rangle
      + \eta^2\langle G, P G\rangle \le \lVert W - W_*\rVert^2 - (2 - \kappa)\,\eta L,$$

    since $\langle G, W - W_*\rangle \ge L$. A level whose period is k segments takes k such steps at once, and that
    holds of it for κ of 2/k or less.

    Attributes:
        continua: those that are taught, by block.
        key: of a continuum's state in that of its block.
        read: reads tokens `[B, n]`, none of which crosses a write, from a state, with a mask; the outputs of continua
            require a gradient if the last argument says so.
        head: logits of the residual stream.
        mixers: of a state, that of what mixes tokens.
        begin_at: puts mixers' states in the place of a state's own.
        lift: of numbers of tokens, what else `read` takes for tokens: these with their embeddings before them.
        second_order: whether an outer gradient passes the signal.
        bound: κ; None for none. Continua are `Bounded` then.
        closes: whether a segment is over where the call ends: then nothing of it is carried on, and the last position
            of a row, whose next token is not known, teaches nothing.
    """

    continua: Mapping[str, Continuum]
    key: str
    read: Callable[[Tensor, State, Tensor | None, bool], Passed]
    head: Callable[[Tensor], Tensor]
    mixers: Callable[[State], State]
    begin_at: Callable[[State, State], State]
    second_order: bool
    lift: Callable[[Tensor], Tensor] | None = None
    bound: float | None = None
    closes: bool = False

    @property
    def width(self) -> int:
        """Tokens of the longest segment."""
        return min(one.until_write([0]) for one in self.continua.values())

    def run(self, tokens: Tensor, state: State, mask: Tensor | None, ahead: int = 0) -> tuple[Tensor, State]:
        """Read tokens `[B, T]`, with padding at the end of rows only: the stream `[B, T, dim]`, and the state.

        Rows that are at other places of their segments than others are read after these, each group by itself: no
        sequence's gradient is cut where another's segment ends.
        """
        outer = torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(outer):  # autograd can save no tensor of inference
            tokens, state = _normal(tokens), tree_map(_normal, state)
            tokens = tokens.long() if tokens.ndim == 2 else tokens
            mask = None if mask is None else _normal(mask)
            batch, length = tokens.shape[:2]
            counts = [length] * batch if mask is None else _each(mask.sum(1), batch)
            steps = _each(state[next(iter(self.continua))][self.key]["step"], batch)
            groups: dict[tuple[int, int], list[int]] = {}
            for row, place in enumerate(zip(steps, _each(state[TAUGHT]["count"], batch), strict=True)):
                groups.setdefault(place, []).append(row)
            if len(groups) == 1:
                return self._together(tokens, state, mask, counts, *next(iter(groups)), ahead)
            found, states = [], []
            for (step, held), rows in groups.items():
                own = None if mask is None else mask[rows]
                given = tokens[rows], index(state, rows), own, [counts[row] for row in rows]
                x, new = self._together(*given, step, held, ahead)
                found.append(x)
                states.append((rows, new))
            order = upload(torch.tensor(_order(states)), tokens.device)
            return torch.cat(found)[order], _joined(states)

    def _together(
        self, tokens: Tensor, state: State, mask: Tensor | None, counts: list[int], step: int, held: int, ahead: int
    ) -> tuple[Tensor, State]:
        """Read rows that have all learned from `step` tokens, and have read `held` of a segment that is not over."""
        carried, state = state[TAUGHT], {name: part for name, part in state.items() if name != TAUGHT}
        numbers, length = next_token.numbers_of(tokens), tokens.shape[1]
        until = min(one.until_write([step]) for one in self.continua.values())
        start = carried["start"] if held else self.mixers(state)
        if not self.closes and held + max(counts) <= until:  # nothing is over
            passed = self.read(tokens, state, mask, False)
            return passed.hidden, {**passed.state, TAUGHT: self._longer(carried, numbers, mask, counts, held, start)}
        found: list[Tensor] = []
        ends = _Ends(self.width, len(tokens))
        after = torch.cat([numbers[:, 1:], numbers[:, :1]], dim=1)
        first = until - held if held and not self.closes else 0
        if first:
            passed = self.read(tokens[:, :first], state, None if mask is None else mask[:, :first], False)
            found.append(passed.hidden)
            state = passed.state
        if held:
            before = carried["tokens"][:, :held]
            segment = torch.cat([before, numbers[:, :first]], dim=1)
            lift = None if tokens.ndim == 2 else self.lift
            again = segment if lift is None else torch.cat([lift(before), tokens[:, :first]], dim=1)
            live = None if mask is None else F.pad(mask[:, :first], (held, 0), value=True)
            passed = self._read(again, self.begin_at(state, start), live, True)
            targets = torch.cat([segment[:, 1:], numbers[:, first : first + 1]], dim=1)
            if self.closes:
                told = torch.ones_like(segment, dtype=torch.bool).index_fill(
                    1, upload([held - 1], segment.device), False
                )
                state = self._taught(passed, state, targets, told, None, [step], length)
            else:
                ends.add(
                    [row for row, n in enumerate(counts) if n <= first], segment, [held + n for n in counts], start
                )
                learn = self._rows([n > first for n in counts], segment)
                state = self._taught(passed, state, targets, learn, learn, [step], length - 1 - first + ahead)
            step += held + first
        elif not self.closes:
            ends.add([row for row, n in enumerate(counts) if n == 0], numbers[:, :0], counts, start)
        for part, phases in between_writes(length - first, [step], self.continua.values()):
            a, b = part.start + first, part.stop + first
            own, masked = numbers[:, a:b], None if mask is None else mask[:, a:b]
            if not self.closes:
                rest = [n - a for n in counts]
                ends.add([row for row, n in enumerate(rest) if 0 < n <= b - a], own, rest, self.mixers(state))
            learns = self.closes or max(counts) > b
            passed = self._read(tokens[:, a:b], state, masked, learns)
            found.append(passed.hidden if torch.is_grad_enabled() else passed.hidden.detach())
            state = passed.state
            if learns:
                known = (
                    self._known(mask, own, a, b, length) if self.closes else self._rows([n > b for n in counts], own)
                )
                live = masked if self.closes else known
                state = self._taught(passed, state, after[:, a:b], known, live, phases, length - 1 - b + ahead)
        if self.closes:
            nothing = nothing_open(self.width, len(tokens), {}, tokens.device)
            return torch.cat(found, dim=1), {**state, TAUGHT: nothing}
        return torch.cat(found, dim=1), {**state, TAUGHT: ends.joined()}

    def _longer(
        self, carried: State, tokens: Tensor, mask: Tensor | None, counts: list[int], held: int, start: State
    ) -> State:
        """Return what is carried of a segment that goes on."""
        both = torch.cat([carried["tokens"][:, :held], tokens], dim=1)
        if mask is not None:
            both = Rows.of(F.pad(mask, (held, 0), value=True)).moved(both[..., None])[..., 0]
        ends = _Ends(self.width, len(tokens))
        ends.add(range(len(tokens)), both, [held + n for n in counts], start)
        return ends.joined()

    def _read(self, tokens: Tensor, state: State, mask: Tensor | None, learns: bool) -> Passed:
        """Read some tokens; to learn from them, with a graph, which is let go of unless the caller wants one."""
        if not learns:
            return self.read(tokens, state, mask, False)
        create = torch.is_grad_enabled() and self.second_order
        # torch's fast attention can be differentiated once
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if create else nullcontext():
            passed = self.read(tokens, state, mask, True)
        return passed if torch.is_grad_enabled() else passed._replace(state=tree_map(_cut, passed.state))

    def _taught(
        self,
        passed: Passed,
        state: State,
        targets: Tensor,
        known: Tensor | None,
        live: Tensor | None,
        phases: Sequence[int],
        ahead: int,
    ) -> State:
        """Return `state` with each continuum taught, written where a period is over.

        Args:
            passed: what was read.
            state: of the continua it was read with.
            targets: `[B, n]`, the next tokens.
            known: `[B, n]`, where there are any; None is everywhere.
            live: `[B, n]`, the tokens that clocks count; None is all.
            phases, ahead: as of `Continuum.observe`.
        """
        outer = torch.is_grad_enabled()
        with torch.enable_grad():
            logits = self.head(passed.hidden)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(logits.mT, targets, reduction="none")
            loss = (losses if known is None else torch.where(known, losses, 0)).sum(1)
            total = loss.sum()
        create = outer and self.second_order
        deltas = torch.autograd.grad(total, passed.outputs, retain_graph=outer, create_graph=create)
        own = {name: state[name][self.key] for name in self.continua}
        given = zip(self.continua, passed.inputs, deltas, strict=True)
        if self.bound is None:
            new = {
                name: self.continua[name].observe(x, error, own[name], live, phases=phases, ahead=ahead)
                for name, x, error in given
            }
        else:
            layers = cast(Mapping[str, Bounded], self.continua)
            seen = TokenCounts(targets.shape[1], None if live is None else live.sum(1), phases, ahead)
            found = {name: layers[name].gradient(x, error, own[name], live, seen) for name, x, error in given}
            foreseen = torch.stack([taken for _, taken in found.values()]).sum(0)
            share = _share(self.bound, loss.detach(), foreseen)
            new = {name: layers[name].learn(_scaled(g, share), own[name], seen) for name, (g, _) in found.items()}
        return {**state, **{name: {**state[name], self.key: part} for name, part in new.items()}}

    def _rows(self, chosen: list[bool], tokens: Tensor) -> Tensor | None:
        """Return `[B, n]`, True in the chosen rows; None if these are all."""
        if all(chosen):
            return None
        return upload(torch.tensor(chosen), tokens.device)[:, None].expand(tokens.shape)

    def _known(self, mask: Tensor | None, own: Tensor, a: int, b: int, length: int) -> Tensor | None:
        """Return of which of the places from a to b the next token is in this call, `[B, n]`; None: of all."""
        if mask is None and b < length:
            return None
        after = torch.ones_like(own, dtype=torch.bool) if mask is None else F.pad(mask, (0, 1))[:, a + 1 : b + 1]
        return torch.cat([after[:, :-1], torch.zeros_like(after[:, :1])], dim=1) if b == length else after


class _Ends:
    """What rows that have ended leave of the segment that they are in."""

    def __init__(self, width: int, batch: int) -> None:
        self.width, self.batch = width, batch
        self.parts: list[tuple[list[int], State]] = []

    def add(self, rows: Sequence[int], tokens: Tensor, counts: Sequence[int], start: State) -> None:
        """Note that these rows end in the segment `tokens` `[B, n]`, after so many of its tokens."""
        if not rows:
            return
        own = [counts[row] for row in rows]
        padded = F.pad(tokens[:, : self.width], (0, max(0, self.width - tokens.shape[1])))
        found: State = {"tokens": padded, "start": start}
        if len(rows) < self.batch:
            found = index(found, rows)
        count = remember(upload(torch.tensor(own), tokens.device), own)
        self.parts.append((list(rows), {**found, "count": count}))

    def joined(self) -> State:
        """Return that of all rows."""
        return _joined(self.parts)


def _joined(parts: list[tuple[list[int], State]]) -> State:
    """Return states of some rows each as those of all, in order."""
    if len(parts) == 1:
        return parts[0][1]
    return index(cat([state for _, state in parts]), _order(parts))


def _order(parts: list[tuple[list[int], State]]) -> list[int]:
    rows = [row for own, _ in parts for row in own]
    return sorted(range(len(rows)), key=rows.__getitem__)


def _each(numbers: Tensor, batch: int) -> list[int]:
    """Return `[B]` whole numbers; waits where only a device knows them, and they are not one and the same."""
    several = numbers_in(numbers)
    if len(several) == 1:
        return several * batch
    with by_contract("places") if numbers.device.type != "cpu" else nullcontext():
        return [int(n) for n in numbers.tolist()]


def _share(bound: float, loss: Tensor, foreseen: Tensor) -> Tensor:
    """Return s of each sequence, `[B]`, of its loss and what a step is foreseen to take off it."""
    return (bound * loss / foreseen.clamp_min(torch.finfo(loss.dtype).tiny)).clamp_max(1.0)


def _scaled(gradient: LevelGradient, share: Tensor) -> LevelGradient:
    by = {name: g * share.to(g).reshape(-1, *(1,) * (g.ndim - 1)) for name, g in gradient.gradient.items()}
    return dataclasses.replace(gradient, gradient=by)


def _normal(x: Tensor) -> Tensor:
    return x.clone() if x.is_inference() else x


def _cut(x: Tensor) -> Tensor:
    return x.detach() if x.requires_grad else x  # as it is, what the host knows of it stays known
