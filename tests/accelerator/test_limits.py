"""No layer and no optimizer does more on an accelerator than it did: launches, bytes, and products by dtype.

Counted on meta tensors, at a small size. What may be is in `limits.json`; where a change is meant, it is counted anew by
`python benchmarks/launches.py --limits`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

import pytest

from benchmarks.launches import (
    IN_CONTEXT,
    LIMITS,
    MODES,
    STACKS,
    TRANSFORMERS,
    layers,
    numbers,
    small_costs,
    stack_cost,
)
from nestopt.core.registry import registry

KNOWN = json.loads(LIMITS.read_text(encoding="utf-8"))


def over(found: Mapping[str, float], limits: Mapping[str, float]) -> list[str]:
    """In words, what is above its limit; what has none may not be there."""
    return [
        f"{key}: {number:,.0f} where {limits.get(key, 0):,.0f} may be ({number - limits.get(key, 0):+,.0f})"
        for key, number in found.items()
        if number > limits.get(key, 0)
    ]


def hold(name: str, found: Mapping[str, float], limits: Mapping[str, float]) -> None:
    more = over(found, limits)
    meant = "If the change is meant: python benchmarks/launches.py --limits, and say so in the change."
    assert not more, f"{name} does more than it did. {'; '.join(more)}. {meant}"


@pytest.mark.parametrize("name", KNOWN["layers"])
def test_a_layer_does_no_more_than_it_did(name: str) -> None:
    found, limits = small_costs(name), KNOWN["layers"][name]
    assert list(found) == list(limits)
    for mode, cost in found.items():
        hold(f"{name}, {mode},", numbers(cost), limits[mode])


@pytest.mark.parametrize("stack", KNOWN["optimizers"])
def test_an_optimizer_does_no_more_than_it_did(stack: str) -> None:
    hold(stack, numbers(stack_cost(stack, TRANSFORMERS["small"])), KNOWN["optimizers"][stack])


def test_every_layer_and_every_stack_has_its_limits() -> None:
    assert set(KNOWN["layers"]) == set(layers())
    assert set(KNOWN["optimizers"]) == set(STACKS)
    assert set(layers()) - {IN_CONTEXT} <= set(registry.names("level"))
    for limits in KNOWN["layers"].values():
        assert list(limits) in (list(MODES), list(MODES[:2]))
        assert all(mode["launches"] > 0 < mode["bytes"] for mode in limits.values())


def test_what_is_above_its_limit_is_told() -> None:
    limits = {"launches": 100, "bytes": 2000, "float32 FLOPs": 5}
    hold("deltanet", {"launches": 100, "bytes": 1000}, limits)
    with pytest.raises(AssertionError, match=r"deltanet does more .* launches: 103 where 100 may be \(\+3\)\. If"):
        hold("deltanet", {"launches": 103, "bytes": 2000}, limits)
    with pytest.raises(AssertionError, match=r"bfloat16 FLOPs: 7 where 0 may be .*benchmarks/launches\.py --limits"):
        hold("deltanet", {"launches": 1, "bfloat16 FLOPs": 7}, limits)
