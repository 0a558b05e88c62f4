"""The continuum memory system as a module: MLP blocks on clocks, of the optimizer's steps or of tokens."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.core.device import no_autocast, numbers_in
from nestopt.core.memories import Memory, Theta
from nestopt.core.periodic import Periodic
from nestopt.core.precision import Precision, check_precision, check_products, products_in
from nestopt.core.token_batch import check_mask
from nestopt.core.token_state import fitted, shapes_of
from nestopt.core.tree import State
from nestopt.levels.continuum.clock import Clocks, Phases, TokenCounts, between_writes
from nestopt.levels.continuum.level import Auto, Cms
from nestopt.levels.continuum.scan import LevelGradient, Levels, answers, taught_by_loss, taught_locally
from nestopt.levels.continuum.write import LearnerStep
from nestopt.nn.rows import Rows

BESIDE = ("share", "rate", "target")
"""Parameters of a block beside its memory's weights."""


class Block(Periodic, nn.Module):
    r"""One memory of a CMS with its weights as parameters, $x \leftarrow x + M(\mathrm{rms\_norm}(x))$.

    Beside them, of independent levels, `share`; of one that learns in context, `rate`, as its logarithm; of one with a
    local objective, `target`.

    Attributes:
        period: optimizer steps between updates of its weights, on the sum of their gradients (NL eq. 71).
    """

    def __init__(self, memory: Memory, weights: Mapping[str, Tensor], period: int) -> None:
        super().__init__()
        self.memory, self.period = memory, period
        self.names = [name for name in weights if name != "share"]
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def weights(self) -> Theta:
        """Return the memory's own, by name."""
        return {name: getattr(self, name) for name in self.names}

    def forward(self, _: None = None) -> dict[str, Tensor]:
        """Return all parameters by name: a layer of peft in its place gives, by this call, those that it adapts."""
        return {name: getattr(self, name) for name in [*self.names, *BESIDE] if hasattr(self, name)}

    def extra_repr(self) -> str:
        return f"{self.memory}, period={self.period}"


class CMS(nn.Module):
    r"""A continuum memory system (NL eq. 70-74): memories in a chain, each on its own clock.

    The level says what it is (`nestopt.levels.continuum.level`). Its weights are parameters (`levels.every_16.W1`).

    * `learn="static"`: nothing changes them but the optimizer, which reads the `period` of each block. With
      `periods=(1,)` it is a Transformer's MLP with its norm and residual.
    * `learn="context"`: they are where each sequence starts, and every sequence learns as it is read. The optimizer
      learns the starts, and each level's rate. Periods are numbers of tokens, however these come: two calls on halves
      equal one on the whole.

    The state in context: `"step"`, the tokens each sequence has learned from `[B]`, and by level, in `"levels"`, what
    `nestopt.levels.continuum.clock.Clocks.begin` says, in float32, or float64 if the parameters are.

    Args:
        dim: width of the tokens.
        level: a `cms`. Default: periods 1 and 16, two-layer MLPs with 4 · dim hidden units.
        precision: of its products, as of a `SequenceMemory`.

    Raises:
        ValueError: for a memory that has no weights to learn, none whose step can be normalised, or a
            `precision` of another name; as it is called, for one that the device lacks.
    """

    def __init__(self, dim: int, level: Cms | None = None, *, precision: Precision = "float32") -> None:
        super().__init__()
        check_precision(precision, "CMS")
        self.precision: Precision = precision
        self.dim, self.level = dim, Cms() if level is None else level
        self._memory, weights = self.level.block(dim), self.level.learned_start(dim, dim)
        if not weights:
            raise ValueError(f"CMS: memory={self._memory!r} has no weights that a layer could learn; give mlp()")
        self.levels = nn.ModuleDict()
        for name, period in self.level.chain().items():
            own = {key.removeprefix(f"{name}."): w for key, w in weights.items() if key.startswith(f"{name}.")}
            steps = period if self.level.learn == "static" and isinstance(period, int) else 1
            self.levels[name] = Block(self._memory, own, steps * self.level.period)
        if self.learns:
            self._begin_learning(self._memory)
        self._shapes = shapes_of(self.init_state(1))

    def _begin_learning(self, memory: Memory) -> None:
        for block in self._blocks().values():
            # of one dimension: FSDP2 and DeepSpeed take no parameter without any
            block.rate = nn.Parameter(torch.tensor([math.log(self.level.first_rate)]))
            if self.level.teach == "local":
                block.target = nn.Parameter(torch.eye(self.dim))
        start = next(iter(self._blocks().values())).weights()
        if self.level.is_normalized and memory.layers(start, torch.zeros(1, self.dim)) is None:
            raise ValueError(
                f"CMS: memory={memory!r} does not say how far a write moves it (Memory.layers), which the normalised "
                "step needs; give normalized=False, or mlp()"
            )

    @property
    def learns(self) -> bool:
        """Whether its weights change as tokens are read: in context, with a rate above 0."""
        return self.level.learn == "context" and self.level.first_rate > 0

    @property
    def taught(self) -> bool:
        """Whether it learns from the error at its output, which a language model hands in."""
        return self.learns and self.level.teach == "loss"

    def init_state(self, batch: int) -> State:
        """Return the state of `batch` sequences before their first token; of a static CMS nothing."""
        return self._clocks().begin(self._starts(), batch) if self.learns else {}

    def forward(
        self,
        x: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        learn: bool = True,
    ) -> tuple[Tensor, State]:
        """Run tokens `[B, T, dim]` through it: as many, its residual included, and the state after the last.

        Args:
            x: tokens.
            state: from a former call; None begins new sequences.
            mask: `[B, T]`, True for tokens, False for padding, which is not learned from; what it is answered means
                nothing.
            learn: False reads the weights as the state has them, and gives the state back.

        Raises:
            ValueError: for a state that does not fit, or where it would be taught by a language model's loss and no
                model is there.
        """
        if x.shape[-1] != self.dim:
            raise ValueError(f"CMS: x has the shape {list(x.shape)}; its last dimension must be dim={self.dim}")
        if state is not None:
            state = fitted(state, self._shapes, x.shape[0], "CMS")
        if mask is not None:
            check_mask(mask, *x.shape[:2])
        if not self.learns or not learn:
            # NaN in padding is none in the gradient of the weights
            shown = x if mask is None else torch.where(mask[..., None], x, 0)
            return self.read(shown, state), dict(state or {})
        if self.taught:
            raise ValueError(
                'CMS: teach="loss" is taught by a language model: put it in a HopeLM, or give the level teach="local", '
                "or call with learn=False"
            )
        phases = self.phases(state)
        state = self.init_state(x.shape[0]) if state is None else state
        if mask is None:
            return self._learned(x, state, phases, None)
        rows = Rows.of(mask)
        y, state = self._learned(rows.moved(x), state, phases, rows.front)
        return rows.back(y), state

    def _learned(self, x: Tensor, state: State, phases: Phases, live: Tensor | None) -> tuple[Tensor, State]:
        """Taught by its own objectives, from one moment of its clocks to the next."""
        found, length = [], x.shape[1]
        for part, at in between_writes(length, phases, [self]):
            found.append(self.read(x[:, part], state))
            lived = None if live is None else live[:, part]
            state = self.observe(x[:, part], None, state, lived, phases=at, ahead=max(0, length - 1 - part.stop))
        return torch.cat(found, dim=1) if found else x, state

    # -- step by step --------------------------------------------------------------------------------------------------

    def read(self, x: Tensor, state: Mapping[str, Any] | None = None) -> Tensor:
        """Return `[B, T, dim]` as the weights in `state` answer it; None is the learned starts."""
        levels = self._levels(state)
        dtype = next(iter(levels.weights[0].values())).dtype
        with self._autocast(x), products_in(self.precision):
            return answers(levels, x.to(dtype)).to(x.dtype)

    def phases(self, state: Mapping[str, Any] | None) -> Phases:
        """How many tokens its sequences have learned from, the different numbers; waits where only a device knows."""
        return [0] if not state else numbers_in(state["step"])

    def until_write(self, phases: Phases) -> int:
        """Return how many tokens there are up to and with the next moment of its clocks, in rows at `phases`."""
        return self._clocks().until(phases)

    def observe(
        self,
        x: Tensor,
        delta: Tensor | None,
        state: Mapping[str, Any],
        live: Tensor | None = None,
        *,
        phases: Phases | None = None,
        ahead: int = 0,
    ) -> State:
        """Learn from tokens that were read with the weights in `state`; where a period is over, write.

        Args:
            x: what was read, `[B, n, dim]`; none of it beyond the next moment of a clock (`until_write`).
            delta: with `teach="loss"`, the error at what was answered, `[B, n, dim]`; else None.
            state: before these tokens.
            live: `[B, n]`, which are observed: in each row the first ones, or all. None is all.
            phases: tokens that the rows had learned from before. None asks `state`, and waits for the device.
            ahead: tokens still to be learned from in this call before its last is read: `through="truncated"` asks.

        Raises:
            ValueError: for tokens beyond the next moment of a clock.
        """
        phases = self.phases(state) if phases is None else phases
        size = x.shape[1]
        if size > (room := self.until_write(phases)):
            raise ValueError(
                f"CMS.observe: {size} tokens are given, and a level may write after {room}; give these first"
            )
        count = None if live is None else live.sum(1)
        seen, clocks = TokenCounts(size, count, phases, ahead), self._clocks()
        constant = all(clocks.constant(seen, period) for period in clocks.chain.values())
        graph = torch.set_grad_enabled(torch.is_grad_enabled() and not constant)
        with graph, self._autocast(x), products_in(self.precision):
            gradients = self._gradients(x, delta, state, live)
        rates = {name: own["rate"].exp()[0] for name, own in self._given().items()}
        return clocks.after(dict(state), gradients, seen, self._starts(), rates)

    def _gradients(
        self, x: Tensor, delta: Tensor | None, state: Mapping[str, Any], live: Tensor | None
    ) -> dict[str, LevelGradient]:
        levels = dataclasses.replace(self._levels(state), taught=self._clocks().taught(dict(state)))
        dtype = next(iter(levels.weights[0].values())).dtype
        if self.taught:
            assert delta is not None
            found = taught_by_loss(levels, x.to(dtype), delta.to(dtype), live)
        else:
            targets = [own["target"].to(dtype) for own in self._given().values()]
            found = taught_locally(levels, x.to(dtype), targets, live)
        return dict(zip(self.levels, found, strict=True))

    def mean_periods(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return tokens per write of each level so far, `[B]`: for an `Auto` as counted (inf before the first)."""
        return {
            name: state["step"] / state["levels"][name]["writes"]
            if isinstance(period, Auto)
            else torch.full_like(state["step"], period, dtype=torch.float32)
            for name, period in self.level.chain().items()
        }

    @torch.no_grad()
    def kept_for_good(self, state: Mapping[str, Any]) -> State:
        """Move what the slowest level has learned, the mean over sequences, to its parameters.

        Returns:
            The state, in which the slowest level is at its new start, with nothing summed.
        """
        state = fitted(state, self._shapes, len(state["step"]), "CMS.kept_for_good")
        name, block = list(self._blocks().items())[-1]
        own = state["levels"][name]
        for key, weight in block.weights().items():
            weight.add_((own["weights"][key] - weight).mean(0).to(weight.dtype))
        fresh = self.init_state(len(state["step"]))["levels"][name]
        kept = {key: own[key] for key in ("writes", "surprise_so_far", "below") if key in own}
        return {**state, "levels": {**state["levels"], name: {**fresh, **kept}}}

    def _autocast(self, x: Tensor) -> AbstractContextManager[Any]:
        """As the caller has it for what is read as any MLP; a memory that learns has a precision of its own."""
        return no_autocast(x.device) if self.learns or self.precision != "float32" else nullcontext()

    def extra_repr(self) -> str:
        return "" if self.precision == "float32" else f"precision={self.precision}"

    # -- what it is made of --------------------------------------------------------------------------------------------

    def _blocks(self) -> dict[str, Block]:
        return dict(self.levels.items())  # type: ignore[arg-type]  # a ModuleDict forgets of what it is

    def _given(self) -> dict[str, dict[str, Tensor]]:
        """Return those of each level by name, as whatever stands in a block's place gives them."""
        levels = self.levels.items()
        return {name: block.forward() if isinstance(block, Block) else block(None) for name, block in levels}

    def _weights(self) -> dict[str, Theta]:
        """Return each memory's own, by name."""
        found = self._given().items()
        return {name: {key: w for key, w in own.items() if key not in BESIDE} for name, own in found}

    def _starts(self) -> dict[str, Theta]:
        """Return where each level's weights start, at the precision of a state."""
        return {
            name: {key: w.to(torch.promote_types(w.dtype, torch.float32)) for key, w in weights.items()}
            for name, weights in self._weights().items()
        }

    def _levels(self, state: Mapping[str, Any] | None) -> Levels:
        one = next(self.parameters())
        check_products(self.precision, one.device, one.dtype, "CMS")
        if state:
            weights: Sequence[Theta] = [state["levels"][name]["weights"] for name in self.levels]
        elif self.learns:
            weights = [{key: w[None] for key, w in start.items()} for start in self._starts().values()]
        else:
            weights = [{key: w[None] for key, w in own.items()} for own in self._weights().values()]
        independent = self.level.variant == "independent"
        shares = [own["share"] for own in self._given().values()] if independent else None
        return Levels(self._memory, weights, shares, measured=self.level.is_normalized)

    def _clocks(self) -> Clocks:
        level = self.level
        writer = LearnerStep(level.learner, level.is_normalized, level.keep)
        return Clocks(level.chain(), writer, level.variant == "nested", level.through, level.last, level.surprise)
