"""What closed forms know of a memory of pairs: its rule as a linear recurrence, and what they do not compute."""

from __future__ import annotations

import dataclasses
from types import FunctionType

from torch import Tensor

from nestopt.core.associative import AssociativeMemory, Gd
from nestopt.core.features import Features, Identity
from nestopt.core.gates import gates_of
from nestopt.core.level import Level
from nestopt.core.memories import Window
from nestopt.core.outputs import Plain
from nestopt.core.part import Channels, Number
from nestopt.core.retentions import Decay, Keep
from nestopt.core.token_batch import TokenBatch
from nestopt.core.tree import State
from nestopt.levels.gradient.dgd import Dgd
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.presets import LinearAttention


@dataclasses.dataclass(frozen=True)
class LinearRule:
    r"""A rule whose direction is $S_t = \theta_t S_{t-1} + g_t$, or the gradient itself, with a delta decay or none.

    Attributes:
        momentum: θ, or None; and where in the rule the momentum's state and fields are, as a dotted prefix.
        inside: `"of."` if the momentum is within a dgd, else `""`.
        delta: δ of a dgd, else 0.
        wrapped: whether the rule is a dgd.
    """

    momentum: Number | None = None
    inside: str = ""
    delta: float = 0.0
    wrapped: bool = False

    def state(self, momentum: Tensor | None) -> State:
        """Return the rule's state, given its momentum."""
        inner: State = {} if momentum is None else {"momentum": momentum}
        return {"of": inner} if self.wrapped else inner

    def momentum_in(self, state: State) -> Tensor:
        """Return the momentum in the rule's state."""
        return (state["of"] if self.wrapped else state)["momentum"]


def overridden(level: Level, base: type[Level]) -> str:
    """Say which method or property of `base`, that a closed form computes, `level` has its own of; empty if none.

    Special methods are left out: they check fields, and compute nothing.
    """
    for cls in type(level).__mro__[: type(level).__mro__.index(base)]:
        for name, value in vars(cls).items():
            known = isinstance(value, FunctionType | property | classmethod | staticmethod) and hasattr(base, name)
            if known and not name.startswith("__"):
                return f"{type(level).__name__}.{name} is its own, and not that of {base.__name__}"
    return ""


def linear_rule(rule: Level) -> LinearRule | None:
    """Return `rule` as a linear recurrence; None if it is none."""
    base = next((cls for cls in (Gd, Momentum, Dgd) if isinstance(rule, cls)), None)
    if base is None or rule.period > 1 or overridden(rule, base):
        return None
    if isinstance(rule, Gd):
        return LinearRule()
    if isinstance(rule, Momentum):
        return LinearRule(momentum=rule.beta) if is_sum(rule) and rule.dampening == 0 else None
    if isinstance(rule, Dgd) and rule.solver == "explicit" and not rule.normalize_inputs:
        within = linear_rule(rule.of)
        if within is not None and not within.wrapped and isinstance(rule.delta, int | float):
            return LinearRule(within.momentum, "of.", float(rule.delta), wrapped=True)
    return None


def is_sum(level: Momentum) -> bool:
    """Return whether a momentum is its state, and that a sum with one decay."""
    return not level.nesterov and not level.undamped_start and level.period == 1 and is_number(level.beta)


def is_number(value: Number | None) -> bool:
    """Return whether a field holds one number, or a gate, and no tensor with a shape."""
    return not isinstance(value, Tensor) or value.ndim == 0


def is_one(value: Number) -> bool:
    """Return whether a field is the constant 1."""
    return isinstance(value, int | float) and value == 1


def is_plain(rule: Level) -> bool:
    """Return whether the rule passes gradients on as they are."""
    linear = linear_rule(rule)
    return linear is not None and linear.momentum is None and not linear.wrapped


def featured(features: Features, tokens: TokenBatch) -> TokenBatch:
    """Return the tokens with features of their queries and keys in the place of these."""
    if type(features) is Identity:
        return tokens
    return tokens.replace(q=features(tokens.q), k=features(tokens.k))


def refusal(level: AssociativeMemory, own: type[AssociativeMemory] = AssociativeMemory) -> str:
    """Say what closed forms do not compute of how `level` is read and clocked, and whether it means what its parts say.

    Empty where there is nothing. `own` is the class whose methods are computed.
    """
    if own is AssociativeMemory and isinstance(level, LinearAttention):
        if level.normalizer:
            return "normalizer=True: what it answers is divided"
        own = LinearAttention
    if why := overridden(level, own):
        return why
    if level.period > 1:
        return f"period={level.period}: it sums gradients on a clock"
    if type(level.output) is not Plain:
        return f"output={level.output.label}: the memory is read by a function"
    if gates_of(level.features):
        return "its features have gates"
    return ""


def refusal_of_writes(level: AssociativeMemory, *, channels: bool = False) -> str:
    """Say what closed forms do not compute of how the weights of `level` are written; empty where nothing.

    `channels`: whether a decay for each channel of the keys is computed, without momentum.
    """
    rule = linear_rule(level.rule)
    if type(level.memory) is Window:
        return "the memory keeps its pairs"
    if rule is None:
        return f"rule={level.rule.label} is no linear recurrence of gradients (gd, momentum, or dgd of them)"
    if level.write == "chunk":
        return "write='chunk': the rule takes one step a chunk"
    if type(level.retention) not in (Keep, Decay):
        return f"retention={level.retention.label}: keep and decay are computed"
    by_channel = isinstance(getattr(level.retention, "keep", None), Channels)
    if by_channel and not (channels and rule.momentum is None):
        return f"retention={level.retention.label}: its keep is one for each channel"
    numbers = {"lr": level.lr, "step_size": level.step_size, "rule's beta": rule.momentum}
    numbers["retention's keep"] = getattr(level.retention, "keep", None)
    for name, value in numbers.items():
        if not is_number(value):
            return f"{name} is a tensor with a shape"
    if rule.momentum is not None and not is_one(level.step_size):
        return f"step_size={level.step_size}: the momentum must be what moves the memory"
    return ""
