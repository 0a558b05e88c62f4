"""Parameters that are several matrices side by side."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor

from nestopt.core import Level, chain
from nestopt.levels import adam, delta_momentum, m3, momentum, muon, shampoo
from nestopt.optim import Nested, Split

LEVELS: list[Level] = [
    muon(dtype="float64"),
    delta_momentum(),  # through vmap
    shampoo(),
    m3(slow_period=2, dtype="float64"),
    chain(delta_momentum(), muon(dtype="float64")),
    chain(momentum(0.9), adam()),  # elementwise: a view makes no difference
]
STEPS = 5


def grads(shape: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def start(dim: int) -> Tensor:
    return torch.arange(72, dtype=torch.float64).reshape(12, 6).sin() if dim == 0 else start(0).mT.contiguous()


def run(params: list[Tensor], gradients: list[list[Tensor]], level: Level, **group: Any) -> Nested:
    optimizer = Nested([{"params": params, **group}], level, lr=0.1, weight_decay=0.1)
    for step in gradients:
        for param, grad in zip(params, step, strict=True):
            param.grad = grad.clone()
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("level", LEVELS, ids=lambda level: level.label)
def test_a_split_parameter_is_its_parts(level: Level, dim: int) -> None:
    whole = start(dim).requires_grad_()
    parts = [part.clone().requires_grad_() for part in start(dim).chunk(3, dim)]
    shown = grads(tuple(whole.shape))
    run([whole], [[grad] for grad in shown], level, view=Split(3, dim))
    run(parts, [list(grad.chunk(3, dim)) for grad in shown], level)
    torch.testing.assert_close(whole, torch.cat(parts, dim), rtol=1e-12, atol=1e-12)


def test_it_matters() -> None:
    with_view, without = (start(0).requires_grad_() for _ in range(2))
    shown = [[grad] for grad in grads((12, 6))]
    run([with_view], shown, muon(), view=Split(3))
    run([without], shown, muon())
    assert not torch.allclose(with_view, without, atol=1e-3)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_checkpoint_goes_on_bit_for_bit(capturable: bool) -> None:
    shown = grads((12, 6))

    def make(param: Tensor) -> Nested:
        group = {"params": [param], "view": Split(3)}
        return Nested([group], chain(delta_momentum(), muon(dtype="float64")), lr=0.1, capturable=capturable)

    def feed(optimizer: Nested, param: Tensor, steps: list[Tensor]) -> None:
        for grad in steps:
            param.grad = grad.clone()
            optimizer.step()

    straight, broken = (start(0).requires_grad_() for _ in range(2))
    feed(make(straight), straight, shown)
    first = make(broken)
    feed(first, broken, shown[:3])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make(broken)
    second.load_state_dict(torch.load(file, weights_only=True))
    feed(second, broken, shown[3:])
    assert torch.equal(straight, broken)


def test_a_checkpoint_of_another_view_is_refused() -> None:
    param = start(0).requires_grad_()
    saved = run([param], [[grads((12, 6))[0]]], muon(), view=Split(3)).state_dict()
    with pytest.raises(ValueError, match=r"param_groups\[0\].view"):
        run([param], [], muon(), view=Split(2)).load_state_dict(saved)


def test_wrong_views() -> None:
    param = torch.zeros(10, 4, requires_grad=True)
    with pytest.raises(ValueError, match="no matrix of 3 equal parts"):
        Nested([{"params": [("qkv", param)], "view": Split(3)}], muon())
    with pytest.raises(TypeError, match=r"nestopt.optim.Split"):
        Nested([{"params": [param], "view": 3}], muon())
    with pytest.raises(ValueError, match="layer inputs"):
        Nested([{"params": [param], "view": Split(2)}], "dgd")
    with pytest.raises(ValueError, match="parts=0"):
        Split(0)
    with pytest.raises(ValueError, match="dim=2"):
        Split(2, 2)
