"""Tokens, arguments and twins that the tests of `nestopt.ops.self_modifying` share."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nestopt.core.tree import leaves
from tests.levels.deep.deep_cases import F64, weights_of
from tests.levels.self_modifying.self_twin import twin

BATCH, HEADS, DIM = 2, 2, 4
ALL = ("memory", "k", "v", "q", "eta", "alpha")
SUBSETS = (ALL, ("memory", "k", "v", "eta", "alpha"), ("memory",), ("memory", "v"), ("memory", "alpha", "k"))

FACTORS: dict[str, tuple[Any, ...]] = {
    "length": (3, 16, 21),
    "names": SUBSETS,
    "has_momentum": (False, True),
    "delta": (0.0, 1.0),
    "step": ("normalized", "raw"),
    "norm": (False, True),
    "activation": ("silu", "gelu", "tanh"),
    "depth": (1, 2, 3),
    "leading": ((), (HEADS,), (BATCH, HEADS)),
}

Case = dict[str, Any]


def cases(seed: int) -> list[Case]:
    """Every pair of chunks, and with each some value of every factor, all of which come up as often."""
    chance = random.Random(seed)
    pairs = [(chunk, other) for chunk in (1, 4, 8) for other in (1, 4, 8, 16)]
    columns = {
        name: chance.sample(values * len(pairs), len(pairs) * len(values))[: len(pairs)]
        for name, values in FACTORS.items()
    }
    return [
        {"chunk": chunk, "projection_chunk": other, **{name: column[i] for name, column in columns.items()}}
        for i, (chunk, other) in enumerate(pairs)
    ]


def label(case: Case) -> str:
    return "-".join(f"{name}={value}" for name, value in case.items())


def tokens_of(length: int, dtype: torch.dtype = F64) -> list[Tensor]:
    return [torch.randn(BATCH, length, HEADS, DIM, dtype=dtype) for _ in range(3)]


def readout_of() -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (torch.randn(HEADS, DIM, dtype=F64), bias + torch.randn(HEADS, dtype=F64))
        for name, bias in (("eta", 0.0), ("alpha", 4.0))
    }


def build(case: Case) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    """Tokens, arguments and leaves of one case."""
    length = case["length"]
    tokens, readout = tokens_of(length), readout_of()
    # the answering memory may be of another size
    starts = {
        name: weights_of(case["depth"] if name == "memory" else 2, case["leading"], hidden=6 if name == "memory" else 5)
        for name in case["names"]
    }
    names = ("chunk", "projection_chunk", "delta", "step", "norm", "activation")
    arguments = {name: case[name] for name in names} | {"starts": starts, "readout": readout, "eta_max": 0.03}
    own = [w for weights in starts.values() for w in weights]
    found = [*tokens, *own, *(x for parts in readout.values() for x in parts)]
    if case["has_momentum"]:
        arguments["momentum"] = 0.9 * torch.rand(BATCH, length, HEADS, dtype=F64)
        found.append(arguments["momentum"])
    return tokens, arguments, [x.requires_grad_() for x in found]


def example(length: int = 11, **options: Any) -> tuple[list[Tensor], dict[str, Any], list[Tensor]]:
    """Six memories with momentum and delta decay."""
    case = {"chunk": 2, "projection_chunk": 4, "names": ALL, "has_momentum": True, "delta": 1.0, "step": "normalized"}
    case |= {"norm": False, "activation": "silu", "depth": 2, "leading": (HEADS,), "length": length}
    return build(case | options)


def flat(y: Tensor, state: dict[str, Any]) -> list[Tensor]:
    """All numbers of an answer but the tokens that are pending, in the order of their names."""
    return [y, *(x for path, x in sorted(leaves(state)) if "pending" not in path)]


def run_twin(tokens: list[Tensor], arguments: dict[str, Any], **more: Any) -> list[Tensor]:
    """`twin` with the arguments of `self_modifying`, in the order of `flat`."""
    given = dict(arguments)
    given["starts"] = {
        name: [w.expand(BATCH, HEADS, *w.shape[-2:]) for w in weights] for name, weights in given["starts"].items()
    }
    y, weights, momenta = twin(*tokens, **given, **more)
    kinds = {"weights": weights} | ({"momentum": momenta} if given.get("momentum") is not None else {})
    named = {
        f"{'' if name == 'memory' else 'projections.'}{name}.{kind}.W{i}": x
        for kind, boxes in kinds.items()
        for name, box in boxes.items()
        for i, x in enumerate(box, start=1)
    }
    return [y, *(named[path] for path in sorted(named))]


def trimmed(arguments: dict[str, Any], begin: int, end: int) -> dict[str, Any]:
    """Arguments of the tokens from `begin` to `end`."""
    found = dict(arguments)
    for name in ("momentum", "mask"):
        if found.get(name) is not None:
            found[name] = found[name][:, begin:end]
    return found


def in_pieces(run: Any, tokens: Sequence[Tensor], arguments: dict[str, Any], ends: Sequence[int]) -> tuple[Tensor, Any]:
    length, ys, state, begin = tokens[0].shape[1], [], None, 0
    for end in [*ends, length]:
        y, state = run(*(x[:, begin:end] for x in tokens), **trimmed(arguments, begin, end), state=state)
        ys.append(y)
        begin = end
    return torch.cat(ys, 1), state
