"""Lattice as its users meet it, beside a loop of the paper's equation, and its parts in other levels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import nestopt
from nestopt.testing import check_level, check_part


def test_it_is_found_by_its_entry_point() -> None:
    (plugin,) = [plugin for plugin in nestopt.registry.plugins() if plugin.name == "lattice"]
    assert plugin.error is None
    assert plugin.provides == (("level", "lattice"), ("memory", "unit_slots"), ("retention", "unit_columns"))
    assert plugin.source.startswith("nestopt-lattice ")


@pytest.mark.parametrize("objective", ["l2", "dot"])
def test_it_is_the_published_update(objective: str) -> None:
    q, k, v = (torch.randn(1, 9, 1, 4, dtype=torch.float64) for _ in range(3))
    start = torch.randn(4, 4, dtype=torch.float64)
    level = nestopt.build("level", {"level": "lattice", "objective": objective, "lr": 0.3})
    y, state = nestopt.ops.run(level, q, k, v, learned={"m": start[None]})
    slots = start.numpy() / np.linalg.norm(start.numpy(), axis=0)
    for t in range(9):
        key, value = k[0, t, 0].numpy(), v[0, t, 0].numpy()
        error = value - slots @ key if objective == "l2" else value
        moved = slots.copy()
        for i in range(4):
            s = slots[:, i]
            write = 0.3 * key[i] * (np.eye(4) - np.outer(s, s)) @ error
            assert abs(write @ s) < 1e-12
            moved[:, i] = (s + write) / np.linalg.norm(s + write)
        slots = moved
        np.testing.assert_allclose(y[0, t, 0].numpy(), slots @ q[0, t, 0].numpy(), rtol=0, atol=1e-12)
    kept = state["level"]["memory"]["m"][0, 0].numpy()
    np.testing.assert_allclose(kept / np.linalg.norm(kept, axis=0), slots, rtol=0, atol=1e-12)


def test_an_empty_slot_takes_what_comes() -> None:
    q, k, v = (torch.randn(1, 1, 1, 4, dtype=torch.float64) for _ in range(3))
    y, _ = nestopt.ops.run(nestopt.levels.lattice(), q, k, v)
    signed = torch.outer(v[0, 0, 0] / v.norm(), k[0, 0, 0].sign())
    torch.testing.assert_close(y[0, 0, 0], signed @ q[0, 0, 0])


def test_a_layer_learns_where_its_slots_begin() -> None:
    layer = nestopt.layer("lattice", dim=8, heads=2)
    y, _ = layer(torch.randn(2, 5, 8))
    y.square().sum().backward()
    found = {name: param.grad for name, param in layer.named_parameters()}
    assert all(grad is not None and grad.isfinite().all() and grad.any() for grad in found.values()), found
    assert "start.m" in found


@pytest.mark.parametrize(("kind", "name"), [("memory", "unit_slots"), ("retention", "unit_columns")])
def test_its_parts_work_in_any_memory(kind: str, name: str) -> None:
    check_part(nestopt.build(kind, name))


def test_it_keeps_the_contract_of_levels() -> None:
    check_level(nestopt.levels.lattice())


def test_in_yaml_by_name(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("{level: omega, memory: unit_slots, window: 3, retention: unit_columns}")
    level = nestopt.load(file)
    assert (level.memory.label, level.retention.label) == ("unit_slots", "unit_columns")
    config = nestopt.load({"model": {"mixer": {"level": "lattice", "lr": 0.3}, "dim": 16, "heads": 2, "blocks": 1}})
    logits, _ = nestopt.model(config)(torch.randint(256, (1, 6)))
    assert logits.isfinite().all()
