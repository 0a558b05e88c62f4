"""Tokens, arguments and twins that the tests of `nestopt.ops.deep_memory` share."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.levels.deep.deep_twin import twin

F64 = torch.float64
BATCH, HEADS, DIM, HIDDEN = 2, 2, 4, 5

FACTORS: dict[str, tuple[Any, ...]] = {
    "chunk": (1, 3, 16, 64),
    "length": (1, 5, 20, 70),
    "read": ("after", "before", "chunk"),
    "depth": (1, 2, 3),
    "activation": ("silu", "gelu", "relu", "tanh", "identity"),
    "delta": (0.0, 1.0),
    "momentum": (False, True),
    "decay": (False, True),
    "objective": ("l2", "dot"),
    "step": ("normalized", "raw"),
    "residual": (True, False),
    "norm": (False, True),
    "shared": ("all", "heads", "none"),
    "gates": ("number", "heads", "tokens"),
    "begun": (False, True),
}
"""`shared`: by what weights are shared. `begun`: from a state with momenta of its own."""

Case = dict[str, Any]


def all_pairs(seed: int) -> list[Case]:
    """Cases in which every two values of any two factors meet, chosen greedily."""
    chance = random.Random(seed)
    names = list(FACTORS)
    left = {(a, x, b, y) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]}

    def pairs(case: Case) -> set[tuple[str, Any, str, Any]]:
        there = [name for name in names if name in case]
        return {(a, case[a], b, case[b]) for a, b in itertools.combinations(there, 2)}

    cases = []
    while left:
        a, x, b, y = chance.choice(sorted(left, key=repr))
        case = {a: x, b: y}
        for name in names:
            values = chance.sample(FACTORS[name], len(FACTORS[name]))
            if name not in case:
                case[name] = max(values, key=lambda value: len(pairs({**case, name: value}) & left))
        left -= pairs(case)
        cases.append(case)
    return cases


def layerwise_cases(seed: int) -> list[Case]:
    """`all_pairs` of the layerwise step."""
    ways = itertools.cycle([{"forget": "all"}, {"forget": "outer"}])
    return [case | {"step": "layerwise"} | way for case, way in zip(all_pairs(seed), ways, strict=False)]


def inputs(length: int, dtype: torch.dtype = F64, dim: int = DIM) -> list[Tensor]:
    """q, k of unit length and v, `[B, T, H, D]`."""
    q, k, v = (torch.randn(BATCH, length, HEADS, dim, dtype=dtype) for _ in range(3))
    return [F.normalize(q, dim=-1), F.normalize(k, dim=-1), v]


def weights_of(depth: int, leading: Sequence[int] = (), dim: int = DIM, hidden: int = HIDDEN) -> list[Tensor]:
    sizes = [dim, *[hidden] * (depth - 1), dim]
    shapes = itertools.pairwise(sizes)
    return [torch.randn(*leading, out, into, dtype=F64) / into**0.5 for out, into in shapes]


def gate(kind: str, length: int, low: float, high: float) -> Tensor:
    shape = {"number": (), "heads": (HEADS,), "tokens": (BATCH, length, HEADS)}[kind]
    return low + (high - low) * torch.rand(shape, dtype=F64)


def full(gate: Tensor | None, q: Tensor) -> Tensor | None:
    return None if gate is None else gate.expand(q.shape[:3])


def named(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"W{i}": x for i, x in enumerate(tensors, start=1)}


def outputs(y: Tensor, state: dict[str, Any]) -> list[Tensor]:
    """All numbers of an answer but the tokens in `pending`, which are the inputs."""
    return [y, *state["weights"].values(), *state.get("momentum", {}).values()]


def close(mine: Any, true: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)


def gradients(outs: Sequence[Tensor], leaves: Sequence[Tensor], probes: Sequence[Tensor]) -> list[Tensor]:
    loss = sum((out * probe).sum() for out, probe in zip(outs, probes, strict=True))
    found = torch.autograd.grad(loss, leaves, allow_unused=True)  # type: ignore[arg-type]
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def build(case: Case) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    """Tokens, arguments and leaves of one case."""
    length = case["length"]
    tokens = inputs(length)
    gates = {"lr": gate(case["gates"], length, 0.0, 0.1 if case["step"] == "raw" else 1.0)}
    if case["decay"]:
        gates["decay"] = gate(case["gates"], length, 0.5, 1.0)
    if case["momentum"]:
        gates["momentum"] = gate(case["gates"], length, 0.0, 0.95)
    leading = {"all": (), "heads": (HEADS,), "none": (BATCH, HEADS)}[case["shared"]]
    weights = weights_of(case["depth"], leading)
    leaves = [*tokens, *gates.values(), *weights]
    names = ("chunk", "read", "activation", "delta", "objective", "step", "residual", "norm")
    arguments = {**gates, **{name: case[name] for name in names}, "weights": weights}
    arguments["forget"] = case.get("forget", "all")
    if case["begun"]:
        begun = [w.expand(BATCH, HEADS, *w.shape[-2:]).clone() for w in weights]
        momenta = [0.1 * torch.randn_like(w) for w in begun]
        leaves += begun
        pending = {"k": tokens[1], "v": tokens[2], "live": torch.ones(tokens[1].shape[:3], dtype=torch.bool), **gates}
        empty = {name: x.new_zeros(BATCH, HEADS, 0, *x.shape[3:]) for name, x in pending.items()}
        arguments["state"] = {"weights": named(begun), "pending": empty}
        if case["momentum"]:
            arguments["state"]["momentum"] = named(momenta)
            leaves += momenta
    return tokens, arguments, [x.requires_grad_() for x in leaves]


def run_twin(tokens: list[Tensor], arguments: dict[str, Any], **more: Any) -> list[Tensor]:
    """`twin` with the arguments of `deep_memory`."""
    q = tokens[0]
    given = {name: x for name, x in arguments.items() if name != "state"}
    for name in ("lr", "decay", "momentum"):
        given[name] = full(given.get(name), q)
    state = arguments.get("state") or {"weights": named(given["weights"])}
    given["weights"] = [w.expand(q.shape[0], q.shape[2], *w.shape[-2:]) for w in state["weights"].values()]
    momenta = list(state["momentum"].values()) if "momentum" in state else None
    y, weights, moved = twin(*tokens, **given, momenta=momenta, **more)
    return [y, *weights, *(moved if given["momentum"] is not None else [])]


def label(case: Case) -> str:
    return "-".join(f"{name}={value}" for name, value in case.items())


READS = ("after", "before", "chunk")


def example(length: int = 11, dtype: torch.dtype = F64, **options: Any) -> tuple[list[Tensor], dict[str, Any]]:
    """Tokens and arguments of a two-layer memory with all gates and the delta decay."""
    tokens = inputs(length, dtype)
    gates = {
        "lr": torch.rand(BATCH, length, HEADS, dtype=F64),
        "decay": 0.5 + 0.5 * torch.rand(BATCH, length, HEADS, dtype=F64),
        "momentum": 0.9 * torch.rand(BATCH, length, HEADS, dtype=F64),
    }
    gates = {name: x.to(dtype) for name, x in gates.items()}
    return tokens, {**gates, "weights": weights_of(2), "delta": 1.0, "chunk": 4, **options}
