"""Levels known as layers: presets of the associative memory. On gradients each is the optimizer that its parts make."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory, Gd
from nestopt.core.level import Level
from nestopt.core.memories import Matrix, Memory, Mlp, Theta, Window, rows
from nestopt.core.objectives import L2, Dot, Objective, Oja
from nestopt.core.outputs import Plain
from nestopt.core.part import Channels, FieldError, Gate, Heads, Number
from nestopt.core.retentions import Decay, Retention
from nestopt.core.scale import length, root_mean_square
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.levels.gradient.adam import Adam
from nestopt.levels.gradient.within import warn_of_mode


class Attention(AssociativeMemory):
    r"""Softmax attention: a memory that keeps its pairs (NL eq. 62-63).

    $$y_t = \sum_{s \le t} \mathrm{softmax}_s(k_s^\top q_t/\sqrt{D_k})\, v_s$$

    `memory=window(size=c)` keeps the last c only, which it needs on gradients. Other arguments: `associative_memory`.
    """

    memory: Memory = dataclasses.field(default_factory=Window)


class WindowAttention(Attention):
    """Softmax attention over the last tokens: `attention` with `memory=window(size=128)`. Give another `memory`."""

    memory: Memory = dataclasses.field(default_factory=lambda: Window(128))


LEAST = 1e-6
"""What a normaliser counts as at least: a memory that knows nothing answers 0."""


def divided(y: Tensor) -> Tensor:
    """Divide answers `[.., D_v + 1]` by the last number of each, which is the normaliser: `[.., D_v]`."""
    return y[..., :-1] / y[..., -1:].clamp_min(LEAST)


class LinearAttention(AssociativeMemory):
    r"""Linear attention: a matrix memory of dot products (NL eq. 14-18, 64).

    $$M_t = M_{t-1} + v_t k_t^\top, \qquad y_t = M_t q_t$$

    With a `normalizer` (Katharopoulos et al. 2020) answers are means of values, weighted by the products of features:

    $$z_t = z_{t-1} + \phi(k_t), \qquad y_t = \frac{M_t\,\phi(q_t)}{\max(z_t^\top\phi(q_t),\, 10^{-6})}$$

    z fades and is written as M is, whose last row it is in the state. On gradients, without one, it is momentum (with β
    the retention). Other arguments: `associative_memory`.

    Args:
        normalizer: whether to divide; needs features whose products are not negative, such as `elu`. Default False.
    """

    memory: Memory = dataclasses.field(default_factory=Matrix)
    objective: Objective = dataclasses.field(default_factory=Dot)
    normalizer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.normalizer:
            return
        if not self.features.positive:
            problem = "is not allowed with a normalizer, whose products must not be negative; give elu"
            raise FieldError(self.label, "features", self.features, problem)
        for key, part in (("memory", Matrix), ("objective", Dot), ("rule", Gd), ("output", Plain)):
            if type(getattr(self, key)) is not part:
                problem = "is not allowed with a normalizer, which is of sums of values times keys; leave it out"
                raise FieldError(self.label, key, getattr(self, key), problem)

    def init(self, param: Tensor) -> State:
        if self.normalizer:
            raise FieldError(self.label, "normalizer", True, "is for tokens, not for gradients; leave it out")
        return super().init(param)

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        return super().init_tokens(dim_k, dim_v + self.normalizer, like, learned)

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return super().token_step(q, k, self._with_one(v), state, signal)

    def chunk_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], live: Tensor, state: State, signal: Signal
    ) -> tuple[Tensor, State]:
        return super().chunk_step(q, k, self._with_one(v), gates, live, state, signal)

    def _with_one(self, v: Tensor) -> Tensor:
        return torch.cat([v, torch.ones_like(v[..., :1])], dim=-1) if self.normalizer else v

    def _answer(self, theta: Theta, q: Tensor) -> Tensor:
        y = super()._answer(theta, q)
        return divided(y) if self.normalizer else y

    def error(self, theta: Theta, k: Tensor, v: Tensor) -> Tensor:
        return self._answer(theta, self.features(k)) - v if self.normalizer else super().error(theta, k, v)


class Retnet(LinearAttention):
    r"""RetNet (Sun et al. 2023): linear attention with a fixed decay per head (NL eq. 64).

    $$M_t = \gamma_h M_{t-1} + v_t k_t^\top, \qquad y_t = M_t q_t, \qquad \gamma_h = 1 - 2^{-5-h}$$

    Layers L2-normalise queries and keys for it. Other arguments: `associative_memory`.
    """

    qk_norm: ClassVar[bool] = True

    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Heads(1 - 2**-5)))


class GatedLinear(LinearAttention):
    r"""Gated linear attention: a matrix memory of dot products that the data fade (NL eq. 64).

    $$M_t = \alpha_t M_{t-1} + v_t k_t^\top, \qquad y_t = M_t q_t$$

    One α per token and head (as in Mamba-2), a gate that starts at 0.97; `gla` has one for each channel of the keys.
    Layers L2-normalise queries and keys for it. Other arguments: `associative_memory`.
    """

    qk_norm: ClassVar[bool] = True

    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.97)))


class Gla(GatedLinear):
    r"""GLA (Yang et al. 2023): gated linear attention with a decay for each channel of the keys.

    $$M_t = M_{t-1}\,\mathrm{Diag}(\alpha_t) + v_t k_t^\top, \qquad y_t = M_t q_t$$

    α `[D_k]` per token and head, a gate that starts at 0.97. Layers L2-normalise queries and keys for it. Other
    arguments: `associative_memory`.
    """

    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Channels(0.97)))


class Deltanet(AssociativeMemory):
    r"""DeltaNet: a matrix memory of regressions (NL eq. 65).

    $$M_t = M_{t-1}(I - \eta_t k_t k_t^\top) + \eta_t v_t k_t^\top, \qquad y_t = M_t q_t$$

    Layers L2-normalise queries and keys for it. Arguments: `associative_memory`; `lr` is η, a gate in (0, 1) that
    starts at ½; `lr=Gate(0.5, 0, 2)` lets eigenvalues reach -1, which tracking a state needs.
    """

    qk_norm: ClassVar[bool] = True

    memory: Memory = dataclasses.field(default_factory=Matrix)
    objective: Objective = dataclasses.field(default_factory=L2)
    lr: Number = Gate(0.5)


class GatedDeltanet(Deltanet):
    r"""Gated DeltaNet (Yang et al. 2024): a matrix memory of regressions that first fades (NL eq. 65).

    $$M_t = \alpha_t M_{t-1}(I - \eta_t k_t k_t^\top) + \eta_t v_t k_t^\top, \qquad y_t = M_t q_t$$

    As `deltanet`; α, the retention's `keep`, is a gate that starts at 0.97. `fade="with"` takes the error of the memory
    as it was.
    """

    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.97)))
    fade: Literal["with", "before"] = "before"


class Kda(GatedDeltanet):
    r"""Kimi delta attention (Kimi Team 2025): gated DeltaNet with a decay for each channel of the keys.

    $$M_t = M_{t-1}\,\mathrm{Diag}(\alpha_t)(I - \eta_t k_t k_t^\top) + \eta_t v_t k_t^\top, \qquad y_t = M_t q_t$$

    As `gated_deltanet`, with α `[D_k]` per token and head, a gate that starts at 0.97.
    """

    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Channels(0.97)))


class OjaMemory(AssociativeMemory):
    r"""Oja's rule (NL eq. 66-67): a matrix memory of dot products whose growth along each value is held back.

    $$M_t = M_{t-1} + \eta_t v_t (k_t - M_{t-1}^\top v_t)^\top, \qquad y_t = M_t q_t$$

    Layers L2-normalise queries, keys and values for it: it is stable for η‖v‖² <= 2. Arguments: `associative_memory`;
    `lr` is η, a gate in (0, 1) that starts at ½.
    """

    qk_norm: ClassVar[bool] = True
    v_norm: ClassVar[bool] = True

    memory: Memory = dataclasses.field(default_factory=Matrix)
    objective: Objective = dataclasses.field(default_factory=Oja)
    lr: Number = Gate(0.5)


class DeepMomentum(AssociativeMemory):
    r"""Deep momentum (DMGD, NL eq. 50): an average of gradients, and an MLP that learns what it tells of the next one.

    $$\theta \leftarrow \beta'\theta - \mathrm{rule}\big(\nabla_\theta
      \tfrac12\lVert k + m(k;\theta) - g/s\rVert^2\big),\quad k = M/s \;\text{by row}; \qquad
      M \leftarrow \beta M + (1-\beta) g$$

    $$u = \rho\,(k + m(k;\theta)), \quad k = M/s, \qquad \rho:\; \lVert u\rVert_F = \lVert M\rVert_F,
      \qquad s = \max(\mathrm{rms}(M), \mathrm{rms}(g)/10)$$

    A memory of keys must be asked for what its key does not say: the next gradient, of which the average M knows only
    the mean. W1 starts at 0: the level starts as `momentum(β, dampening=β)`, and keeps its length. Convention: an
    average, of the gradient's own size; 1/(1-β) times the learning rate of `momentum` serves. State: beside M, with
    the default Adam as rule and min(rows, columns) hidden units, at most 6 numbers per entry of a matrix; with half as
    many, half.

    `mode="paper"` has no M; the MLP answers each row û of the unit-RMS gradient with itself, and
    $u = \mathrm{rms}(g)\, m(\hat u; \theta)$. A perfect one is gradient descent, and it starts at 0.

    Arguments: `associative_memory`; `retention` is β'.

    Args:
        beta: β in [0, 1), of the average. Default 0.9.
        mode: `"next"` (default) or `"paper"`.
    """

    former_defaults: ClassVar[Mapping[str, Any]] = {"mode": "paper", "step_size": 0.02, "beta": 0.9}
    momentum_field: ClassVar[str | None] = "beta"

    memory: Memory = dataclasses.field(default_factory=lambda: Mlp(residual=False))
    objective: Objective = dataclasses.field(default_factory=L2)
    rule: Level = dataclasses.field(default_factory=lambda: Adam((0.9, 0.99)))
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(0.999))
    step_size: Number = 0.001
    beta: float = 0.9
    mode: Literal["next", "paper"] = "next"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0, closed="[)")
        self.check_choice("mode", ("next", "paper"))
        if self.mode == "paper":
            warn_of_mode(self, "a memory that answers gradients with themselves, gradient descent at best")

    def init(self, param: Tensor) -> State:
        state = super().init(param)
        return state if self.mode == "paper" else {**state, "average": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        if self.mode == "paper":
            return super().step(grad, state, signal)
        theta, average, least = state["memory"], state["average"], root_mean_square(grad) / 10
        scale = torch.maximum(root_mean_square(average), least)
        k, v = rows(average) / scale, rows(grad - average) / scale
        signal.report("inner_loss", lambda: self.objective.loss(self.memory, theta, k, v) / len(v))
        theta, rules = self.learn(theta, state["rule"], self.gradient(theta, k, v), signal)
        average = torch.lerp(average, grad, 1 - self.beta)
        scale = torch.maximum(root_mean_square(average), least)
        k = rows(average) / scale
        read = self.output(k + self.memory.read(theta, k))
        read = read * (length(k) / length(read))
        return (read * scale).reshape(grad.shape), {"memory": theta, "rule": rules, "average": average}
