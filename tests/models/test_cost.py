"""Memory that training takes, counted on tensors that hold no data."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from nestopt.levels import cms, self_modifying
from nestopt.models import HopeLM
from nestopt.models.cost import Cost, CostCounter, Live, cost_of, peak_bytes


def test_counts_what_is_held_at_a_time() -> None:
    def run() -> None:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1  # a view takes nothing
        del a, b
        c = torch.zeros(1500)
        del c

    assert peak_bytes(run) == 8000
    with FakeTensorMode():
        assert peak_bytes(run) == 8000


def test_what_was_there_before_does_not_count() -> None:
    before = torch.zeros(1000)
    with Live() as live:
        before.add_(1)
        before.view(10, 100).mul_(2)
        torch._foreach_add_([before], 1)
        assert live.peak == 0
        made = before + 1
        made.add_(1)
    assert live.peak == live.now == 4000
    del made
    assert live.now == 0


def test_what_is_set_apart_counts_in_the_whole_only() -> None:
    with Live() as live:
        kept = torch.zeros(1000)
        live.set_apart(kept)
        other = torch.zeros(500)
        del kept, other
        third = torch.zeros(100)
    assert (live.peak, live.peak_else, live.now) == (6000, 4000, 400)
    assert third.numel() == 100


def test_counts_products_meanwhile() -> None:
    with Live() as live:
        torch.zeros(3, 4) @ torch.zeros(4, 5)
    assert live.cost.flops == 2 * 3 * 4 * 5


def test_a_lap_has_its_own_peak() -> None:
    with Live() as live:
        kept = torch.zeros(1000)
        live.set_apart(kept)
        other = torch.zeros(500)
        assert live.lap() == (6000, 4000)
        del other
        third = torch.zeros(100)
    assert live.lap() == (6000, 2000)  # what was held at its start counts
    assert live.lap() == (4400, 400)
    assert kept.numel() + third.numel() == 1100


def test_what_an_operation_writes_and_reads_is_counted_once_each() -> None:
    a, b = torch.zeros(2, 100).unbind()
    for run, passes in (
        (lambda: a + b, 3),
        (lambda: a.add_(b), 3),
        (lambda: torch.add(a, b, out=a), 3),
        (lambda: a.copy_(b), 2),
        (a.zero_, 1),
        (lambda: torch._foreach_add_([a, b], 1.0), 4),
        (lambda: torch._foreach_mul([a, b], 2.0), 4),
        (lambda: a.view(10, 10), 0),
    ):
        assert cost_of(run).bytes == passes * 400


def test_products_in_place_count_as_others() -> None:
    a, b, c = torch.zeros(2, 3, 4), torch.zeros(2, 4, 5), torch.zeros(2, 3, 5)
    assert cost_of(lambda: torch.baddbmm(c, a, b)).products == {"float32": 2 * 2 * 3 * 4 * 5}
    assert cost_of(lambda: c.baddbmm_(a, b)).products == {"float32": 2 * 2 * 3 * 4 * 5}
    assert cost_of(lambda: c[0].addmm_(a[0], b[0])).products == {"float32": 2 * 3 * 4 * 5}


def test_what_the_host_does_beside_a_device_does_not_count_for_it() -> None:
    clock, weight = torch.zeros(()), torch.empty(10, device="meta")

    def run() -> None:
        clock.add_(1)
        weight.mul_(2)

    assert cost_of(run, "meta") == Cost(bytes=80, ops=1)
    assert cost_of(run).ops == 2
    with Live("meta") as live:
        kept = torch.zeros(5), torch.zeros(7, device="meta")
    assert live.now == 28
    assert len(kept) == 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("groups", [1, 2])
def test_attention_on_meta_is_a_kernel_each_way(dtype: torch.dtype, masked: bool, groups: int) -> None:
    q = torch.empty(2, 4, 64, 16, dtype=dtype, device="meta", requires_grad=True)
    k, v = (torch.empty(2, 4 // groups, 64, 16, dtype=dtype, device="meta", requires_grad=True) for _ in "kv")
    mask = torch.ones(64, 64, dtype=torch.bool, device="meta") if masked else None

    def run() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked, enable_gqa=groups > 1)

    with CostCounter("meta") as counter:
        y = run()
        forward = counter.cost
        y.backward(torch.empty_like(y))
    name, product = str(dtype).removeprefix("torch."), 2 * 2 * 4 * 64 * 64 * 16
    assert forward.products == {name: 2 * product}
    assert counter.cost.products == {name: 7 * product}  # scores are made again
    assert y.shape == q.grad.shape == q.shape
    assert k.grad.shape == v.grad.shape == k.shape
    assert forward.ops == 1 + 3 * masked + 2 * (groups - 1)  # masks as numbers, and keys and values once a head
    if forward.ops == 1:  # queries, keys, values, answers, and a number for each query and head: no scores
        assert forward.bytes == pytest.approx(4 * q.numel() * q.element_size() + 4 * 2 * 4 * 64, abs=32)


def test_a_norm_on_meta_is_a_kernel_each_way() -> None:
    x = torch.empty(8, 16, 32, device="meta", requires_grad=True)
    norm = torch.nn.RMSNorm(32, device="meta")
    with CostCounter("meta") as counter:
        y = norm(x)
        assert counter.cost.ops == 1
        y.backward(torch.empty_like(y))
    assert counter.cost.ops == 2
    assert counter.cost.bytes == pytest.approx(5 * x.numel() * 4, rel=0.1)
    assert cost_of(lambda: norm(x)).ops == 1  # and so each time
    mixed = torch.nn.RMSNorm(32, device="meta", dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="Cannot dispatch to fused implementation"):
        assert cost_of(lambda: mixed(x)).ops > 4  # on CUDA, too
    numbers = torch.randn(4, 32)
    with CostCounter():
        within = F.rms_norm(numbers, (32,))
    torch.testing.assert_close(within, F.rms_norm(numbers, (32,)), rtol=0, atol=0)


def peak(length: int, segment: int) -> int:
    """Of a training step of Hope on one sequence."""
    mlp = cms(periods=(16,), learn="context", teach="loss", through="first_order")
    mixer = self_modifying(chunk=8, projection_chunk=16)
    model = HopeLM(vocab=64, dim=32, blocks=1, heads=2, mixer=mixer, mlp=mlp, segment=segment)
    tokens = torch.zeros(1, length + 1, dtype=torch.int64)
    return peak_bytes(lambda: model.loss(tokens, piece=32)[0].backward())  # noqa: PLW0108  # the forward counts, too


@pytest.mark.slow
def test_with_segments_memory_grows_with_the_root_of_the_length() -> None:
    lengths = 64, 1024
    whole, cut = ([peak(n, s * 4 * math.isqrt(n)) for n in lengths] for s in (0, 1))
    assert whole[1] / whole[0] == pytest.approx(16, rel=0.15)
    assert cut[1] / cut[0] < 6  # √16 = 4; what is as long as the sequence, tokens and the residual stream, is small
