"""Lion as its users meet it: by name, from the installed distribution, in every role of a level."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import nestopt
from nestopt.testing import check_level


def test_it_is_found_by_its_entry_point() -> None:
    (plugin,) = [plugin for plugin in nestopt.registry.plugins() if plugin.name == "lion"]
    assert plugin.error is None
    assert plugin.provides == (("level", "lion"),)
    assert plugin.source.startswith("nestopt-lion ")


def test_as_an_optimizer_it_is_the_published_update() -> None:
    model = nn.Linear(5, 3).double()
    optimizer = nestopt.optimizer(model, "lion", lr=0.01, weight_decay=0.1)
    generator = np.random.default_rng(0)
    weights = [param.detach().numpy().copy() for param in model.parameters()]
    moments = [np.zeros_like(w) for w in weights]
    for _ in range(20):
        grads = [generator.normal(size=w.shape) for w in weights]
        for param, grad in zip(model.parameters(), grads, strict=True):
            param.grad = torch.from_numpy(grad)
        optimizer.step()
        # Algorithm 2 of the paper
        for i, grad in enumerate(grads):
            update = np.sign(0.9 * moments[i] + 0.1 * grad)
            weights[i] = weights[i] - 0.01 * (update + 0.1 * weights[i])
            moments[i] = 0.99 * moments[i] + 0.01 * grad
    for param, wanted in zip(model.parameters(), weights, strict=True):
        np.testing.assert_allclose(param.detach().numpy(), wanted, rtol=0, atol=1e-12)


def test_it_steps_as_the_chain_of_parts_that_nestopt_has() -> None:
    weights = [torch.ones(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    stacks = nestopt.levels.lion(), nestopt.levels.lion_chain()
    optimizers = [nestopt.optimizer([w], stack, lr=0.01) for w, stack in zip(weights, stacks, strict=True)]
    for _ in range(20):
        grad = torch.randn(5, 3, dtype=torch.float64)
        for weight, optimizer in zip(weights, optimizers, strict=True):
            weight.grad = grad.clone()
            optimizer.step()
    torch.testing.assert_close(*weights)


def test_as_a_layer_it_reads_the_sign_of_its_memory() -> None:
    q, k, v = (torch.randn(1, 6, 1, 4, dtype=torch.float64) for _ in range(3))
    y, _ = nestopt.ops.run(nestopt.levels.lion(), q, k, v)
    memory = np.zeros((4, 4))
    for t in range(6):
        pair = np.outer(v[0, t, 0], k[0, t, 0])
        wanted = np.sign(0.9 * memory + 0.1 * pair) @ q[0, t, 0].numpy()
        np.testing.assert_allclose(y[0, t, 0].numpy(), wanted, rtol=0, atol=1e-12)
        memory = 0.99 * memory + 0.01 * pair


def test_as_the_rule_of_titans_it_learns_within_the_sequence() -> None:
    spec = {"level": "titans", "rule": "lion", "step_size": 0.02, "retention": "keep", "chunk": 4}
    layer = nestopt.layer(spec, dim=8, heads=2, conv=0)
    x = torch.randn(1, 1, 8).expand(1, 12, 8)
    _, state = layer(x)
    memory = state["memory"]["level"]
    assert set(memory["rule"]["W1"]) == {"momentum"}
    moved = (memory["memory"]["W1"] - layer.start["W1"]).detach().abs()
    assert 0 < float(moved.max()) <= 12 * 0.02 + 1e-6  # every entry moves by 0.02 a token, or not at all


def test_it_keeps_the_contract_of_levels() -> None:
    check_level(nestopt.levels.lion())


def test_in_yaml_by_name(tmp_path: Path) -> None:
    file = tmp_path / "stack.yaml"
    file.write_text("[{level: lion, beta1: 0.95}, {level: momentum, period: 4}]")
    stack = nestopt.load(file)
    assert stack == nestopt.chain(nestopt.levels.lion(beta1=0.95), nestopt.levels.momentum(period=4))
    assert nestopt.to_spec(stack) == {
        "level": "chain",
        "levels": [{"level": "lion", "beta1": 0.95}, {"level": "momentum", "period": 4}],
    }


def test_a_beta_out_of_range_is_refused_by_name() -> None:
    with pytest.raises(nestopt.ConfigError, match=r"beta2: 1\.5 is not allowed; give a number in \[0, 1\]"):
        nestopt.build("level", {"level": "lion", "beta2": 1.5})
