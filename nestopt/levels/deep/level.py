"""Deep memories as presets: TTT, Titans, deep linear attention, those of Miras, and Atlas."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from nestopt.core.associative import AssociativeMemory
from nestopt.core.features import Features, Polynomial
from nestopt.core.level import Level
from nestopt.core.memories import Memory, Mlp
from nestopt.core.objectives import L2, Dot, Huber, Lp, Objective
from nestopt.core.part import Gate, Number
from nestopt.core.retentions import Decay, Kl, Lq, Retention
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.gradient.muon import Muon


class Ttt(AssociativeMemory):
    r"""Test-time training (Sun et al. 2024): an MLP memory of regressions.

    $$\theta_t = \theta_{t-1} - \eta_t\nabla\ell(\theta_{\mathrm{chunk}}), \qquad y_t = M(q_t; \theta_t)$$

    Layers L2-normalise queries and keys for it and learn θ's start. Arguments: `associative_memory`; here `lr` is the
    layerwise step's η̃, a gate in (0, 1) starting at ½, `chunk` is 64, and the memory has no residual.
    `normalized=False` is the equation's letter, where lr is η itself and small numbers are needed.
    """

    qk_norm: ClassVar[bool] = True

    former_defaults: ClassVar[Mapping[str, Any]] = {
        "forget": "all",
        "memory": "mlp",
        "chunk": 16,
        "normalized": True,
    }

    memory: Memory = dataclasses.field(default_factory=lambda: Mlp(residual=False))
    objective: Objective = dataclasses.field(default_factory=L2)
    lr: Number = Gate(0.5)
    chunk: int = 64
    normalized: bool | Literal["layerwise"] = "layerwise"


class Titans(Ttt):
    r"""Titans (Behrouz et al. 2025): an MLP memory of regressions with momentum and forgetting.

    $$S_t = \theta_t S_{t-1} + \eta_t\nabla\ell(M_{\mathrm{chunk}}), \qquad M_t = \alpha_t M_{t-1} - S_t$$

    The momentum is its rule, and any level will do in its place:
    `titans(rule=adam(), step_size=0.01, normalized=False)`. With `rule=dgd(of=momentum(...))` it is the write of
    self-modifying Titans (eq. 88). Arguments: `associative_memory`; `lr` is the layerwise step's η̃ (a gate starting at
    ½), which adds S with 1 - θ; the retention's `keep` is α (0.999), of W1 alone (`forget="outer"`), the rule's `beta`
    θ (0.1), `chunk` is 64, and the memory has no residual. Layers L2-normalise queries and keys for it and learn the
    memory's start.
    """

    former_defaults: ClassVar[Mapping[str, Any]] = {
        **Ttt.former_defaults,
        "rule": {"level": "momentum", "beta": {"gate": 0.5}},
        "retention": {"retention": "decay", "keep": {"gate": 0.99}},
    }

    rule: Level = dataclasses.field(default_factory=lambda: Momentum(Gate(0.1)))
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.999)))
    forget: Literal["all", "outer"] = "outer"


class Dla(Titans):
    r"""Deep linear attention (Behrouz et al. 2025): an MLP memory of dot products with momentum and forgetting.

    $$S_t = \theta_t S_{t-1} - \eta_t\nabla\langle M(k_t), v_t\rangle, \qquad M_t = \alpha_t M_{t-1} - S_t$$

    As `titans`. An inner product has no minimum: what holds the memory is its forgetting.
    """

    objective: Objective = dataclasses.field(default_factory=Dot)


def _of_miras() -> Memory:
    return Mlp(activation="gelu", norm="layer")


class Yaad(Ttt):
    r"""Yaad (Miras, Behrouz et al. 2504.13173): an MLP memory of regressions that long errors move no further.

    $$W_t = \alpha_t W_{t-1} - \eta_t\nabla\begin{cases}\tfrac12\lVert e_t\rVert^2 & \lVert e_t\rVert\le\delta\\
      \delta\lVert e_t\rVert & \text{else}\end{cases}, \qquad e_t = M(k_t) - v_t, \qquad
      M(x) = x + \mathrm{LN}(W_1\sigma(W_2 x))$$

    As `ttt`, with δ the objective's `delta` (4) and α the retention's `keep`, a gate that starts at 0.999, of W1 alone
    (`forget="outer"`); `lr` is the share of the normalised step. `huber` has two more ways to cut errors, by entries
    and the paper's. The equation's letter: `normalized=False, forget="all", chunk=1`.
    """

    former_defaults: ClassVar[Mapping[str, Any]] = {}

    memory: Memory = dataclasses.field(default_factory=_of_miras)
    objective: Objective = dataclasses.field(default_factory=lambda: Huber(4.0, "norm"))
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.999)))
    forget: Literal["all", "outer"] = "outer"
    normalized: bool | Literal["layerwise"] = True


class Moneta(Ttt):
    r"""Moneta (Miras, Behrouz et al. 2504.13173): an MLP memory of p-th powers, held by a q-norm.

    $$A_t = \alpha_t A_{t-1} - \eta_t\nabla\tfrac1p\lVert M(k_t; W_{t-1}) - v_t\rVert_p^p, \qquad
      W_t = A_t / \lVert A_t\rVert_q^{q-2}, \qquad M(x) = x + \mathrm{LN}(W_1\sigma(W_2 x))$$

    p is 3 and q 4 (`objective`, `retention`). One step a `chunk` of 16 tokens, on their sum, as long as the normalised
    step allows; the equation's letter: `normalized=False, chunk=1`. Layers learn where A starts. Arguments:
    `associative_memory`; `lr` is η, the retention's `keep` α, gates that start at ½ and 0.999.
    """

    former_defaults: ClassVar[Mapping[str, Any]] = {}

    memory: Memory = dataclasses.field(default_factory=_of_miras)
    objective: Objective = dataclasses.field(default_factory=lambda: Lp(3.0))
    retention: Retention = dataclasses.field(default_factory=lambda: Lq(Gate(0.999)))
    chunk: int = 16
    write: Literal["token", "chunk"] = "chunk"
    normalized: bool | Literal["layerwise"] = True


class Memora(Moneta):
    r"""Memora (Miras, Behrouz et al. 2504.13173): an MLP memory of regressions whose weights are distributions.

    $$W_t = c\,\mathrm{softmax}\big(\alpha_t\log W_{t-1} - \eta_t\nabla\tfrac12\lVert M(k_t; W_{t-1}) -
      v_t\rVert^2\big), \qquad M(x) = x + \mathrm{LN}(W_1\sigma(W_2 x))$$

    of each row. As `moneta`; c is the retention's `scale`, 1. Layers learn where log W starts (`kl`).
    """

    objective: Objective = dataclasses.field(default_factory=L2)
    retention: Retention = dataclasses.field(default_factory=lambda: Kl(Gate(0.999)))


class Atlas(Titans):
    r"""Atlas (Behrouz et al. 2505.23735): an MLP memory of regressions on polynomial features, written by Muon.

    $$S_t = \theta S_{t-1} + \nabla\sum_{i \in \mathrm{window}} \gamma_i\tfrac12\lVert M(\phi(k_i)) - v_i\rVert^2,
      \qquad W_t = \alpha_t W_{t-1} - \eta_t\,\mathrm{NewtonSchulz}(S_t), \qquad y_t = M(\phi(q_t))$$

    The windows are the chunks of 16 tokens, one after the other (`write="chunk"`), so that one orthogonalisation serves
    a chunk. φ are all products of two entries. Arguments: `associative_memory`; `lr` is γ, `step_size` η, the
    retention's `keep` α: gates that start at ½, 0.05 and 0.99 (a chunk); the rule's `beta` is θ, and the memory has 64
    hidden units, since W2 has a column for each feature. Layers L2-normalise queries and keys and learn the memory's
    start.
    """

    former_defaults: ClassVar[Mapping[str, Any]] = {}

    memory: Memory = dataclasses.field(default_factory=lambda: Mlp(64, residual=False))
    rule: Level = dataclasses.field(default_factory=lambda: Muon(0.9, form="standard"))
    retention: Retention = dataclasses.field(default_factory=lambda: Decay(Gate(0.99)))
    forget: Literal["all", "outer"] = "all"
    features: Features = dataclasses.field(default_factory=Polynomial)
    step_size: Number = Gate(0.05)
    chunk: int = 16
    write: Literal["token", "chunk"] = "chunk"
    normalized: bool | Literal["layerwise"] = False
