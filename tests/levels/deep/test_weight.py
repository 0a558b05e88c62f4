from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from nestopt.levels.deep.weight import _Moved, _Squares, _Times

F64 = torch.float64
B, C, OUT, IN = 2, 3, 4, 5


PRODUCT = torch.matmul


def applied(weight: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return _Times.apply(weight, x, False, PRODUCT)


def pulled(weight: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    return _Times.apply(weight, d, True, PRODUCT)


def case() -> dict[str, Tensor]:
    shapes = {
        "weight": (OUT, IN),
        "momentum": (OUT, IN),
        "x": (C, IN),
        "d": (C, OUT),
        "added": (C, OUT),
        "left": (C, OUT),
    }
    given = {name: torch.randn(B, *shape, dtype=F64) for name, shape in shapes.items()}
    given |= {name: torch.rand(B, dtype=F64) for name in ("gamma", "c", "theta")}
    return {name: x.requires_grad_() for name, x in given.items()}


def chain(given: dict[str, Tensor], gated: bool, remembers: bool) -> list[Tensor]:
    """Every use in turn, and then the move."""
    weight, momentum = given["weight"], given["momentum"] if remembers else None
    y, weight = applied(weight, given["x"])
    b, weight = pulled(weight, given["d"])
    s, weight = _Squares.apply(weight, None, None, None, None, None, PRODUCT)
    z, weight = applied(weight, given["x"].tanh())
    wide = {name: given[name][:, None, None] for name in ("gamma", "c", "theta")}
    gamma = wide["gamma"] if gated else None
    c, theta, left = (wide["c"], wide["theta"], given["left"]) if remembers else (None, None, None)
    later, weight, *handed = _Squares.apply(weight, momentum, gamma, c, given["added"], given["x"], PRODUCT)
    outs = [y, b, s, z, later]
    if remembers:
        r, momentum = applied(handed[0], given["x"])
        outs.append(r)
    ends = _Moved.apply(weight, momentum, given["x"], gamma, given["added"], c, theta, left, PRODUCT)
    return [*outs, *([ends] if isinstance(ends, Tensor) else ends)]


def plain(given: dict[str, Tensor], gated: bool, remembers: bool) -> list[Tensor]:
    weight, momentum, x = given["weight"], given["momentum"], given["x"]
    outs = [x @ weight.mT, given["d"] @ weight, (weight * weight).sum(-2), x.tanh() @ weight.mT]
    new = (given["gamma"][:, None, None] if gated else 1) * weight - given["added"].mT @ x
    if not remembers:
        return [*outs, (new * new).sum(-2), new]
    new = new - given["c"][:, None, None] * momentum
    outs.append((new * new).sum(-2))
    return [*outs, x @ momentum.mT, new, given["theta"][:, None, None] * momentum + given["left"].mT @ x]


def gradients(outs: Sequence[Tensor], leaves: Sequence[Tensor], probes: Sequence[Tensor], **how: bool) -> list[Tensor]:
    found = torch.autograd.grad(outs, leaves, probes, allow_unused=True, **how)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def close(mine: Sequence[Tensor], true: Sequence[Tensor]) -> None:
    torch.testing.assert_close(list(mine), list(true), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("remembers", [False, True])
def test_equals_plain_products_with_every_gradient(gated: bool, remembers: bool) -> None:
    given = case()
    fast, slow = chain(given, gated, remembers), plain(given, gated, remembers)
    close(fast, slow)
    probes, leaves = [torch.randn_like(x) for x in slow], list(given.values())
    close(gradients(fast, leaves, probes), gradients(slow, leaves, probes))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("remembers", [False, True])
def test_compiled_in_one_graph_with_every_gradient(gated: bool, remembers: bool) -> None:
    torch._dynamo.reset()
    given = case()
    compiled = torch.compile(lambda given: chain(given, gated, remembers), fullgraph=True, backend="eager")
    fast, slow = compiled(given), chain(given, gated, remembers)
    close(fast, slow)
    probes, leaves = [torch.randn_like(x) for x in slow], list(given.values())
    close(gradients(fast, leaves, probes), gradients(slow, leaves, probes))


@pytest.mark.parametrize("used", range(7))
def test_any_one_output_alone(used: int) -> None:
    given = case()
    fast, slow = chain(given, True, True)[used], plain(given, True, True)[used]
    leaves = list(given.values())
    close(gradients([fast], leaves, [torch.ones_like(fast)]), gradients([slow], leaves, [torch.ones_like(slow)]))


@pytest.mark.parametrize("wanted", list(case()))
def test_any_one_input_alone(wanted: str) -> None:
    given = {name: x.detach().requires_grad_(name == wanted) for name, x in case().items()}
    outs, slow = ([x for x in way(given, True, True) if x.requires_grad] for way in (chain, plain))
    close(
        gradients(outs, [given[wanted]], [torch.ones_like(x) for x in outs]),
        gradients(slow, [given[wanted]], [torch.ones_like(x) for x in slow]),
    )


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("remembers", [False, True])
def test_second_derivatives(gated: bool, remembers: bool) -> None:
    given = case()

    def run(*values: Tensor) -> tuple[Tensor, ...]:
        return tuple(chain(dict(zip(given, values, strict=True)), gated, remembers))

    torch.autograd.gradcheck(run, tuple(given.values()))
    torch.autograd.gradgradcheck(run, tuple(given.values()))


def test_gradients_that_were_given_stay_as_they_are() -> None:
    given = case()
    outs, leaves = chain(given, False, True), list(given.values())
    probes = [torch.randn_like(x) for x in outs]
    before = [probe.clone() for probe in probes]
    once = gradients(outs, leaves, probes, retain_graph=True)
    twice = gradients(outs, leaves, probes, retain_graph=True)
    graphed = gradients(outs, leaves, probes, create_graph=True)
    for mine, true in ((probes, before), (twice, once)):
        torch.testing.assert_close(mine, true, rtol=0, atol=0)
    close(graphed, once)


def test_a_weight_is_handed_on_without_a_copy_and_its_gradient_is_one() -> None:
    weight = torch.randn(B, OUT, IN, requires_grad=True)
    y, used = applied(weight, torch.randn(B, C, IN))
    assert used.data_ptr() == weight.data_ptr()
    gradient = torch.randn(B, OUT, IN)
    (found,) = torch.autograd.grad([y, used], weight, [torch.randn_like(y), gradient])
    assert found.data_ptr() == gradient.data_ptr()  # the one of the next use, written on


@pytest.mark.parametrize("over", [["weight"], ["x"], ["gamma", "c"], ["weight", "momentum", "x", "d", "added", "left"]])
def test_vmap_is_a_loop(over: list[str]) -> None:
    given = case()
    many = {name: torch.stack([case()[name] for _ in range(3)]) if name in over else x for name, x in given.items()}
    many = {name: x.detach().requires_grad_() for name, x in many.items()}
    fast = torch.vmap(lambda x: chain(x, True, True), in_dims=({name: 0 if name in over else None for name in many},))(
        many
    )
    loop = [plain({name: x[i] if name in over else x for name, x in many.items()}, True, True) for i in range(3)]
    slow = [torch.stack(x) for x in zip(*loop, strict=True)]
    close(fast, slow)
    probes, leaves = [torch.randn_like(x) for x in slow], list(many.values())
    close(gradients(fast, leaves, probes), gradients(slow, leaves, probes))
