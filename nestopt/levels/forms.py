"""Which closed form a level has on tokens, by its parts."""

from __future__ import annotations

import dataclasses
from typing import Literal

from torch import Tensor

from nestopt.core.associative import AssociativeMemory, Gd
from nestopt.core.gates import gates_of
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Mlp, Window
from nestopt.core.objectives import L2, Dot, Oja
from nestopt.core.outputs import Plain
from nestopt.core.part import Number
from nestopt.core.retentions import Decay, Keep
from nestopt.levels.gradient.dgd import Dgd
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.matrix.level import Omega
from nestopt.levels.self_modifying.level import SelfModifying

Name = Literal["attention", "linear_attention", "delta_rule", "oja", "omega", "deep_memory", "self_modifying"]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A rule that closed forms know.

    Attributes:
        momentum: β, or None; and where in the rule the momentum's state and fields are, as a dotted prefix.
        inside: `"of."` if the momentum is within a dgd, else `""`.
        delta: of a dgd, else 0.
        wrapped: whether the rule is a dgd.
    """

    momentum: Number | None = None
    inside: str = ""
    delta: float = 0.0
    wrapped: bool = False


def fast_form(level: Level) -> Name | None:
    """Which closed form `nestopt.ops.run` takes for `level`, by its name in `nestopt.ops`; None is the generic machine.

    Only where it is exact: for the memories, objectives, rules and retentions that are built in (matrix and mlp; dot,
    l2 and oja; `gd`, `momentum` and `dgd` of them; keep and decay), with `period=1`, a plain output and no gates within
    features; and for `self_modifying`.
    """
    if type(level) is Momentum:
        return "linear_attention" if _plain_momentum(level) and _is_number(level.dampening) else None
    if type(level) is SelfModifying:
        return "self_modifying" if level.momentum is None or _is_number(level.momentum) else None
    if not isinstance(level, AssociativeMemory) or not _means_what_it_says(level):
        return None
    if level.period > 1 or type(level.output) is not Plain or gates_of(level.features):
        return None
    if type(level.memory) is Window:
        return "attention" if level.read == "after" else None
    rule = rule_of(level.rule)
    if rule is None or level.write == "chunk" or type(level.retention) not in (Keep, Decay):
        return None
    numbers = [level.lr, level.step_size, rule.momentum, getattr(level.retention, "keep", None)]
    if not all(number is None or _is_number(number) for number in numbers):
        return None
    if rule.momentum is not None and level.step_size != 1.0:
        return None  # the closed forms' momentum is what moves the memory
    if isinstance(level, Omega):
        plain = rule == Rule() and type(level.memory) is Matrix and type(level.objective) is L2
        return "omega" if plain and level.read == "after" else None
    return _of_weights(level, rule)


def _of_weights(level: AssociativeMemory, rule: Rule) -> Name | None:
    exact = level.chunk == 1 and not rule.wrapped and type(level.memory) is Matrix
    objective = type(level.objective)
    if exact and level.read in ("after", "before", "chunk"):
        if objective is Dot and rule.momentum is None and not level.normalized:
            return "linear_attention"
        if objective is L2 and (level.fade == "with" or not level.normalized):
            return "delta_rule"
        if objective is Oja and rule.momentum is None and not level.normalized and level.fade == "with":
            return "oja" if level.read == "after" else None
    if level.fade == "before" or objective not in (Dot, L2) or type(level.memory) not in (Matrix, Mlp):
        return None
    return "deep_memory"


def rule_of(rule: Level) -> Rule | None:
    """What closed forms need to know of `rule`; None for one that they do not know."""
    if rule.period > 1:
        return None
    if type(rule) is Gd:
        return Rule()
    if type(rule) is Momentum:
        return Rule(momentum=rule.beta) if _plain_momentum(rule) and rule.dampening == 0 else None
    if type(rule) is Dgd and rule.solver == "explicit" and not rule.normalize_inputs and type(rule.of) is not Dgd:
        within = rule_of(rule.of)
        if within is not None and isinstance(rule.delta, int | float):
            return Rule(within.momentum, "of.", float(rule.delta), wrapped=True)
    return None


_MEANING = ("attend", "attend_chunk", "begin", "gradient", "learn", "rates", "shown", "_answer", "_rules", "_written")


def _means_what_it_says(level: AssociativeMemory) -> bool:
    """Whether none of the methods that closed forms stand for is another's."""
    if type(level) is Omega:
        return True
    return all(getattr(type(level), name) is getattr(AssociativeMemory, name) for name in _MEANING)


def _plain_momentum(level: Momentum) -> bool:
    return not level.nesterov and not level.undamped_start and level.period == 1 and _is_number(level.beta)


def _is_number(value: Number) -> bool:
    return not isinstance(value, Tensor) or value.ndim == 0
