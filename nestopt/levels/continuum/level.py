"""The continuum memory system: memories on a spectrum of clocks (NL eq. 70-75)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.associative import Gd
from nestopt.core.compose import Parallel
from nestopt.core.inputs import INPUTS
from nestopt.core.level import Level
from nestopt.core.memories import Memory, Mlp
from nestopt.core.order import Node
from nestopt.core.part import FieldError
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.muon import Muon


class Auto(Mapping[str, float]):
    r"""A period that the data choose: a write when the surprise since the last one has passed a threshold.

    Every `every` tokens the level looks, sequence by sequence, whether the squared errors that it has seen since its
    last write (the mean over their entries, summed over tokens) come to the threshold; if so it writes. The threshold
    calibrates itself, from what this sequence has surprised the level with so far:

    $$\mathrm{threshold} = (\mathrm{mean} - \tfrac12\,(\mathrm{every} - 1))\cdot
      \frac{\text{surprise of all tokens so far}}{\text{tokens so far}}$$

    So it writes about once in `mean` tokens, sooner where the text is surprising and later where it is not, whatever
    the size of the errors; a look is half of `every` late in the mean, which is taken off.

    In a config: `{auto: 64, every: 16}`, or `auto` with these defaults; `{threshold: 4.0, every: 16}` has a threshold
    that stays.

    Args:
        mean: tokens between writes, in the mean; `every` or more.
        every: tokens between two looks, 1 or more.
        threshold: one that stays, 0 or more, in place of `mean`.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(self, mean: float | None = None, every: int = 16, *, threshold: float | None = None) -> None:
        if isinstance(every, bool) or every != int(every) or every < 1:
            raise ValueError(f"auto: every={every!r} is not allowed; give a whole number of tokens, 1 or more")
        if mean is not None and threshold is not None:
            raise ValueError(f"auto: auto={mean!r} and threshold={threshold!r} are both given; give one of them")
        if threshold is None:
            mean = 4 * every if mean is None else mean
            if isinstance(mean, bool) or not isinstance(mean, int | float) or not every <= mean < math.inf:
                raise ValueError(f"auto: auto={mean!r} is not allowed; give a mean period, every={every} or more")
        elif isinstance(threshold, bool) or not isinstance(threshold, int | float) or not threshold >= 0:
            raise ValueError(f"auto: threshold={threshold!r} is not allowed; give a number, 0 or more")
        self.mean = None if mean is None else float(mean)
        self.threshold = None if threshold is None else float(threshold)
        self.every = int(every)

    @staticmethod
    def of(given: Mapping[str, float]) -> Auto:
        """Make one from a mapping with `auto`, the mean period, or `threshold`; and perhaps `every`."""
        if unknown := sorted(set(given) - {"auto", "threshold", "every"}):
            raise ValueError(f"auto has no key {unknown[0]!r}; its keys: auto, threshold, every")
        return Auto(given.get("auto"), given.get("every", 16), threshold=given.get("threshold"))  # type: ignore[arg-type]  # checked there

    def passed(self, surprise: Tensor, total: Tensor, step: Tensor) -> Tensor:
        """Return whether the surprise since the last write comes to the threshold.

        Args:
            surprise: since the last write.
            total: of all tokens so far.
            step: how many these are, 1 or more.
        """
        if self.threshold is not None:
            return surprise > self.threshold
        assert self.mean is not None
        return (surprise > 0) & (surprise >= (self.mean - (self.every - 1) / 2) * total / step)

    # a mapping, so that a config can hold it as it is
    def __getitem__(self, key: str) -> float:
        return self._items()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._items())

    def __len__(self) -> int:
        return 2

    def __hash__(self) -> int:
        return hash((self.mean, self.threshold, self.every))

    def __repr__(self) -> str:
        return f"Auto({', '.join(f'{key}={value:g}' for key, value in self._items().items())})"

    def _items(self) -> dict[str, float]:
        own: dict[str, float] = {"every": self.every}
        return {"auto": self.mean, **own} if self.mean is not None else {"threshold": self.threshold or 0.0, **own}


Period = int | Literal["auto"] | Mapping[str, float]
"""A number of tokens or steps, or an `Auto`."""


class Cms(Level):
    r"""A continuum of memories, one per clock.

    On tokens: a chain of blocks, from the fastest to the slowest, $x \leftarrow x + M^{(\ell)}(\mathrm{rms\_norm}(x))$;
    with one level it is a Transformer's MLP. What changes their weights:

    * `learn="static"`: the optimizer. A level with period C has its weights updated once in C optimizer steps, on the
      sum of their gradients: `nestopt.optimizer` sees the periods.
    * `learn="context"`: the tokens. Each sequence has its own copy of the weights, started from the learned ones; every
      C tokens a level with period C takes one step of `learner` on the gradient of its last C tokens (eq. 71), at the
      weights that these were read with:

      $$W \leftarrow W_0 + \mathrm{keep}\,(W - W_0) - \mathrm{rate}\cdot\mathrm{learner}\Big(
        \frac{\sum_t \nabla_W \ell_t}{\varepsilon + \sum_t d_t}\Big)$$

      $d_t$, the squared size of the read's derivative by the weights, bounds what a step on token t does to its own
      read; its sum bounds the largest eigenvalue of the period's map, so that in the linearised model a rate of 1 or
      less never overshoots. (In a chain, later levels are taken for the identity in $d_t$, not in the gradient.)

    On gradients: one copy of `rule` per period, all shown the gradient, directions summed with `weights`: the
    continuum of M3 (eq. 75).

    Args:
        periods: C of each level, in any order: the fastest is always the first of the chain. An `Auto` chooses its
            own, in context. Default (1, 16).
        memory: one block. Default a two-layer MLP, 4 · dim hidden units.
        rule: what runs at each period on gradients. Default `muon`.
        weights: of the directions on gradients, one per period. Default: all 1.
        variant: how the blocks are put together on tokens. `"sequential"`: one after another (eq. 70, 73).
            `"independent"`: $x + \sum_\ell c_\ell M^{(\ell)}(\mathrm{rms\_norm}(x))$ with c learned, 1/k each at the
            start (eq. 74). `"nested"`: sequential, and in context each level also learns where the next faster one
            starts: at the end of its period it takes a step on that one's gradients of the period, from where that
            one started, and puts it back there (eq. 72).
        learn: `"static"` or `"context"`.
        teach: what a level learns from in context. `"local"`: $M^{(\ell)}(\mathrm{rms\_norm}(x_\ell))$ is to be
            $V_\ell\,\mathrm{rms\_norm}(x)$ of the continuum's input x, in squared error, with $V_\ell$ learned.
            `"loss"`: the error at the continuum's output, which a language model hands in.
        signal: which error a language model hands in. `"exact"`: the derivative of its loss by the continuum's output,
            through all that comes after; one backward pass between two writes. `"residual"`: that by the stream after
            the last block, as if no block came after; exact in the last block, and less and less like it below.
        learner: what is shown the gradients of a period in context: any level but one that needs a layer's inputs.
        rate: of the learner's steps at the start; a number per level, learned as its logarithm. 0: the weights stay.
            Default 0.5 of the normalised step, 0.05 of the plain one.
        normalized: whether the gradient is divided by $\varepsilon + \sum_t d_t$; else it is the plain sum. Default:
            with a local objective, whose curvature is 1. A language model's loss is far flatter in the residual
            stream, and bounded in its slope: there a normalised step hardly moves.
        keep: what is left, at each write, of the way from the learned start, from 0 to 1.
        surprise: a token teaches a level only if the mean square of its error is at least so many times that of the
            sequence's tokens before it, in the mean; the first does. 0: every token.
        through: how the outer gradient passes a write. `"full"`: through all of it (second order).
            `"first_order"`: what was written is a constant, but for its rate. `"truncated"`: as `"full"` for the last
            `last` writes of each level that a call reads, as `"first_order"` for those before. `"stop"`: nowhere, and
            the starts get no gradient at all. Targets $V_\ell$ are learned only by `"full"` and `"truncated"`.
        last: writes, for `"truncated"`.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"shape"})

    periods: tuple[Period, ...] = (1, 16)
    memory: Memory = dataclasses.field(default_factory=lambda: Mlp(residual=False))
    rule: Level = dataclasses.field(default_factory=Muon)
    weights: tuple[float, ...] | None = None
    variant: Literal["sequential", "independent", "nested"] = "sequential"
    learn: Literal["static", "context"] = "static"
    teach: Literal["local", "loss"] = "local"
    signal: Literal["exact", "residual"] = "residual"
    learner: Level = dataclasses.field(default_factory=Gd)
    rate: float | None = None
    normalized: bool | None = None
    keep: float = 1.0
    surprise: float = 0.0
    through: Literal["full", "truncated", "first_order", "stop"] = "full"
    last: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.periods = tuple(settled(period) for period in self.periods)
        except ValueError as error:
            raise FieldError("cms", "periods", self.periods, f"is not allowed; {error}") from None
        if not self.periods:
            raise FieldError("cms", "periods", self.periods, f"is not allowed; {_ALLOWED}")
        if self.weights is not None:
            self.weights = tuple(self.weights)
            if len(self.weights) != len(self.periods):
                problem = f"is not allowed; give one number for each of periods={self.periods}"
                raise FieldError("cms", "weights", self.weights, problem)
        self.check_choice("variant", ("sequential", "independent", "nested"))
        self.check_choice("learn", ("static", "context"))
        self.check_choice("teach", ("local", "loss"))
        self.check_choice("signal", ("exact", "residual"))
        self.check_choice("through", ("full", "truncated", "first_order", "stop"))
        if self.rate is not None:
            self.check("rate", 0.0)
        self.check("keep", 0.0, 1.0)
        self.check("surprise", 0.0)
        self.check("last", 1)
        if INPUTS in self.learner.needs:
            problem = "is not allowed: it needs a layer's inputs, and a continuum shows it gradients alone"
            raise FieldError("cms", "learner", self.learner, problem)
        if self.learn == "static" and any(isinstance(period, Auto) for period in self.periods):
            problem = 'is not allowed with learn="static": a period is chosen by tokens; give learn="context"'
            raise FieldError("cms", "periods", self.periods, problem)

    @property
    def is_normalized(self) -> bool:
        """`normalized`, or its default."""
        return self.teach == "local" if self.normalized is None else self.normalized

    @property
    def first_rate(self) -> float:
        """`rate`, or its default."""
        if self.rate is None:
            return 0.5 if self.is_normalized else 0.05
        return self.rate

    @property
    def needs(self) -> frozenset[str]:
        # the memory is for tokens: on gradients only the rule is shown anything
        return self.requires | self.rule.needs

    # -- on gradients ------------------------------------------------------------------------------------------------

    def clocks(self) -> Parallel:
        """Return the rule at each period, side by side: what a cms is on gradients."""
        levels = {}
        for name, period in zip(level_names(self.periods), self.periods, strict=True):
            if not isinstance(period, int):
                raise ValueError(f"cms: periods={self.periods} are not for gradients, which have no Auto; give numbers")
            levels[name] = dataclasses.replace(self.rule, period=period)
        return Parallel(levels, weights=self.weights)

    def init(self, param: Tensor) -> State:
        return self.clocks().init(param)

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return self.clocks().step(grad, state, signal)

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return self.clocks().step_(grad, state, signal)

    @property
    def forgets_scale(self) -> bool:
        return self.rule.forgets_scale

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        return self.clocks().nodes(name, period * self.period, after)

    # -- on tokens ---------------------------------------------------------------------------------------------------

    def chain(self) -> dict[str, int | Auto]:
        """Return the levels by name in the order of the chain: the fastest first, of equal ones the first listed."""
        named = zip(level_names(self.periods), (settled(period) for period in self.periods), strict=True)
        return dict(sorted(named, key=lambda item: ticks_of(item[1])))

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        block, names = self.block(dim_k), list(self.chain())
        found: dict[str, Tensor] = {}
        for name in names:
            found |= {f"{name}.{key}": value for key, value in block.learned_start(dim_k, dim_v).items()}
        if found and self.variant == "independent":
            found |= {f"{name}.share": torch.tensor(1 / len(names)) for name in names}
        return found

    def block(self, dim: int) -> Memory:
        """One level's memory for tokens of `dim` numbers."""
        if isinstance(self.memory, Mlp) and self.memory.hidden is None:
            return dataclasses.replace(self.memory, hidden=4 * dim)
        return self.memory

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self.learn == "context":
            raise ValueError('cms: learn="context" is run by a layer of its own, nestopt.nn.CMS(dim, level)')
        return dict(learned or self.learned_start(dim_k, dim_v))

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        x, block = q, self.block(q.shape[-1])
        for name in self.chain():
            theta = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
            share = theta.pop("share", None)
            if share is None:
                x = x + block.read(theta, F.rms_norm(x, x.shape[-1:]))
            else:
                x = x + share * block.read(theta, F.rms_norm(q, q.shape[-1:]))
        return x, state


_ALLOWED = "give whole numbers of steps, 1 or more each"


def settled(period: Period) -> int | Auto:
    """Return a period as it is meant. Raises ValueError for one that is not allowed."""
    if isinstance(period, Mapping):
        return period if isinstance(period, Auto) else Auto.of(period)
    if isinstance(period, str) and period == "auto":
        return Auto()
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(_ALLOWED)
    return period


def ticks_of(period: int | Auto) -> int:
    """Return how many tokens lie between two moments at which a level may write."""
    return period if isinstance(period, int) else period.every


def level_names(periods: tuple[Period, ...]) -> list[str]:
    """Return a name per level: `every_16`, or `auto_16`, with a count where one comes twice."""
    names: list[str] = []
    for period in periods:
        base = f"{'every' if isinstance(period, int) else 'auto'}_{ticks_of(settled(period))}"
        count = sum(name == base or name.startswith(f"{base}_") for name in names)
        names.append(base if count == 0 else f"{base}_{count + 1}")
    return names
