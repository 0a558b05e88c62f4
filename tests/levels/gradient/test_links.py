"""Links without memory, and the optimizers that are chains of them, against loops over entries."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

import nestopt
from nestopt import levels
from nestopt.core import Level, Signal
from nestopt.core.part import FieldError
from nestopt.levels import adam, cautious, clip, normalize, sign, trust_ratio, weight_decay
from nestopt.optim import Nested
from tests.levels.gradient.tools import randoms, run, same


def once(level: Level, grad: Tensor, param: Tensor | None = None) -> Tensor:
    direction, state = level.step(grad, level.init(grad), Signal(1, param))
    assert state == {}
    return direction


def rows(x: Tensor) -> list[Tensor]:
    return list(x.flatten(1)) if x.ndim > 1 else [x]


def norm(x: Tensor) -> float:
    return math.sqrt(sum(float(entry) ** 2 for entry in x.flatten()))


@pytest.mark.parametrize("shape", [(4, 3), (5,), (), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("factor", [1e-3, 0.4, 1.0, 7.0])
def test_clipping(shape: tuple[int, ...], factor: float) -> None:
    grad, param = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
    limit = factor * norm(grad)
    same(once(clip(limit), grad), grad * min(1.0, factor))
    rms = norm(grad) / math.sqrt(grad.numel())
    same(once(clip(factor * rms, by="rms"), grad), grad * min(1.0, factor))
    clipped = [max(-factor, min(factor, float(entry))) for entry in grad.flatten()]
    same(once(clip(factor, by="value"), grad), torch.tensor(clipped, dtype=torch.float64).reshape(shape))
    adapted = []
    for g, w in zip(rows(grad), rows(0.01 * param), strict=True):
        allowed = factor * max(norm(w), 0.02)
        adapted.append(g * min(1.0, allowed / norm(g)))
    wanted = torch.stack(adapted).reshape(shape)
    same(once(clip(factor, by="adaptive", eps=0.02), grad, 0.01 * param), wanted)


def test_what_all_gradients_together_decide_is_refused_and_says_who_can() -> None:
    with pytest.raises(FieldError, match=r"clip: by='global' is not a level's .*clip_grad_norm_ before the step"):
        clip(by="global")
    with pytest.raises(nestopt.ConfigError, match=r"by: 'global' is not a level's"):
        nestopt.build("level", {"level": "clip", "by": "global"})


@pytest.mark.parametrize("size", [1e-30, 1.0, 1e25])
def test_norms_of_any_size(size: float) -> None:
    grad = torch.randn(6, 4) * size
    torch.testing.assert_close(once(normalize(3.0), grad).norm(), torch.tensor(3.0))
    torch.testing.assert_close(once(normalize(0.2, by="rms"), grad).square().mean().sqrt(), torch.tensor(0.2))
    torch.testing.assert_close(once(normalize(2.0, over="rows"), grad).norm(dim=1), torch.full((6,), 2.0))
    torch.testing.assert_close(once(clip(1e-3 * size), grad), grad * (1e-3 * size / grad.double().norm()).float())
    param = torch.randn(6, 4)
    torch.testing.assert_close(once(trust_ratio(), grad, param).norm(), param.norm())
    # a mask that no product makes: size² may be 0 or infinite
    masked = once_of(cautious(of=sign(), rescale=False), grad)
    torch.testing.assert_close(masked, grad.sign())


def once_of(level: Level, grad: Tensor) -> Tensor:
    return level.step(grad, level.init(grad), Signal(1))[0]


@pytest.mark.parametrize(
    "level", [clip(), normalize(), clip(by="adaptive"), trust_ratio(), levels.centralize()], ids=str
)
def test_zeros_stay_zeros(level: Level) -> None:
    zero = torch.zeros(3, 2)
    assert torch.equal(once(level, zero, torch.ones(3, 2)), zero)
    assert torch.equal(once(level, zero, zero), zero)


def test_centralized_outputs() -> None:
    grad = torch.randn(4, 3, 2, dtype=torch.float64)
    wanted = torch.stack([row - sum(float(entry) for entry in row.flatten()) / 6 for row in grad])
    same(once(levels.centralize(), grad), wanted)
    vector = torch.randn(5)
    assert torch.equal(once(levels.centralize(), vector), vector)


def test_a_trust_ratio_is_1_where_there_is_nothing_to_compare() -> None:
    grad, param = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    same(once(trust_ratio(0.5, eps=0.1), grad, param), grad * 0.5 * norm(param) / (norm(grad) + 0.1))
    same(once(trust_ratio(limit=0.3), grad, param), grad * min(norm(param), 0.3) / norm(grad))
    same(once(trust_ratio(0.5), grad, torch.zeros_like(grad)), grad)


@pytest.mark.parametrize("level", [weight_decay(), trust_ratio(), clip(by="adaptive"), levels.lamb()], ids=str)
def test_on_tokens_there_is_no_parameter(level: Level) -> None:
    with pytest.raises(ValueError, match=rf"^{level.label} can't run on tokens: it needs a parameter"):
        nestopt.layer(level, dim=4)(torch.randn(1, 3, 4))
    # within a memory there is one: what it remembers
    y, _ = nestopt.layer(levels.titans(rule=["momentum", level], normalized=False, lr=0.1), dim=8, heads=2)(
        torch.randn(1, 3, 8)
    )
    assert y.isfinite().all()


def test_a_cautious_level_moves_where_it_agrees_with_the_gradient() -> None:
    grads = randoms(3, 4)
    plain, masked = run(adam(), grads), run(cautious(of=adam()), grads)
    kept = run(cautious(of=adam(), rescale=False), grads)
    for g, u, got, other in zip(grads, plain, masked, kept, strict=True):
        agree = [[float(u[i, j]) * float(g[i, j]) > 0 for j in range(4)] for i in range(3)]
        mask = torch.tensor(agree, dtype=torch.float64)
        same(other, u * mask)
        same(got, u * mask * 12 / (sum(map(sum, agree)) + 1))


def test_decay_anywhere_in_a_chain() -> None:
    param, grads = torch.randn(3, 4, dtype=torch.float64), randoms(3, 4)
    first = torch.nn.Parameter(param.clone())
    last, l2, decoupled = (torch.nn.Parameter(param.clone()) for _ in range(3))
    pairs = [
        (first, Nested([first], ["weight_decay", "adam"], lr=0.1)),
        (l2, torch.optim.Adam([l2], lr=0.1, weight_decay=0.01)),
        (last, Nested([last], ["adam", {"level": "weight_decay", "rate": 0.3}], lr=0.1)),
        (decoupled, torch.optim.AdamW([decoupled], lr=0.1, weight_decay=0.3)),
    ]
    for grad in grads:
        for weight, optimizer in pairs:
            weight.grad = grad.clone()
            optimizer.step()
    same(first, l2, 1e-9)
    same(last, decoupled, 1e-9)


# -- recipes: each against its own loop, in numpy ----------------------------------------------------------------------


def stepped(level: Level, grads: list[Tensor], start: Tensor, lr: float) -> np.ndarray:
    weight = torch.nn.Parameter(start.clone())
    optimizer = Nested([weight], level, lr=lr)
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach().numpy()


def problem(*shape: int) -> tuple[list[Tensor], Tensor]:
    return randoms(*shape, count=12), torch.randn(shape, dtype=torch.float64)


def close(got: np.ndarray, want: np.ndarray) -> None:
    np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-9)


def test_lamb() -> None:
    grads, start = problem(4, 3)
    w, m, v = start.numpy().copy(), np.zeros((4, 3)), np.zeros((4, 3))
    for t, grad in enumerate(grads, start=1):
        g = grad.numpy()
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.99**t)) + 1e-6) + 0.02 * w
        w = w - 0.05 * min(np.linalg.norm(w), 2.0) / (np.linalg.norm(r) + 1e-6) * r
    close(stepped(levels.lamb((0.9, 0.99), weight_decay=0.02, limit=2.0), grads, start, 0.05), w)


def test_lion() -> None:
    grads, start = problem(4, 3)
    w, m = start.numpy().copy(), np.zeros((4, 3))
    for grad in grads:
        g = grad.numpy()
        w = w - 0.05 * np.sign(0.8 * m + 0.2 * g)
        m = 0.95 * m + 0.05 * g
    close(stepped(levels.lion_chain((0.8, 0.95)), grads, start, 0.05), w)
    with pytest.raises(FieldError, match=r"betas=\(0\.9, 0\.0\) is not allowed; give a β2 above 0"):
        levels.lion_chain((0.9, 0.0))


def test_a_lion_that_is_asked_for_is_the_plugins_and_the_parts_are_named() -> None:
    if "lion" in nestopt.registry.names("level"):
        pytest.skip("the plugin is installed")
    with pytest.raises(nestopt.ConfigError, match="Did you mean 'lion_chain'"):
        nestopt.build("level", "lion")


def test_grokfast() -> None:
    grads, start = problem(4, 3)
    w, m = start.numpy().copy(), grads[0].numpy().copy()
    for t, grad in enumerate(grads):
        g = grad.numpy()
        m = m if t == 0 else 0.8 * m + 0.2 * g
        w = w - 0.05 * (g + 3.0 * m)
    close(stepped(levels.grokfast(0.8, 3.0), grads, start, 0.05), w)


def test_mars() -> None:
    grads, start = problem(4, 3)
    grads = grads[:6] + [grad * 0.1 for grad in grads[6:]]  # of which some are not clipped
    w, m, v, last = start.numpy().copy(), np.zeros((4, 3)), np.zeros((4, 3)), np.zeros((4, 3))
    for t, grad in enumerate(grads, start=1):
        g = grad.numpy()
        c = g + 0.05 * 0.9 / (1 - 0.9) * (g - last)
        c = c / max(1.0, np.linalg.norm(c))
        m, v, last = 0.9 * m + 0.1 * c, 0.97 * v + 0.03 * c**2, g
        w = w - 0.05 * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.97**t)) + 1e-8)
    close(stepped(levels.mars((0.9, 0.97), 0.05), grads, start, 0.05), w)


def orthogonal(x: np.ndarray) -> np.ndarray:
    """Five of Jordan's steps, with a wide matrix on its short side."""
    y = x.T if x.shape[0] > x.shape[1] else x
    y = y / np.linalg.norm(y)
    for _ in range(5):
        a = y @ y.T
        y = 3.4445 * y + (-4.775 * a + 2.0315 * a @ a) @ y
    return y.T if x.shape[0] > x.shape[1] else y


@pytest.mark.parametrize("shape", [(5, 3), (3, 5)], ids=str)
def test_normuon(shape: tuple[int, int]) -> None:
    grads, start = problem(*shape)
    w, m, v = start.numpy().copy(), np.zeros(shape), np.zeros((shape[0], 1))
    for grad in grads:
        g = grad.numpy()
        m = 0.9 * m + 0.1 * g
        o = orthogonal(0.1 * g + 0.9 * m)
        v = 0.8 * v + 0.2 * (o**2).mean(1, keepdims=True)
        u = o / (np.sqrt(v) + 1e-10)
        w = w - 0.05 * 0.2 * math.sqrt(15) / np.linalg.norm(u) * u
    close(stepped(levels.normuon(0.9, 0.8), grads, start, 0.05), w)


@pytest.mark.parametrize("signed", [True, False])
def test_adamuon(signed: bool) -> None:
    grads, start = problem(5, 3)
    w, m, v = start.numpy().copy(), np.zeros((5, 3)), np.zeros((5, 3))
    for t, grad in enumerate(grads, start=1):
        m = 0.9 * m + 0.1 * grad.numpy()
        o = orthogonal(np.sign(m) if signed else m)
        v = 0.8 * v + 0.2 * o**2
        u = o / (np.sqrt(v / (1 - 0.8**t)) + 1e-8)
        w = w - 0.05 * 0.2 * math.sqrt(15) / np.linalg.norm(u) * u
    close(stepped(levels.adamuon((0.9, 0.8), signed=signed), grads, start, 0.05), w)


def test_a_recipe_is_its_chain_and_its_own_fields_are_its_keys() -> None:
    lamb = levels.lamb(weight_decay=0.1)
    parts = [adam(eps=1e-6), weight_decay(0.1), trust_ratio(limit=10.0, eps=1e-6)]
    grads, start = problem(4, 3)
    close(stepped(lamb, grads, start, 0.05), stepped(nestopt.chain(parts), grads, start, 0.05))
    assert nestopt.to_spec(lamb) == {"level": "lamb", "weight_decay": 0.1}
    assert nestopt.build("level", nestopt.to_spec(lamb)) == lamb != levels.lamb()
    assert list(lamb.levels) == ["adam", "weight_decay", "trust_ratio"]
    with pytest.raises(nestopt.ConfigError, match=r"betas: \(0\.9, 1\.0\) is not allowed"):
        nestopt.build("level", {"level": "lamb", "betas": [0.9, 1.0]})
    with pytest.raises(nestopt.ConfigError, match="levels"):
        nestopt.build("level", {"level": "lamb", "levels": ["adam"]})


def test_schedules_copies_and_changes_reach_into_a_recipe() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 2))
    optimizer = nestopt.optimizer([weight], levels.lamb(), lr=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=5)
    weight.grad = torch.randn(3, 2)
    optimizer.step()
    schedule.step()
    (group,) = optimizer.param_groups
    assert optimizer.level(group).levels["adam"].betas == (group["momentum"], 0.999) != (0.9, 0.999)
    assert levels.lamb() == copy.deepcopy(levels.lamb()) == pickle.loads(pickle.dumps(levels.lamb()))
    changed = dataclasses.replace(levels.lamb(), weight_decay=0.5)
    assert changed.levels["weight_decay"] == weight_decay(0.5)
