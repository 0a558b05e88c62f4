"""`nestopt.core.precision`: products of every shape, what is dispatched for them, and torch's switch."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt.core import Level
from nestopt.core import precision as precisions
from nestopt.core.precision import (
    PRECISIONS,
    EveryProduct,
    Precision,
    check_precision,
    check_products,
    current,
    matmul,
    plus_matmul,
    plus_matmul_,
    product,
    products_in,
    tf32_is_on,
)
from nestopt.levels import deltanet, dgd, self_modifying, titans
from nestopt.nn import SequenceMemory
from tests.core.products import Products

SHAPES = {
    "vectors": ((5,), (5,)),
    "matrix, vector": ((3, 5), (5,)),
    "vector, matrix": ((5,), (5, 4)),
    "matrices": ((3, 5), (5, 4)),
    "many, one": ((2, 6, 3, 5), (5, 4)),
    "one, many": ((3, 5), (2, 6, 5, 4)),
    "many": ((2, 6, 3, 5), (2, 6, 5, 4)),
    "broadcast": ((2, 1, 3, 5), (6, 5, 4)),
    "many, vector": ((2, 6, 3, 5), (5,)),
    "of nothing": ((2, 0, 5), (2, 5, 4)),
}


@pytest.fixture(autouse=True)
def torchs_switch_is_put_back() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    yield
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert current() == "float32"


def far(a: Tensor, b: Tensor) -> float:
    return float((a.detach().double() - b.detach()).norm() / b.detach().norm().clamp_min(1e-30))


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_bfloat16_rounds_factors_and_gives_float32_with_two_derivatives(shapes: tuple[Any, Any]) -> None:
    torch.manual_seed(0)
    a, b = (torch.randn(shape, requires_grad=True) for shape in shapes)
    true = [x.detach().double().requires_grad_() for x in (a, b)]
    probe = torch.randn_like(matmul(a, b))
    found = []
    for one, two, w, p in ((a, b, probe, "bfloat16"), (*true, probe.double(), "float32")):
        with products_in(p):
            y = matmul(one, two)
        first = torch.autograd.grad((y * w).square().sum(), (one, two), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), (one, two))
        found.append([y, *first, *second])
    for low, high in zip(*found, strict=True):
        assert low.dtype == torch.float32
        assert low.shape == high.shape
        assert far(low, high) < 0.03
    if y.numel():
        assert far(found[0][0], found[1][0]) > 1e-5  # it is not float32


def everything(a: Tensor, b: Tensor, c: Tensor, precision: Precision) -> list[Tensor]:
    """Products of all kinds, forward, backward and backward again."""
    with products_in(precision):
        y = plus_matmul(matmul(a, b), a, b) + matmul(a, c)
    first = torch.autograd.grad(y.square().sum(), (a, b, c), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b, c))
    with torch.no_grad(), products_in(precision):
        y = y.detach().clone()
        plus_matmul_(y, a, b)
    return [y, *first, *second]


def factors(device: str = "cpu") -> list[Tensor]:
    shapes = (2, 3, 5), (2, 5, 4), (5, 4)
    return [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_product_is_dispatched_as_it_is_to_be(precision: Precision, device: str) -> None:
    with Products() as products:
        everything(*factors(device), precision)
    assert len(products.seen) > 20
    assert set(products.seen) == {precision}
    assert not tf32_is_on()


def test_float32_is_the_operator_itself_to_the_bit() -> None:
    torch.manual_seed(0)
    a, b, c = factors()
    y = torch.baddbmm(a @ b, a, b) + a @ c
    first = torch.autograd.grad(y.square().sum(), (a, b, c), create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), (a, b, c))
    found = everything(a, b, c, "float32")
    torch.testing.assert_close(found, [torch.baddbmm(y, a, b), *first, *second], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_other_dtypes_are_left_as_they_are(precision: Precision, dtype: torch.dtype) -> None:
    a, b, _ = (x.detach().to(dtype) for x in factors())
    with products_in(precision):
        torch.testing.assert_close(matmul(a, b), a @ b, rtol=0, atol=0)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("shared", [0, 1, None], ids=["left", "right", "neither"])
def test_many_at_once_are_each(precision: Precision, shared: int | None) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 3, 5), torch.randn(4, 5, 2)
    dims = tuple(None if i == shared else 0 for i in range(2))
    given = [x[0] if dim is None else x for x, dim in zip((a, b), dims, strict=True)]

    def loss(a: Tensor, b: Tensor) -> Tensor:
        with products_in(precision):
            return matmul(matmul(a, b).sin(), b.mT).square().sum()

    for function in (loss, grad(loss), grad(lambda a, b: grad(loss)(a, b).square().sum())):
        every = vmap(function, in_dims=dims)(*given)
        each = [function(*(x if d is None else x[i] for x, d in zip(given, dims, strict=True))) for i in range(4)]
        torch.testing.assert_close(every, torch.stack(each), rtol=0.02, atol=0.02)
    with Products() as products:
        vmap(grad(loss), in_dims=dims)(*given)
    assert set(products.seen) == {precision}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it traces and compiles
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_one_graph_holds_all_of_it(precision: Precision, backend: str) -> None:
    torch._dynamo.reset()

    def run(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        with products_in(precision):
            return plus_matmul(matmul(a, b), a, b).sin() + matmul(a, c)

    given = factors()
    y, fast = run(*given), torch.compile(run, fullgraph=True, backend=backend)(*given)
    tolerance = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(fast, y, **tolerance)
    found, wanted = (torch.autograd.grad(x.square().sum(), given) for x in (fast, y))
    torch.testing.assert_close(found, wanted, **tolerance)


# -- which it is, and where --------------------------------------------------------------------------------------------


def test_a_precision_ends_with_its_block_also_after_an_error() -> None:
    with products_in("bfloat16"):
        with products_in("tf32"):
            assert current() == "tf32"
        with pytest.raises(RuntimeError), products_in("tf32"):
            matmul(torch.ones(2, 3), torch.ones(2, 3))
        assert current() == "bfloat16"
        assert not tf32_is_on()


def test_each_thread_has_its_own() -> None:
    found = []
    with products_in("bfloat16"):
        thread = threading.Thread(target=lambda: found.append(current()))
        thread.start()
        thread.join()
    assert found == ["float32"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_backward_pass_on_another_thread_has_its_forwards(precision: Precision) -> None:
    """As on a GPU; and what holds where the backward pass is called from is no matter."""
    a, b, _ = factors("meta")
    with products_in(precision):
        y = matmul(a, b).sum()
    seen: list[str] = []

    def run() -> None:
        with Products() as products, products_in("float32"):
            y.backward()
        seen.extend(products.seen)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [precision] * 2


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_product_multiplies_elsewhere_as_where_it_was_asked_for(precision: Precision) -> None:
    a, b, _ = factors("meta")
    with products_in(precision):
        multiply = product()
    with torch.no_grad(), Products() as products, products_in("tf32" if precision == "float32" else "float32"):
        multiply(a, b)
        plus_matmul(torch.empty(2, 3, 4, device="meta"), a, b, multiply)
        plus_matmul_(torch.empty(2, 3, 4, device="meta"), a, b, multiply)
    assert products.seen == [precision] * 3


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("level", [titans(chunk=4), titans(rule=dgd(), chunk=4), deltanet(), self_modifying(chunk=4)])
def test_a_kernel_multiplies_backwards_as_forwards(level: Level, precision: Precision) -> None:
    """Wherever the backward pass is called from, its gradients are the same to the bit."""
    layer = SequenceMemory(level, 8, 2, precision=precision)
    x = torch.randn(2, 70, 8)
    gradients = []
    for elsewhere in ("float32", "bfloat16"):
        y = layer(x)[0].square().sum()
        with products_in(elsewhere):
            gradients.append(torch.autograd.grad(y, list(layer.parameters()), allow_unused=True))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_torchs_switch_comes_back_as_it_was(before: str) -> None:
    switch = torch.backends.cuda.matmul
    switch.fp32_precision = before
    try:
        with Products() as products, products_in("tf32"):
            matmul(torch.ones(2, 3), torch.ones(3, 2))
        assert products.seen == ["tf32"]
        assert switch.fp32_precision == before
    finally:
        switch.fp32_precision = "none"


def test_products_of_several_threads_share_the_switch() -> None:
    """The first sets it and the last puts it back: none loses it under the others' hands."""
    barrier, seen = threading.Barrier(4), []

    class Slow(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "mm":
                seen.append(tf32_is_on())
                barrier.wait()  # all are within their products
                seen.append(tf32_is_on())
            return func(*args, **(kwargs or {}))

    def run() -> None:
        for _ in range(20):
            with Slow(), products_in("tf32"), torch.no_grad():
                matmul(torch.ones(2, 2, device="meta"), torch.ones(2, 2, device="meta"))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [True] * 160
    assert not tf32_is_on()


# -- other people's modules --------------------------------------------------------------------------------------------


def test_products_of_modules_are_made_so_too() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 6), nn.GELU(), nn.Linear(6, 4, bias=False))
    x, weight = torch.randn(2, 3, 5), torch.randn(4, 2)
    true = module(x) @ weight
    with Products() as products, products_in("bfloat16"), EveryProduct():
        y = module(x) @ weight
        together = torch.addmm(torch.ones(2), x[0, :, :4], weight)
        scaled = torch.addmm(torch.ones(2), x[0, :, :4], weight, beta=2)  # left as it is
        y.square().sum().backward()
    assert products.seen.count("float32") == 1
    assert products.seen.count("bfloat16") == len(products.seen) - 1 == 8
    assert far(y, true.double()) < 0.02
    assert far(together, scaled.double() - 1) < 0.02
    assert y.dtype == torch.float32


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_an_unknown_precision_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"precision='bf16' is not allowed; give one of 'float32'.*mean 'bfloat16'"):
        check_precision("bf16")
    with pytest.raises(ValueError, match="CMS: precision=16 is not allowed"):
        check_precision(16, "CMS")


@pytest.mark.parametrize(
    ("precision", "device", "dtype", "why"),
    [
        ("tf32", "cpu", torch.float32, "the device is 'cpu', and only CUDA devices have"),
        ("tf32", "mps", torch.float32, "the device is 'mps', and only CUDA devices have"),
        ("bfloat16", "mps", torch.bfloat16, "the device is 'mps', and only CUDA devices and CPUs have"),
        ("bfloat16", "cpu", torch.float64, "the memories are float64"),
        ("tf32", "meta", torch.float64, "the memories are float64"),
    ],
)
def test_what_a_device_lacks_is_refused(precision: Precision, device: str, dtype: torch.dtype, why: str) -> None:
    with pytest.raises(ValueError, match=rf"Layer: precision='{precision}' is not allowed: {why}.*precision='float32'"):
        check_products(precision, torch.device(device), dtype, "Layer")


def test_what_a_device_has_is_taken() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for precision in ("tf32", "bfloat16"):
            check_products(precision, torch.device("meta"), dtype)
        check_products("bfloat16", torch.device("cpu"), dtype)
    check_products("float32", torch.device("cpu"), torch.float64)


@pytest.mark.parametrize(("capability", "allowed"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_asked_for_its_capability(
    capability: tuple[int, int], allowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(precisions, "_cuda", lambda index: ("T4", *capability))
    for precision in ("tf32", "bfloat16"):
        if allowed:
            check_products(precision, torch.device("cuda:0"), torch.float32)
        else:
            with pytest.raises(ValueError, match=r"cuda:0 \(T4\) has a compute capability of 7.5, and it takes 8.0"):
                check_products(precision, torch.device("cuda:0"), torch.float32)
