"""Self-modifying Titans: memories that make the keys, the values and the learning rates that all of them learn with."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.device import number_like
from nestopt.core.level import Level
from nestopt.core.memories import Mlp, Theta, rows
from nestopt.core.order import Node
from nestopt.core.part import FieldError, Number, nearest
from nestopt.core.pending import PENDING
from nestopt.core.signal import Signal
from nestopt.core.tree import State, nested, tree_map
from nestopt.levels.deep.step_size import bounded
from nestopt.levels.self_modifying.writes import OBJECTIVES, in_turn, together

ADAPTIVE = ("k", "v", "q", "eta", "alpha")
"""What a memory can make, in the order of the kernel."""

_GOLDEN = math.pi * (3 - math.sqrt(5))
"""An angle whose multiples never come near each other soon."""

GATES = ("eta", "alpha")


class SelfModifying(Level):
    r"""Self-modifying Titans (NL eq. 83-91): memories that learn what they are to learn, and how fast.

    Of a token's query, key and value $q, k, v$ the memories $M(x) = x + W_1\sigma(W_2 x)$, one each, make

    $$k_t = \frac{M_k(k)}{\lVert\cdot\rVert},\quad v_t = M_v(v),\quad q_t = \frac{q}{\lVert q\rVert},\quad
      \eta_t = \sigma(w_\eta\cdot M_\eta(k) + b_\eta),\quad \alpha_t = \sigma(w_\alpha\cdot M_\alpha(k) + b_\alpha)$$

    and all of them learn the pair $k_t \to \hat v = M(v_t)$, each its own $\hat v$, by delta gradient descent:

    $$S_t = \theta_t S_{t-1} + \eta_t\nabla_W\tfrac12\lVert M(k_t) - \hat v\rVert^2, \qquad
      W_t = \alpha_t W_{t-1} - \delta\eta_t (W_{t-1}a_t)a_t^\top - S_t, \qquad y_t = M_{\mathrm{memory}}(q_t)$$

    Reads, values and gradients are of the weights that the present chunk began with (eq. 90). A value is a constant to
    the inner gradient, not to the outer. On gradients the rows, of length 1, are queries, keys and values, written
    together; the direction is the answers at the rows, as long as these were. Every W1 is 0 there at first, so that the
    first direction is the gradient.

    Layers L2-normalise queries and keys for it, learn where the memories start, and learn w and b, one per head.

    Args:
        memory: one memory. `Mlp(depth=1, residual=False)` is a matrix (eq. 93). Without a residual it is for tokens
            only.
        adaptive: which of `k`, `v`, `q`, `eta`, `alpha` have a memory; for the others M(x) = x.
        objective: ℓ of all: `"l2"`, or `"dot"`, minus the product of M(k) and v̂ (eq. 92), which the delta decay holds.
        momentum: θ in [0, 1); None, the default, is none. A `Gate` makes it one per token and head.
        delta: δ >= 0, the strength of the delta decay.
        lr: η at the start, in (0, 1).
        keep: α at the start, in (0, 1). Near 1: where more is forgotten than written, weights end at 0, and there a
            memory of two layers learns no more. With the delta decay and values as short as keys, 0.99 is too little.
        eta_max: multiplies η where `normalized=False`.
        normalized: take η as the share of the greatest step that does not overshoot
            (`nestopt.levels.deep.step_size`), and values that are bounded by what they are made of
            (`nestopt.levels.deep.step_size.bounded`), so that the memories do not diverge. `"layerwise"`: the step that
            `titans` has by default, with such values; give `delta=0.0` with it, on tokens. False is the letter of the
            equations.
        bound: of the normalised step, in (0, 2); also 2 where memories have one layer, whose eigenvalues then reach -α,
            as tracking a state takes.
        chunk: tokens between new weights of `memory`, on tokens.
        projection_chunk: likewise of the other memories. One of the two must divide the other.

    Raises:
        FieldError: for a value that is not allowed.
    """

    qk_norm: ClassVar[bool] = True
    owns_partial_chunk: ClassVar[bool] = True
    constant_keys: ClassVar[tuple[str, ...]] = ("readout",)

    memory: Mlp = dataclasses.field(default_factory=Mlp)
    adaptive: tuple[str, ...] = ("k", "v", "eta", "alpha")
    momentum: Number | None = None
    delta: float = 1.0
    lr: float = 0.5
    keep: float = 0.999
    eta_max: float = 1.0
    normalized: bool | Literal["layerwise"] = True
    bound: float = 1.0
    chunk: int = 16
    projection_chunk: int = 64
    objective: Literal["l2", "dot"] = "l2"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_adaptive()
        self.check_choice("objective", tuple(OBJECTIVES))
        if not (isinstance(self.memory, Mlp) and self.memory.by_hand):
            problem = "is not allowed; give an mlp without biases (depth 1 without residual is a matrix)"
            raise FieldError(self.label, "memory", self.memory, problem)
        if self.momentum is not None:
            self.check("momentum", 0.0, 1.0, closed="[)")
        self.check("delta", 0.0, closed="[)")
        self.check("lr", 0.0, 1.0, closed="()")
        self.check("keep", 0.0, 1.0, closed="()")
        self.check("eta_max", 0.0, closed="()")
        self.check("bound", 0.0, 2.0, closed="(]" if self.memory.depth == 1 else "()")
        self.check_choice("normalized", (False, True, "layerwise"))
        for key in ("chunk", "projection_chunk"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise FieldError(self.label, key, value, "is not allowed; give a whole number of tokens, 1 or more")
        if self.chunk_size % min(self.chunk, self.projection_chunk):
            problem = f"is not allowed with chunk={self.chunk}: one of them must divide the other"
            raise FieldError(self.label, "projection_chunk", self.projection_chunk, problem)

    def _check_adaptive(self) -> None:
        adaptive: object = self.adaptive
        given = (adaptive,) if isinstance(adaptive, str) else tuple(self.adaptive)
        for name in given:
            if name not in ADAPTIVE or given.count(name) > 1:
                hint = nearest(name, ADAPTIVE) if isinstance(name, str) and name not in ADAPTIVE else ""
                problem = f"is not allowed; give some of {', '.join(ADAPTIVE)}, each once.{hint}"
                raise FieldError(self.label, "adaptive", self.adaptive, problem)
        self.adaptive = tuple(name for name in ADAPTIVE if name in given)

    # -- the memories --------------------------------------------------------------------------------------------------

    @property
    def boxes(self) -> tuple[str, ...]:
        """The names of all memories."""
        return (*self.adaptive, "memory")

    def made(self, weights: Mapping[str, Theta], readout: State, q: Tensor, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """Queries, keys, values `[n, D]` and gates `[n]` of these tokens, by the memories as they are in `weights`."""
        given = {"k": k, "v": v, "q": q, "eta": k, "alpha": k}
        at = {name: self.memory.read(weights[name], x) if name in weights else x for name, x in given.items()}
        eta, alpha = (torch.sigmoid(at[name] @ readout[name]["w"] + readout[name]["b"]) for name in GATES)
        return {
            "q": F.normalize(at["q"], dim=-1),
            "k": F.normalize(at["k"], dim=-1),
            "v": self._bounded(at["v"], v) if "v" in weights else v,
            "lr": eta if self.normalized else self.eta_max * eta,
            "decay": alpha,
        }

    def own_values(self, theta: Theta, v: Tensor) -> Tensor:
        """v̂ of a memory."""
        return self._bounded(self.memory.read(theta, v), v)

    def _bounded(self, y: Tensor, x: Tensor) -> Tensor:
        return bounded(y, x) if self.normalized else y

    def _start(self, weights: Mapping[str, Theta], readout: State) -> State:
        """Return the state of memories with these weights."""
        found: State = {"readout": readout, "projections": {}}
        for name in self.boxes:
            box: State = {"weights": dict(weights[name])}
            if self.momentum is not None:
                box["momentum"] = tree_map(torch.zeros_like, box["weights"])
            if name == "memory":
                found[name] = box
            else:
                found["projections"][name] = box
        return found

    def _readout(self, dim: int, like: Tensor) -> State:
        """w and b of the gates at the start."""
        begins = {"eta": self.lr, "alpha": self.keep}
        # not 0: the memory that is read by it would never learn; and drawn from nothing, so that runs can be repeated
        angles = _GOLDEN * torch.arange(2 * dim, device=like.device, dtype=torch.float64).view(2, dim)
        w = (angles.cos() * math.sqrt(2 / dim)).to(like.dtype)
        return {
            name: {"w": w[i], "b": like.new_full((), math.log(value / (1 - value)))}
            for i, (name, value) in enumerate(begins.items())
        }

    # -- on tokens -----------------------------------------------------------------------------------------------------

    @property
    def chunk_size(self) -> int:
        return max(self.chunk, self.projection_chunk)

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        found = {
            f"{name}.{key}": weight
            for name in self.boxes
            for key, weight in self.memory.learned_start(dim_k, dim_v).items()
        }
        for name, parts in self._readout(dim_k, torch.empty(())).items():
            found |= {f"readout.{name}.{key}": x for key, x in parts.items()}
        return found

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        if self.period > 1:
            problem = "is not allowed on tokens, where chunk and projection_chunk are its clocks; leave it out"
            raise FieldError(self.label, "period", self.period, problem)
        given = nested(learned)
        weights = {name: given.get(name) or self.memory.start(dim_k, dim_v, like) for name in self.boxes}
        state = self._start(weights, given.get("readout") or self._readout(dim_k, like))
        for part in ("memory", *(["projections"] if self.adaptive else [])):
            state[part][PENDING] = self._none(dim_k, like)
        return state

    def _none(self, dim: int, like: Tensor) -> State:
        """No tokens yet."""
        gates = ("lr", "decay", *([] if self.momentum is None else ["momentum"]))
        return {
            "k": like.new_zeros(0, dim),
            "v": like.new_zeros(0, dim),
            "live": torch.zeros(0, dtype=torch.bool, device=like.device),
            **{name: like.new_zeros(0) for name in gates},
        }

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        gates = {} if self.momentum is None else {"momentum": number_like(self.momentum, k)[None]}
        live = torch.ones(1, dtype=torch.bool, device=k.device)
        y, state = self.chunk_step(q[None], k[None], v[None], gates, live, state, signal)
        return y[0], state

    def chunk_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], live: Tensor, state: State, signal: Signal
    ) -> tuple[Tensor, State]:
        answers, first, now = [], 0, dict(state)
        while first < len(q):
            left = [size - now[part][PENDING]["k"].shape[0] for part, size in self._parts()]
            piece = slice(first, first + min(left))
            y, now = self._piece(q[piece], k[piece], v[piece], self._momenta(gates, k)[piece], live[piece], now, signal)
            answers.append(y)
            first += len(y)
        return torch.cat(answers), now

    def token_read(self, q: Tensor, dim_v: int, state: State, signal: Signal) -> Tensor:
        return self._asked(state, q[None])[0]

    def _parts(self) -> list[tuple[str, int]]:
        """Return the parts of a state that have chunks of their own, and their lengths."""
        return [("memory", self.chunk), *([("projections", self.projection_chunk)] if self.adaptive else [])]

    def _momenta(self, gates: Mapping[str, Tensor], like: Tensor) -> Tensor:
        value = gates.get("momentum", 0.0 if self.momentum is None else self.momentum)
        return number_like(value, like).expand(len(like))

    def _weights(self, state: State) -> dict[str, Theta]:
        return {name: state["projections"][name]["weights"] for name in self.adaptive}

    def _asked(self, state: State, q: Tensor) -> Tensor:
        """Return what `memory` answers to q `[n, D]`."""
        if "q" in self.adaptive:
            q = self.memory.read(state["projections"]["q"]["weights"], q)
        return self.memory.read(state["memory"]["weights"], F.normalize(q, dim=-1))

    def _piece(
        self, q: Tensor, k: Tensor, v: Tensor, theta: Tensor, live: Tensor, state: State, signal: Signal
    ) -> tuple[Tensor, State]:
        """Tokens within one chunk of each kind, whose end they may be."""
        made = self.made(self._weights(state), state["readout"], q, k, v)
        y = self.memory.read(state["memory"]["weights"], made.pop("q"))
        # of a token that is not written, gates that do nothing
        gates = {"lr": (made["lr"], 0.0), "decay": (made["decay"], 1.0)}
        gates |= {} if self.momentum is None else {"momentum": (theta, 1.0)}
        idle = {name: torch.where(live, value, nothing) for name, (value, nothing) in gates.items()}
        fresh = {"k": made["k"], "v": made["v"], "live": live, **idle}
        new = dict(state)
        for part, size in self._parts():
            held = tree_map(lambda old, x: torch.cat([old, x.to(old)]), state[part][PENDING], fresh)
            new[part] = {**state[part], PENDING: held}
            if held["k"].shape[0] < size:
                continue
            new[part][PENDING] = tree_map(lambda x: x[:0], held)
            if part == "memory":
                new[part] |= in_turn(self, state[part], held, signal)
            else:
                new[part] |= {name: in_turn(self, state[part][name], held, signal) for name in self.adaptive}
        return y, new

    # -- on gradients --------------------------------------------------------------------------------------------------

    def init(self, param: Tensor) -> State:
        if not self.memory.residual:
            problem = "is not allowed on gradients, where every W1 starts at 0: give a residual"
            raise FieldError(self.label, "memory", self.memory, problem)
        weights = {name: self.memory.start_on(param) for name in self.boxes}
        readout = self._readout(rows(param).shape[1], param)
        # a state of one number and no dimension is taken for a count, which does not follow the parameter's dtype
        return self._start(weights, {name: {**parts, "b": parts["b"][None]} for name, parts in readout.items()})

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        x = rows(grad)
        units = F.normalize(x, dim=-1)
        made = self.made(self._weights(state), state["readout"], units, units, units)
        answers = self.memory.read(state["memory"]["weights"], made["q"])
        direction = (torch.linalg.vector_norm(x, dim=-1, keepdim=True) * answers).reshape(grad.shape)
        new = {
            "readout": state["readout"],
            "projections": {name: together(self, state["projections"][name], made, signal) for name in self.adaptive},
            "memory": together(self, state["memory"], made, signal),
        }
        return direction, new

    # -- for describe --------------------------------------------------------------------------------------------------

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        rule = "dgd" if self.delta else "gd"
        rule = rule if self.momentum is None else f"{rule} of momentum" if self.delta else "momentum"
        words = {"memory": self.memory.label, "objective": self.objective, "rule": rule}
        paths = [*(f"projections.{box}" for box in self.adaptive), "memory"]
        return [Node(f"{name}.{path}", period * self.period, after, **words) for path in paths]
