"""Conda as its users meet it: by name, beside its published form, in every role of a level."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import nestopt
from nestopt.testing import check_level


def test_it_is_found_by_its_entry_point() -> None:
    (plugin,) = [plugin for plugin in nestopt.registry.plugins() if plugin.name == "conda"]
    assert (plugin.error, plugin.provides) == (None, (("level", "conda"),))
    assert plugin.source.startswith("nestopt-conda ")


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4)])
def test_as_an_optimizer_it_is_the_published_update(shape: tuple[int, int]) -> None:
    weight = nn.Parameter(torch.ones(*shape, dtype=torch.float64))
    optimizer = nestopt.optimizer([weight], nestopt.levels.conda(basis_every=4), lr=0.1)
    generator = np.random.default_rng(0)
    w, m = np.ones(shape), np.zeros(shape)
    h = np.zeros(shape)
    for t in range(1, 14):
        grad = generator.normal(size=shape)
        weight.grad = torch.from_numpy(grad.copy())
        optimizer.step()
        # Algorithm 1 of the paper, with Adam's corrections
        m = 0.9 * m + 0.1 * grad
        if t == 1 or t % 4 == 0:
            u, _, vt = np.linalg.svd(m, full_matrices=False)
        into = (lambda x: x @ vt.T) if shape[0] >= shape[1] else (lambda x: u.T @ x)  # noqa: B023
        back = (lambda x: x @ vt) if shape[0] >= shape[1] else (lambda x: u @ x)  # noqa: B023
        h = 0.999 * h + 0.001 * into(grad) ** 2
        w = w - 0.1 * np.sqrt(1 - 0.999**t) / (1 - 0.9**t) * back(into(m) / (np.sqrt(h) + 1e-8))
        np.testing.assert_allclose(weight.detach().numpy(), w, rtol=0, atol=1e-10)


def test_it_steps_as_pytorch_optimizers() -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    torch.manual_seed(0)
    for shape in ((6, 4), (4, 6)):
        ours, theirs = (nn.Parameter(torch.ones(*shape)) for _ in range(2))
        optimizers = (
            nestopt.optimizer([ours], nestopt.levels.conda(beta1=0.8, beta2=0.95, basis_every=5), lr=0.01),
            peer.Conda([theirs], lr=0.01, betas=(0.8, 0.95), update_proj_gap=5),
        )
        for _ in range(12):
            ours.grad = torch.randn(*shape)
            theirs.grad = ours.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_it_is_given_the_hidden_matrices() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = nestopt.optimizer(model, "conda", lr=0.01, rest={"stack": "adamw", "lr": 0.01})
    found = {row.name: row.level for row in optimizer.explain()}
    assert {name for name, level in found.items() if level == "conda"} == {"0.weight", "2.weight"}


def test_its_basis_is_on_a_slow_clock() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = nestopt.optimizer([weight], nestopt.levels.conda(basis_every=3), lr=0.01)
    bases = []
    for _ in range(7):
        weight.grad = torch.randn(4, 3)
        optimizer.step()
        (state,) = optimizer.state.values()
        bases.append(next(leaf for path, leaf in nestopt.core.tree.leaves(state) if path.endswith("basis")).clone())
    changed = [not torch.equal(one, other) for one, other in itertools.pairwise(bases)]
    assert changed == [False, True, False, False, True, False]  # at steps 3 and 6


def test_one_huge_gradient_is_survived() -> None:
    weight = nn.Parameter(torch.ones(4, 3))
    optimizer = nestopt.optimizer([weight], nestopt.levels.conda(beta2=0.99), lr=0.1)
    for size in (1.0, 1e30, *[1.0] * 400):
        weight.grad = torch.full((4, 3), size) + torch.randn(4, 3)
        optimizer.step()
        assert weight.isfinite().all()


def test_it_keeps_the_contract_of_levels() -> None:
    check_level(nestopt.levels.conda(basis_every=3))


def test_in_yaml_by_name_and_a_wrong_number_is_refused() -> None:
    stack = nestopt.build("level", {"level": "conda", "basis_every": 50, "period": 2})
    assert stack == nestopt.levels.conda(basis_every=50, period=2)
    with pytest.raises(nestopt.ConfigError, match="basis_every: 0 is not allowed; give"):
        nestopt.build("level", {"level": "conda", "basis_every": 0})


def test_it_is_described_as_two_levels() -> None:
    said = str(nestopt.describe(nestopt.levels.conda(basis_every=50)))
    assert "conda.basis       every 50 steps" in said
    assert "3 memories on 2 levels" in said
