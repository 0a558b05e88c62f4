"""Slow twins of the operations on tokens: loops over tokens written from the equations, and the cases to compare."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nestopt.ops import delta_rule, linear_attention, oja, omega, rank_one

F64 = torch.float64


def _gates(q: Tensor, **gates: Any) -> list[Tensor]:
    """Each gate `[B, T, H, 1, 1]` in the dtype of q, or by channel `[B, T, H, 1, D_k]`; None is 1."""
    ones = torch.ones(q.shape[:3], dtype=q.dtype)
    return [
        gate[..., None, :]
        if isinstance(gate, Tensor) and gate.ndim == 4
        else (ones * (1.0 if gate is None else gate))[..., None, None]
        for gate in gates.values()
    ]


def outer(v: Tensor, k: Tensor) -> Tensor:
    return v[..., :, None] * k[..., None, :]


def recall(m: Tensor, q: Tensor) -> Tensor:
    return (m @ q[..., None])[..., 0]


def zeros(q: Tensor, v: Tensor) -> Tensor:
    return torch.zeros(q.shape[0], q.shape[2], v.shape[-1], q.shape[-1], dtype=q.dtype)


def loop_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, decay: Any = None, state: Any = None, read: str = "after"
) -> tuple[Tensor, Tensor]:
    """M_t = a_t M_{t-1} + v_t k_tᵀ."""
    (a,) = _gates(q, decay=decay)
    m, ys = zeros(q, v) if state is None else state, []
    for t in range(q.shape[1]):
        new = a[:, t] * m + outer(v[:, t], k[:, t])
        ys.append(recall(new if read == "after" else m, q[:, t]))
        m = new
    return torch.stack(ys, 1), m


def loop_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: Any,
    decay: Any = None,
    momentum: Any = None,
    state: Any = None,
    read: str = "after",
    decay_first: bool = True,
) -> tuple[Tensor, Any]:
    """M_t = α_t M_{t-1} (I - η_t k_t k_tᵀ) + η_t v_t k_tᵀ; M_{t-1} (α_t I - η_t k_t k_tᵀ) + ..; or with momentum."""
    a, eta, theta = _gates(q, decay=decay, lr=lr, momentum=momentum)
    m = zeros(q, v) if state is None else state if momentum is None else state["memory"]
    s = zeros(q, v) if state is None or momentum is None else state["momentum"]
    eye, ys = torch.eye(q.shape[-1], dtype=q.dtype), []
    for t in range(q.shape[1]):
        write = eta[:, t] * outer(v[:, t], k[:, t])
        turn = eta[:, t] * outer(k[:, t], k[:, t])
        if momentum is None:
            new = (a[:, t] * m @ (eye - turn) if decay_first else a[:, t] * m - m @ turn) + write
        else:
            s = theta[:, t] * s + (a[:, t] * m if decay_first else m) @ turn - write
            new = a[:, t] * m - s
        ys.append(recall(new if read == "after" else m, q[:, t]))
        m = new
    return torch.stack(ys, 1), m if momentum is None else {"memory": m, "momentum": s}


def loop_rank_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ask: Tensor,
    along: Tensor,
    decay: Any = None,
    state: Any = None,
    read: str = "after",
) -> tuple[Tensor, Tensor]:
    """M_t = M_{t-1} (Diag(α_t) - a_t b_tᵀ) + v_t k_tᵀ."""
    (a,) = _gates(q, decay=decay)
    m, ys = zeros(q, v) if state is None else state, []
    for t in range(q.shape[1]):
        new = m * a[:, t] - m @ outer(ask[:, t], along[:, t]) + outer(v[:, t], k[:, t])
        ys.append(recall(new if read == "after" else m, q[:, t]))
        m = new
    return torch.stack(ys, 1), m


def loop_oja(
    q: Tensor, k: Tensor, v: Tensor, *, lr: Any, decay: Any = None, state: Any = None, read: str = "after"
) -> tuple[Tensor, Tensor]:
    """M_t = α_t M_{t-1} + η_t v_t (k_t - M_{t-1}ᵀ v_t)ᵀ."""
    a, eta = _gates(q, decay=decay, lr=lr)
    m, ys = zeros(q, v) if state is None else state, []
    for t in range(q.shape[1]):
        new = a[:, t] * m + eta[:, t] * outer(v[:, t], k[:, t] - recall(m.mT, v[:, t]))
        ys.append(recall(new if read == "after" else m, q[:, t]))
        m = new
    return torch.stack(ys, 1), m


def loop_omega(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    lr: Any,
    window: int,
    weights: Any = None,
    decay: Any = None,
    state: Any = None,
    read: str = "after",
) -> tuple[Tensor, dict[str, Tensor]]:
    """M_t = α_t M_{t-1} - η_t Σ_j w_j (M_{t-1} k_{t-j} - v_{t-j}) k_{t-j}ᵀ."""
    a, eta = _gates(q, decay=decay, lr=lr)
    m, ys = zeros(q, v) if state is None else state["memory"], []
    pairs = [] if state is None else list(zip(state["keys"].unbind(2), state["values"].unbind(2), strict=True))
    for t in range(q.shape[1]):
        pairs.append((k[:, t], v[:, t]))
        step = torch.zeros_like(m)
        for j, (key, value) in enumerate(reversed(pairs[-window:])):
            w = 1.0 if weights is None else weights[j] if isinstance(weights, Tensor) else weights**j
            step = step + w * outer(recall(m, key) - value, key)
        new = a[:, t] * m - eta[:, t] * step
        ys.append(recall(new if read == "after" else m, q[:, t]))
        m = new
    kept = pairs[len(pairs) - min(window - 1, len(pairs)) :]
    keys, values = (
        torch.stack([pair[i] for pair in kept], 2) if kept else x[:, :0].transpose(1, 2) for i, x in ((0, k), (1, v))
    )
    return torch.stack(ys, 1), {"memory": m, "keys": keys, "values": values}


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation with its settings, and its twin with the same."""

    fast: Callable[..., tuple[Tensor, Any]]
    slow: Callable[..., tuple[Tensor, Any]]
    gates: tuple[str, ...]
    settings: dict[str, Any]
    state: tuple[str, ...] = ()  # the names in it; none where it is one memory
    by_channel: bool = False
    keys: tuple[str, ...] = ()  # further arguments like k

    @property
    def by_token(self) -> tuple[str, ...]:
        """The arguments that have something for each token."""
        return (*"qkv", *self.keys, *self.gates)

    def inputs(self, batch: int, length: int, heads: int = 2, dim_k: int = 3, dim_v: int = 4) -> dict[str, Any]:
        """Random queries, keys and values (of length 1, so that no memory explodes) and gates, in float64."""
        q, k, v = (torch.randn(batch, length, heads, dim, dtype=F64) for dim in (dim_k, dim_k, dim_v))
        k, v = (x / x.norm(dim=-1, keepdim=True) for x in (k, v))
        made = {"q": q, "k": k, "v": v}
        for name in self.keys:
            key = torch.randn(batch, length, heads, dim_k, dtype=F64)
            made[name] = key / key.norm(dim=-1, keepdim=True) * 0.7
        for name in self.gates:
            shape = (batch, length, heads, *((dim_k,) if name == "decay" and self.by_channel else ()))
            made[name] = torch.rand(shape, dtype=F64) * (0.9 if name == "decay" else 0.6) + 0.1
        if "weights" in self.settings and isinstance(self.settings["weights"], Tensor):
            made["weights"] = self.settings["weights"].clone()
        return made

    def start(self, batch: int, heads: int = 2, dim_k: int = 3, dim_v: int = 4) -> Any:
        """A random state."""
        pairs = self.settings.get("window", 1) - 1
        shapes = {"keys": (pairs, dim_k), "values": (pairs, dim_v)}
        made = {
            name: torch.randn(batch, heads, *shapes.get(name, (dim_v, dim_k)), dtype=F64) / 2
            for name in self.state or ("memory",)
        }
        return made if self.state else made["memory"]

    def run(self, how: str, inputs: dict[str, Any], **arguments: Any) -> tuple[Tensor, Any]:
        return {"fast": self.fast, "slow": self.slow}[how](**{**self.settings, **inputs, **arguments})


def _case(
    fast: Callable[..., Any],
    slow: Callable[..., Any],
    *gates: str,
    state: tuple[str, ...] = (),
    by_channel: bool = False,
    keys: tuple[str, ...] = (),
    **settings: Any,
) -> Case:
    return Case(fast, slow, gates, settings, state, by_channel, keys)


_delta = functools.partial(_case, delta_rule, loop_delta_rule, "lr")
_omega = functools.partial(_case, omega, loop_omega, "lr", state=("memory", "keys", "values"))
_both = ("memory", "momentum")

CASES: dict[str, Case] = {
    "linear attention": _case(linear_attention, loop_linear_attention),
    "linear attention, decay": _case(linear_attention, loop_linear_attention, "decay"),
    "linear attention, decay, before": _case(linear_attention, loop_linear_attention, "decay", read="before"),
    "linear attention, channels": _case(linear_attention, loop_linear_attention, "decay", by_channel=True),
    "linear attention, channels, before": _case(
        linear_attention, loop_linear_attention, "decay", by_channel=True, read="before"
    ),
    "delta": _delta(),
    "delta, before": _delta(read="before"),
    "delta, decay": _delta("decay"),
    "delta, decay last, before": _delta("decay", decay_first=False, read="before"),
    "delta, decay last": _delta("decay", decay_first=False),
    "delta, channels": _delta("decay", by_channel=True),
    "delta, channels, decay last, before": _delta("decay", by_channel=True, decay_first=False, read="before"),
    "delta, momentum": _delta("momentum", state=_both),
    "delta, momentum, decay": _delta("momentum", "decay", state=_both),
    "delta, momentum, decay last, before": _delta("momentum", "decay", decay_first=False, read="before", state=_both),
    "rank one": _case(rank_one, loop_rank_one, "decay", keys=("ask", "along")),
    "rank one, channels": _case(rank_one, loop_rank_one, "decay", keys=("ask", "along"), by_channel=True),
    "rank one, channels, before": _case(
        rank_one, loop_rank_one, "decay", keys=("ask", "along"), by_channel=True, read="before"
    ),
    "oja": _case(oja, loop_oja, "lr"),
    "oja, decay": _case(oja, loop_oja, "lr", "decay"),
    "oja, decay, before": _case(oja, loop_oja, "lr", "decay", read="before"),
    "omega": _omega(window=2),
    "omega, decay, powers": _omega("decay", window=3, weights=0.5),
    "omega, decay, weights, before": _omega(
        "decay", window=3, weights=torch.tensor([1.0, 0.3, 0.7], dtype=F64), read="before"
    ),
}


def leaves(tree: Any) -> list[Tensor]:
    """The tensors of nested dicts, in the order of their names."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for name in sorted(tree) for leaf in leaves(tree[name])] if isinstance(tree, dict) else []


def mapped(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: mapped(function, value) for name, value in tree.items()}
    return function(tree) if isinstance(tree, Tensor) else tree
