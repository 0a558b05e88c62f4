from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.levels.deep.deep_memory import deep_memory
from nestopt.levels.deep.step_size import EPS, closeness, margin, norms, step_sizes

F64 = torch.float64
READS = ("chunk", "after")


def harmonic(count: int) -> float:
    return sum(1 / i for i in range(1, count + 1))


def largest(keys: Tensor, read: str) -> Tensor:
    """The largest eigenvalue of K diag(η), the chunk's whole step, at η = 1/(margin · n): one layer, these keys."""
    n = norms(closeness([keys @ keys.mT], [None], 0.0), read) * margin(keys.shape[-2], read)  # type: ignore[arg-type]
    scaled = keys / n.sqrt()[..., None]
    return torch.linalg.eigvalsh(scaled @ scaled.mT)[..., -1]


def most(keys: Tensor, read: str, of_length: bool) -> tuple[Tensor, Tensor]:
    """Keys `[n, C, D]` moved to where `largest` is greatest, and the greatest it was on the way."""
    x = keys.clone().requires_grad_()
    optimizer, greatest = torch.optim.Adam([x], lr=0.03), torch.zeros(())
    for _ in range(250):
        found = largest(F.normalize(x, dim=-1) if of_length else x, read)
        greatest = torch.maximum(greatest, found.detach().max())
        optimizer.zero_grad()
        (-found.sum()).backward()
        optimizer.step()
    return x.detach(), greatest


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("count", [3, 8, 16])
def test_no_unit_keys_are_stepped_on_by_more_than_bound(count: int, read: str) -> None:
    """For reads of the chunk's start that is proven; for the others this search is what there is."""
    starts = torch.randn(6, count, 5, dtype=F64)
    starts[3:] = torch.randn(3, 1, 5, dtype=F64) + 0.3 * starts[3:]
    _, greatest = most(starts, read, of_length=True)
    assert greatest <= 1 + 1e-6
    equal = F.normalize(torch.randn(1, 1, 5, dtype=F64), dim=-1).expand(1, count, 5)
    torch.testing.assert_close(largest(equal, read), torch.ones(1, dtype=F64), rtol=0, atol=1e-6)
    assert greatest >= 0.9  # the search did find its way


@pytest.mark.parametrize("count", [3, 16])
def test_keys_of_any_lengths_are_not_either_where_the_whole_chunk_is_known(count: int) -> None:
    sizes = 10 ** (4 * torch.rand(6, count, 1, dtype=F64) - 2)
    _, greatest = most(torch.randn(6, count, 5, dtype=F64) * sizes, "chunk", of_length=False)
    assert greatest <= 1 + 1e-9


@pytest.mark.parametrize("read", READS)
def test_random_and_repeated_keys(read: str) -> None:
    for count, dim in itertools.product((1, 2, 7, 64), (1, 3, 32)):
        random = F.normalize(torch.randn(20, count, dim, dtype=F64), dim=-1)
        few = random[:, torch.randint(0, max(1, count // 3), (count,))]
        near = F.normalize(random[:, :1] + 0.2 * random, dim=-1)
        for keys in (random, few, near):
            assert (largest(keys, read) <= 1 + 1e-9).all()


def test_the_equations() -> None:
    count, delta = 5, 0.7
    inputs = [torch.randn(count, 3, dtype=F64), torch.randn(count, 4, dtype=F64)]
    bounds = torch.rand(count, dtype=F64) + 0.5
    lr, damping = torch.rand(count, dtype=F64), torch.rand(count, dtype=F64)

    def near(t: int, s: int) -> Tensor:
        one, two = ((a[t] @ a[s]).abs() for a in inputs)
        return one + bounds[t] * bounds[s] * two + delta * torch.maximum(one, two)

    for read, ahead in (("chunk", True), ("after", False), ("before", False)):
        found = step_sizes(
            lr,
            damping,
            [a @ a.mT for a in inputs],
            [None, bounds],
            delta=delta,
            bound=1.5,
            read=read,
            chunk=8,  # type: ignore[arg-type]
        )
        for s in range(count):
            among = range(count) if ahead else range(s + 1)
            n = sum(near(s, s) ** 0.5 * near(t, s) / near(t, t) ** 0.5 for t in among)
            eta = 1.5 * lr[s] * damping[s] / (1e-4 + n * (1 if ahead else harmonic(8)))
            torch.testing.assert_close(found[s], eta, rtol=1e-12, atol=0)


def test_keys_of_zeros() -> None:
    keys = torch.zeros(4, 3, requires_grad=True)
    found = step_sizes(
        torch.ones(4), torch.ones(4), [keys @ keys.mT], [None], delta=1.0, bound=1.0, read="chunk", chunk=4
    )
    assert torch.equal(found, torch.full((4,), 1 / EPS))
    (gradient,) = torch.autograd.grad(found.sum(), keys)
    assert torch.equal(gradient, torch.zeros(4, 3))


@pytest.mark.parametrize("bound", [0.5, 1.0, 1.9])
@pytest.mark.parametrize("read", ["after", "before", "chunk"])
@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_a_linear_memory_keeps_its_eigenvalues_within_bound(delta: float, read: str, bound: float) -> None:
    """The map of a whole chunk on the memory, of which the values are 0: within [1 - bound, 1] without momentum."""
    dim, count = 6, 16
    keys = torch.randn(5, count, 1, dim, dtype=F64)
    keys[1] = keys[1, :1]
    keys[2] = keys[2, :1] + 0.2 * keys[2]
    keys = F.normalize(keys, dim=-1)
    if read == "chunk":
        keys[3] = keys[3] * 10 ** (2 * torch.rand(count, 1, 1, dtype=F64) - 1)
    _, state = deep_memory(
        keys,
        keys,
        torch.zeros_like(keys),
        weights=[torch.eye(dim, dtype=F64)],
        lr=1.0,
        delta=delta,
        bound=bound,
        read=read,  # type: ignore[arg-type]
        residual=False,
        chunk=count,
    )
    eigenvalues = torch.linalg.eigvals(state["weights"]["W1"])
    assert (eigenvalues.real <= 1 + 1e-9).all()
    assert (eigenvalues.real >= 1 - bound - 1e-9).all()
    assert (eigenvalues.abs() <= max(1.0, bound - 1) + 1e-9).all()
