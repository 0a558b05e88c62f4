"""The convolution and the norms of layers, beside torch's own and their derivatives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import grad, vmap

from nestopt.kernels.causal_conv import causal_conv
from nestopt.kernels.unit import unit

F64 = torch.float64

Function = Callable[..., Tensor]


def conv(seen: Tensor, weight: Tensor) -> Tensor:
    """By torch's own."""
    width = weight.shape[-2]
    return seen[:, width - 1 :] + F.conv1d(seen.mT, weight.mT[:, None], groups=seen.shape[-1]).mT


def normalize(x: Tensor) -> Tensor:
    return F.normalize(x, dim=-1)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-5)


def own_rms(x: Tensor) -> Tensor:
    return unit(x, 1e-5)


def inputs(function: Function) -> list[Tensor]:
    if function is causal_conv:
        return [torch.randn(2, 6, 5, dtype=F64), torch.randn(3, 5, dtype=F64)]
    return [torch.randn(2, 3, 5, dtype=F64)]


PAIRS = pytest.mark.parametrize(
    ("own", "other"), [(causal_conv, conv), (unit, normalize), (own_rms, rms)], ids=["conv", "unit", "rms"]
)


@PAIRS
def test_it_is_torchs_own_with_its_gradients_of_first_and_second_order(own: Function, other: Function) -> None:
    given = [x.requires_grad_() for x in inputs(own)]
    torch.testing.assert_close(own(*given), other(*given), rtol=1e-12, atol=1e-12)
    wanted = torch.autograd.grad(other(*given).sin().sum(), given)
    torch.testing.assert_close(torch.autograd.grad(own(*given).sin().sum(), given), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(own, given)
    assert torch.autograd.gradgradcheck(own, given)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
@PAIRS
@pytest.mark.parametrize("mapped", range(2))
def test_it_can_be_mapped_and_compiled(own: Function, other: Function, mapped: int) -> None:
    given = inputs(own)
    dims = [0 if i == mapped else None for i in range(len(given))] if len(given) > 1 else [0]
    many = [torch.randn(4, *x.shape, dtype=F64) if dim == 0 else x for x, dim in zip(given, dims, strict=True)]

    def slopes(function: Function) -> tuple[Tensor, ...]:
        each = tuple(range(len(given)))
        return vmap(grad(lambda *x: function(*x).sin().sum(), argnums=each), in_dims=tuple(dims))(*many)

    torch.testing.assert_close(slopes(own), slopes(other), rtol=1e-12, atol=1e-12)
    compiled = torch.compile(own, fullgraph=True, backend="aot_eager")
    given = [x.requires_grad_() for x in given]
    (first, *_) = torch.autograd.grad(compiled(*given).sin().sum(), given)
    torch.testing.assert_close(first, torch.autograd.grad(other(*given).sin().sum(), given)[0])


def test_short_vectors_have_the_gradient_of_what_they_are_divided_by() -> None:
    x = torch.tensor([[0.0, 0.0], [3e-13, 4e-13], [3e-12, 4e-12]], dtype=F64, requires_grad=True)
    dy = torch.randn(3, 2, dtype=F64)
    (own,) = torch.autograd.grad(unit(x), x, dy)
    (other,) = torch.autograd.grad(normalize(x), x, dy)
    torch.testing.assert_close(own, other, rtol=1e-9, atol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e-3, 1.0, 3e3])
@pytest.mark.parametrize("own", [unit, own_rms])
def test_float16_has_numbers_of_any_size(own: Function, size: float) -> None:
    """Squares that float16 can't hold, and vectors of zeros: as in float32, but for vectors shorter than 2^-10."""
    x = (torch.randn(4, 8) * size).half()
    x[1] = 0
    wide = x.double().requires_grad_()
    narrow = x.clone().requires_grad_()
    y = own(narrow)
    weight = torch.randn(4, 8)
    (y.float() * weight).sum().backward()
    length = wide.norm(dim=-1, keepdim=True).clamp_min(2.0**-10)
    want = wide / length if own is unit else rms(wide)
    (want * weight).sum().backward()
    assert narrow.grad is not None
    assert wide.grad is not None
    torch.testing.assert_close(y.double(), want, rtol=2e-3, atol=1e-4)
    scale = float(wide.grad.abs().max())
    torch.testing.assert_close(narrow.grad.double(), wide.grad, rtol=4e-3, atol=2e-3 * scale)
