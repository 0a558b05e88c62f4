"""The generic level: an associative memory from its parts.

It is the meaning of all the named levels that can be written as a choice of parts, and the reference for fast forms.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.func import grad as gradient_of
from torch.func import vmap

from nestopt.core.choices import check_choices
from nestopt.core.clock import advance, due, start
from nestopt.core.device import number_like, where
from nestopt.core.features import Features, Identity
from nestopt.core.gates import bind
from nestopt.core.inputs import INPUTS, LayerInputs, MemoryInputs, request_of
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Memory, Theta
from nestopt.core.normalized import Shown, joint_rates, states_after
from nestopt.core.objectives import Dot, Objective
from nestopt.core.order import Node
from nestopt.core.outputs import Output, Plain
from nestopt.core.part import FieldError, Gate, Number
from nestopt.core.precision import matmul
from nestopt.core.retentions import Keep, Retention
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map


class Gd(Level):
    """Gradient descent: the direction is the gradient (NL eq. 32). `W ← W - lr·g`; no state."""

    reads_param: ClassVar[bool] = False
    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return grad, state

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        return grad


AS_IT_IS = Gd()

BESIDE = "beside"
"""Key of a memory's rules: what its retention keeps beside each weight, where it does (`Retention.begin`)."""


class AssociativeMemory(Level):
    r"""A memory of any kind that learns its associations by any rule (NL Def. 1).

    $$\theta_t = \mathrm{retain}(\theta_{t-1}) - \mathrm{step\_size}\cdot
      \mathrm{rule}\big(\mathrm{lr}\cdot\nabla_\theta\,\ell(M(\phi(k_t);\theta), v_t)\big), \qquad
      y_t = M(\phi(q_t); \theta_t)$$

    Inner gradients come from `torch.func.grad`; the outer gradient passes through every step.

    Args:
        memory: `vector`, `matrix`, `mlp` or `window`, or a plugin's.
        objective: `dot`, `l2`, `lp`, `huber` or `oja`, or a plugin's.
        rule: any level; it is shown this memory's gradients. Default `gd`. With `dgd` each weight also forgets what it
            answers to its own input, $-\delta\,\mathrm{lr}\,(W a)a^\top$ (NL eq. 57, 88).
        retention: `keep` (all) or `decay`.
        features: of keys and queries, on tokens. Default identity.
        output: what is done to the memory as it is read. Default nothing.
        lr: weight of each association, the η_t of the equations: the rule is shown `lr` times the gradient.
        step_size: multiplies the rule's direction: the learning rate of a rule that forgets scale (adam, muon).
        chunk: on tokens, gradients are taken at the state that the present chunk of so many tokens began with (NL
            eq. 90), and applied token by token. 1 is the exact recurrence.
        read: on tokens, whether a token reads the memory `"after"` its own write, `"before"` it, or as the present
            `"chunk"` found it.
        write: on tokens, whether the rule takes a step per `"token"`, or one per `"chunk"`, at its last token, on the
            sum of the chunk's gradients.
        normalized: False: lr as it is. `"layerwise"`: lr in (0, 1] is the share of its own error that a token's write
            takes off, each layer by steps of its own (`nestopt.levels.deep.layerwise`). True: lr, in (0, 1], times
            `bound` · α · (the rule's damping) / (ε + n), with which the whole chunk's step never passes `bound`
            (`nestopt.levels.deep.step_size`). Pairs that come together (on gradients, `write="chunk"`) are written as
            with True in both.
        bound: of the normalised step, in (0, 2).
        fade: whether the retention acts `"with"` the write, whose gradient is of the memory as it was, or `"before"`
            it, as in gated DeltaNet (`chunk` is then 1).
        forget: which weights of a memory the retention fades, `"all"` or, of several layers, the `"outer"` one alone.
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
    write: Literal["token", "chunk"] = "token"
    normalized: bool | Literal["layerwise"] = False
    bound: float = 1.0
    fade: Literal["with", "before"] = "with"
    forget: Literal["all", "outer"] = "all"

    qk_norm: ClassVar[bool] = False
    """Whether a layer should L2-normalise queries and keys for this level."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lr", 0.0, 1.0 if self.normalized else math.inf)
        self.check("step_size", 0.0)
        self.check("chunk", 1)
        self.check("bound", 0.0, 2.0, closed="()")
        self.check_choice("read", ("after", "before", "chunk"))
        self.check_choice("write", ("token", "chunk"))
        self.check_choice("fade", ("with", "before"))
        self.check_choice("forget", ("all", "outer"))
        self.check_choice("normalized", (False, True, "layerwise"))
        self.retention.check_memory(self)
        check_choices(self, AssociativeMemory)

    fades_pairs: ClassVar[bool] = False  # whether the retention fades the pairs of a memory that keeps them

    def appended(self, theta: Theta, k: Tensor, v: Tensor) -> Theta | None:
        """θ with the pair appended; None where a rule must write it."""
        return self.memory.append(theta, k, v)

    # -- learning, the same in both contexts -------------------------------------------------------------------------

    def gradient(self, theta: Theta, k: Tensor, v: Tensor, rate: Tensor | None = None) -> Theta:
        """Σ rate · ∇_θ ℓ(M(k; θ), v) over pairs `[n, D]` with a rate `[n]` each; without, `lr` is that of all."""
        if rate is None:
            found = gradient_of(lambda th: self.objective.loss(self.memory, th, k, v))(theta)
            return {name: self.lr * g for name, g in found.items()}

        def loss(theta: Theta) -> Tensor:
            return (rate * vmap(lambda k, v: self.objective.loss(self.memory, theta, k, v))(k, v)).sum()

        return gradient_of(loss)(theta)

    def learn(
        self, theta: Theta, rules: State, surprise: Theta, signal: Signal, shown: Shown | None = None
    ) -> tuple[Theta, State]:
        """One step of the rule on `surprise`, the gradient by parameter, and the retention."""
        new, states, beside = {}, {}, dict(rules.get(BESIDE, {}))
        for name, param in theta.items():
            own = signal.on(param).inside(f"rule.{name}")
            if shown is not None:
                own = dataclasses.replace(own, lr=1.0, inputs=shown(name, param))
            direction, states[name] = advance(self.rule, surprise[name], rules[name], own)
            step = self.step_size * direction  # type: ignore[operator]
            if self.fade == "with" and self._fades(name):
                new[name], kept = self.retention.write(param, step, beside.get(name, {}))
                beside |= {name: kept} if kept else {}
            else:
                new[name] = param - step
        return new, {**states, BESIDE: beside} if beside else states

    def _fades(self, name: str) -> bool:
        """Return whether the retention acts on this weight."""
        return self.forget == "all" or self.memory.outermost in (None, name)

    def _retained(self, theta: Theta) -> Theta:
        return {name: self.retention(w) if self._fades(name) else w for name, w in theta.items()}

    def _begun(self, theta: Theta) -> State:
        """Return the state of a memory that starts at `theta`."""
        found = {name: self.retention.begin(w) if self._fades(name) else (w, {}) for name, w in theta.items()}
        at, beside = (
            {name: w for name, (w, _) in found.items()},
            {name: kept for name, (_, kept) in found.items() if kept},
        )
        return {"memory": at, "rule": {**self._rules(at), **({BESIDE: beside} if beside else {})}}

    def shown(self, theta: Theta, k: Tensor, rate: Tensor) -> Shown | None:
        """Return, for a rule that asks for the weights' inputs, these at θ: keys `[n, D_k]` with their rates `[n]`."""
        wants = request_of(self.rule)
        if wants is None:
            return None
        layers = self.memory.layers(theta, k)
        if layers is None or wants.grad is not None or wants.normalize:
            what = (
                f"the memory {self.memory.label}" if layers is None else "an objective or normalize_inputs of its own"
            )
            problem = f"is not allowed as a memory's rule with {what}"
            raise FieldError(self.label, "rule", self.rule, problem)

        def inputs(name: str, param: Tensor) -> LayerInputs:
            a = layers[name][0]
            # the rates stand where a layer has its mean and the optimizer its learning rate; no mean square: eq. 88
            # has no denominator
            return MemoryInputs(
                wxx=matmul((rate[:, None] * matmul(a, param.mT)).mT, a),
                mean_square=a.new_zeros(()),
                rows=rate.sqrt()[:, None] * a,
            )

        return inputs

    @property
    def delta_decay(self) -> Number | None:
        """The strength of the delta decay, if the rule has one."""
        return getattr(self.rule, "delta", None) if INPUTS in self.rule.needs else None

    def _rules(self, theta: Theta) -> State:
        return {name: start(self.rule, param) for name, param in theta.items()} if not self.appends else {}

    @property
    def appends(self) -> bool:
        return type(self.memory).append is not Memory.append

    # -- on gradients ------------------------------------------------------------------------------------------------

    def init(self, param: Tensor) -> State:
        return self._begun(self.memory.start_on(param))

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        theta, rules = state["memory"], state["rule"]
        k, v = self.memory.pairs(grad)
        appended = self.appended(theta, k, v)
        if appended is None:
            if self.fade == "before":
                theta = self._retained(theta)
            signal.report("inner_loss", lambda: self.objective.loss(self.memory, state["memory"], k, v) / len(v))
            rate = self._rate(theta, k)
            surprise = self.gradient(theta, k, v, rate if self.normalized else None)
            theta, rules = self.learn(theta, rules, surprise, signal, self.shown(theta, k, rate))
        else:
            theta = appended
        return self.memory.direction(theta, grad, self.output), {"memory": theta, "rule": rules}

    def _rate(self, theta: Theta, k: Tensor) -> Tensor:
        """Return the rates `[n]` of pairs that come together."""
        lr = number_like(self.lr, k).expand(k.shape[0])
        if not self.normalized:
            return lr
        damping, delta = (
            None if number is None else number_like(number, k).expand_as(lr)
            for number in (self._damping, self.delta_decay)
        )
        assert damping is not None
        return joint_rates(self, theta, k, lr, damping, delta)

    @property
    def _damping(self) -> Number:
        """α times the rule's damping, of a level that is bound."""
        keep, damping = getattr(self.retention, "keep", 1.0), self.rule.steady_gain
        assert not isinstance(damping, Gate)
        return keep * damping

    # -- on tokens ---------------------------------------------------------------------------------------------------

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return self.memory.learned_start(self.features.dim(dim_k), dim_v)

    @property
    def chunk_size(self) -> int:
        return 1 if self.appends else self.chunk

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self.period > 1 and (self.appends or self.write == "chunk"):
            why = "a memory that appends takes every pair" if self.appends else "write='chunk' writes once in a chunk"
            raise FieldError(
                self.label, "period", self.period, f"is not allowed on tokens: {why}; leave one of them out"
            )
        theta = learned or self.memory.start(self.features.dim(dim_k), dim_v, like)
        state = self._begun(theta)
        if self.period > 1:
            state["sum"] = {name: torch.zeros_like(param) for name, param in theta.items()}
        return state

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        q, k = self.features(q), self.features(k)
        before: Theta = state["memory"]
        appended = self.appended(before, k, v)
        if appended is not None:
            return self._answer(appended if self.read == "after" else before, q), {**state, "memory": appended}
        at = self._retained(before) if self.fade == "before" else before
        if self.normalized == "layerwise":
            begun, live = dataclasses.replace(signal, step=signal.step - 1), torch.ones_like(k[:1], dtype=torch.bool)
            (new,) = states_after(self, k[None], v[None], {}, live, {**state, "memory": at}, begun)
            return self._answer(new["memory"] if self.read == "after" else before, q), new
        rate = self._rate(at, k[None])
        surprise = self.gradient(at, k, v) if not self.normalized else self.gradient(at, k[None], v[None], rate)
        new = self.written({**state, "memory": at}, surprise, signal, self.shown(at, k[None], rate))
        return self._answer(new["memory"] if self.read == "after" else before, q), new

    def chunk_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], live: Tensor, state: State, signal: Signal
    ) -> tuple[Tensor, State]:
        whole = bind(self, gates)  # its numbers are those of all tokens, [C]
        q, k = (self._features_of(x, gates) for x in (q, k))
        at: Theta = state["memory"]
        if self.normalized == "layerwise" and self.write == "token":
            states = states_after(self, k, v, gates, live, state, signal)
            seen = {"after": states, "before": [state, *states[:-1]], "chunk": [state] * len(k)}[self.read]
            theta = tree_map(lambda *each: torch.stack(each), *(s["memory"] for s in seen))
            return vmap(lambda th, q, gates: bind(self, gates)._answer(th, q))(theta, q, dict(gates)), states[-1]
        rate = self._of_tokens(whole.lr, k) * live
        if self.normalized:
            k = k * live[:, None]
            delta = None if whole.delta_decay is None else self._of_tokens(whole.delta_decay, k)
            rate = joint_rates(self, at, k, rate, self._of_tokens(whole._damping, k), delta)
        if self.write == "chunk":
            return self._chunk_at_once(q, k, v, rate, gates, live, state, signal)
        each = vmap(lambda k, v, r: self.gradient(at, k[None], v[None], r[None]))(k, v, rate)
        answers, now = [], state
        for t in range(len(k)):
            level = bind(self, {path: gate[t] for path, gate in gates.items()})
            one = dataclasses.replace(signal, step=(signal.step + live[: t + 1].sum()).clamp_min(1))
            surprise = {name: g[t] for name, g in each.items()}
            new = level.written(now, surprise, one, level.shown(at, k[t : t + 1], rate[t : t + 1]))
            new = tree_map(lambda new, old: torch.where(live[t], new, old), new, now)  # noqa: B023
            answers.append(
                level._answer({"after": new["memory"], "before": now["memory"], "chunk": at}[self.read], q[t])
            )
            now = new
        return torch.stack(answers), now

    def _chunk_at_once(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        rate: Tensor,
        gates: Mapping[str, Tensor],
        live: Tensor,
        state: State,
        signal: Signal,
    ) -> tuple[Tensor, State]:
        """One step on the sum of a chunk's gradients, at its last token, whose gates it takes."""
        last = bind(self, {path: gate[-1] for path, gate in gates.items()})
        at, now, is_over = state["memory"], state, len(k) == self.chunk
        if is_over:
            once = dataclasses.replace(signal, step=signal.step // self.chunk + 1)
            new = last.written(state, self.gradient(at, k, v, rate), once, self.shown(at, k, rate))
            now = tree_map(lambda new, old: torch.where(live.any(), new, old), new, state)
        answers = vmap(lambda q, gates: bind(self, gates)._answer(at, q))(q, dict(gates))
        if self.read == "after" and is_over:
            answers = torch.cat([answers[:-1], last._answer(now["memory"], q[-1])[None]])
        return answers, now

    def _features_of(self, x: Tensor, gates: Mapping[str, Tensor]) -> Tensor:
        """Return the features of keys or queries `[C, D]` of tokens with these gates `[C]`."""
        own = {path.removeprefix("features."): gate for path, gate in gates.items() if path.startswith("features.")}
        if not own:
            return self.features(x)
        return vmap(lambda x, now: bind(self.features, now)(x))(x, own)

    @staticmethod
    def _of_tokens(value: Number, like: Tensor) -> Tensor:
        """Return a number of the level for each of the tokens `like` `[C, D]`."""
        return number_like(value, like).expand(len(like))

    def written(self, state: State, surprise: Theta, signal: Signal, shown: Shown | None) -> State:
        """Return the state after a write of `surprise`, which this level's clock may put off."""
        if self.period == 1:
            theta, rules = self.learn(state["memory"], state["rule"], surprise, signal, shown)
            return {"memory": theta, "rule": rules}
        surprise = tree_map(torch.add, surprise, state["sum"])
        seen = surprise if self.clock == "sum" else tree_map(lambda s: s / self.period, surprise)
        theta, rules = self.learn(state["memory"], state["rule"], seen, signal.every(self.period), shown)
        now = due(signal.step, self.period)
        theta, rules = (
            tree_map(lambda new, old: where(now, new, old), written, kept)
            for written, kept in ((theta, state["memory"]), (rules, state["rule"]))
        )
        left = tree_map(lambda s: where(now, torch.zeros_like(s), s), surprise)
        return {"memory": theta, "rule": rules, "sum": left}

    def _answer(self, theta: Theta, q: Tensor) -> Tensor:
        if self.memory.linear:
            return self.memory.read({name: self.output(param) for name, param in theta.items()}, q)
        return self.output(self.memory.read(theta, q))

    def error(self, theta: Theta, k: Tensor, v: Tensor) -> Tensor:
        """Return what M(φ(k)) is off v."""
        return self.memory.read(theta, self.features(k)) - v

    # -- for describe ------------------------------------------------------------------------------------------------

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        every = period * self.period
        words = {"memory": self.memory.label, "objective": self.objective.label}
        if self.appends:
            return [Node(name, every, after, memory=self.memory.label, objective="softmax regression", rule="append")]
        rule = self.rule.nodes(f"{name}.rule", every, after)
        if isinstance(self.rule, Gd) and self.rule.period == 1:
            rule = []  # it remembers nothing
        return [*rule, Node(name, every, tuple(node.name for node in rule) or after, **words, rule=self.rule.label)]
