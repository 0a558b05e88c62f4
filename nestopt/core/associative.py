"""The generic level: an associative memory from its parts.

It is the meaning of all the named levels that can be written as a choice of parts, and the reference for fast forms.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad as gradient_of

from nestopt.core.clock import advance, due, start
from nestopt.core.features import Features, Identity
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Memory, Theta
from nestopt.core.objectives import Dot, Objective
from nestopt.core.order import Node
from nestopt.core.outputs import Output, Plain
from nestopt.core.part import FieldError, Number
from nestopt.core.retentions import Keep, Retention
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map


class Gd(Level):
    """Gradient descent: the direction is the gradient (NL eq. 32). `W ← W - lr·g`; no state."""

    batched: ClassVar[bool] = True
    entrywise: ClassVar[bool] = True

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return grad, state

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return grad


class AssociativeMemory(Level):
    r"""A memory of any kind that learns its associations by any rule (NL Def. 1).

    $$\theta_t = \mathrm{retain}(\theta_{t-1}) - \mathrm{step\_size}\cdot
      \mathrm{rule}\big(\mathrm{lr}\cdot\nabla_\theta\,\ell(M(\phi(k_t);\theta), v_t)\big), \qquad
      y_t = M(\phi(q_t); \theta_t)$$

    Inner gradients come from `torch.func.grad`; the outer gradient passes through every step.

    Args:
        memory: `vector`, `matrix`, `mlp` or `window`, or a plugin's.
        objective: `dot` or `l2`, or a plugin's.
        rule: any level; it is shown this memory's gradients. Default `gd`.
        retention: `keep` (all) or `decay`.
        features: of keys and queries, on tokens. Default identity.
        output: what is done to the memory as it is read. Default nothing.
        lr: weight of each association, the η_t of the equations: the rule is shown `lr` times the gradient.
        step_size: multiplies the rule's direction: the learning rate of a rule that forgets scale (adam, muon).
        chunk: on tokens, gradients are taken at the state that the present chunk of so many tokens began with (NL
            eq. 90), and applied token by token. 1 is the exact recurrence.
        read: on tokens, whether a token reads the memory `"after"` its own write, `"before"` it, or as the present
            `"chunk"` found it.
    """

    memory: Memory = dataclasses.field(default_factory=Matrix)
    objective: Objective = dataclasses.field(default_factory=Dot)
    rule: Level = dataclasses.field(default_factory=Gd)
    retention: Retention = dataclasses.field(default_factory=Keep)
    features: Features = dataclasses.field(default_factory=Identity)
    output: Output = dataclasses.field(default_factory=Plain)
    lr: Number = 1.0
    step_size: Number = 1.0
    chunk: int = 1
    read: Literal["after", "before", "chunk"] = "after"

    qk_norm: ClassVar[bool] = False
    """Whether a layer should L2-normalise queries and keys for this level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lr", 0.0)
        self.check("step_size", 0.0)
        self.check("chunk", 1)
        self.check_choice("read", ("after", "before", "chunk"))
        if self._appends:
            for key, default in _UNUSED_BY_APPENDING.items():
                if (value := getattr(self, key)) != default:
                    problem = (
                        f"is not allowed: the memory {self.memory.label} appends and learns by no rule; leave it out"
                    )
                    raise FieldError(self.label, key, value, problem)

    # -- learning, the same in both contexts -------------------------------------------------------------------------

    def gradient(self, theta: Theta, k: Tensor, v: Tensor) -> Theta:
        """lr · ∇_θ ℓ(M(k; θ), v), by parameter."""
        found = gradient_of(lambda th: self.objective(self.memory.read(th, k), v))(theta)
        return {name: self.lr * g for name, g in found.items()}

    def write(self, theta: Theta, rules: State, surprise: Theta, signal: Signal) -> tuple[Theta, State]:
        """One step of the rule on `surprise`, the gradient by parameter."""
        new, states = {}, {}
        for name, param in theta.items():
            own = signal.on(param).inside(f"rule.{name}")
            direction, states[name] = advance(self.rule, surprise[name], rules[name], own)
            new[name] = self.retention(param) - self.step_size * direction  # type: ignore[operator]
        return new, states

    def _rules(self, theta: Theta) -> State:
        return {name: start(self.rule, param) for name, param in theta.items()} if not self._appends else {}

    @property
    def _appends(self) -> bool:
        return type(self.memory).append is not Memory.append

    # -- on gradients ------------------------------------------------------------------------------------------------

    def init(self, param: Tensor) -> State:
        theta = self.memory.start_on(param)
        return {"memory": theta, "rule": self._rules(theta)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        theta, rules = state["memory"], state["rule"]
        k, v = self.memory.pairs(grad)
        appended = self.memory.append(theta, k, v)
        if appended is None:
            signal.report("inner_loss", lambda: self.objective(self.memory.read(state["memory"], k), v) / len(v))
            theta, rules = self.write(theta, rules, self.gradient(theta, k, v), signal)
        else:
            theta = appended
        return self.memory.direction(theta, grad, self.output), {"memory": theta, "rule": rules}

    # -- on tokens ---------------------------------------------------------------------------------------------------

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return self.memory.learned_start(self.features.dim(dim_k), dim_v)

    def begin(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self._appends and self.period > 1:
            problem = "is not allowed on tokens: a memory that appends takes every pair"
            raise FieldError(self.label, "period", self.period, problem)
        theta = learned or self.memory.start(self.features.dim(dim_k), dim_v, like)
        state: State = {"memory": theta, "rule": self._rules(theta)}
        if self.chunk > 1:
            state["chunk"] = theta
        if self.period > 1:
            state["sum"] = {name: torch.zeros_like(param) for name, param in theta.items()}
        return state

    def attend(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        q, k = self.features(q), self.features(k)
        before: Theta = state["memory"]
        appended = self.memory.append(before, k, v)
        if appended is not None:
            return self._answer(appended if self.read == "after" else before, q), {**state, "memory": appended}
        at = before
        if self.chunk > 1:
            first = (signal.step - 1) % self.chunk == 0
            at = tree_map(lambda now, old: torch.where(first, now, old), before, state["chunk"])  # type: ignore[arg-type]
        surprise = self.gradient(at, k, v)
        new: State = {"chunk": at} if self.chunk > 1 else {}
        if self.period > 1:
            surprise = tree_map(torch.add, surprise, state["sum"])
            theta, rules = self.write(before, state["rule"], surprise, signal.every(self.period))
            now = torch.as_tensor(due(signal.step, self.period), device=q.device)
            theta, rules = (
                tree_map(lambda new, old: torch.where(now, new, old), written, kept)
                for written, kept in ((theta, before), (rules, state["rule"]))
            )
            new["sum"] = tree_map(lambda s: torch.where(now, torch.zeros_like(s), s), surprise)
        else:
            theta, rules = self.write(before, state["rule"], surprise, signal)
        seen = {"after": theta, "before": before, "chunk": at}[self.read]
        return self._answer(seen, q), {"memory": theta, "rule": rules, **new}

    def _answer(self, theta: Theta, q: Tensor) -> Tensor:
        if self.memory.linear:
            return self.memory.read({name: self.output(param) for name, param in theta.items()}, q)
        return self.output(self.memory.read(theta, q))

    # -- for describe ------------------------------------------------------------------------------------------------

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        every = period * self.period
        words = {"memory": self.memory.label, "objective": self.objective.label}
        if self._appends:
            return [Node(name, every, after, memory=self.memory.label, objective="softmax regression", rule="append")]
        rule = self.rule.nodes(f"{name}.rule", every, after)
        if isinstance(self.rule, Gd) and self.rule.period == 1:
            rule = []  # it remembers nothing
        return [*rule, Node(name, every, tuple(node.name for node in rule) or after, **words, rule=self.rule.label)]


_UNUSED_BY_APPENDING = {
    "objective": Dot(),
    "rule": Gd(),
    "retention": Keep(),
    "lr": 1.0,
    "step_size": 1.0,
    "chunk": 1,
}
"""What a memory that appends its pairs does not use, at its default."""
