"""Decays for each channel of the keys, beyond what holds of every matrix memory (`test_matrix_memories`)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import nestopt
from nestopt import Channels, Gate, Level
from nestopt.core.memories import Mlp
from nestopt.core.part import FieldError
from nestopt.core.retentions import Decay
from nestopt.levels import gated_linear, gla, hgrn2, kda, log_linear, mesa, momentum, rwkv6, titans
from nestopt.ops import delta_rule, linear_attention, run
from tests.levels.matrix.twins import CASES, F64, leaves, loop_delta_rule, loop_linear_attention


@pytest.mark.parametrize("name", ["linear attention, channels", "delta, channels"])
@pytest.mark.parametrize("strong", [1e-3, 1e-30, 0.0])
def test_strong_decays_of_some_channels_leave_all_digits_of_the_others(name: str, strong: float) -> None:
    case = CASES[name]
    inputs = {key: x.float() for key, x in case.inputs(1, 192, dim_k=8, dim_v=8).items()}
    inputs["decay"] = torch.full_like(inputs["decay"], strong)
    inputs["decay"][..., ::2] = 0.999
    inputs["decay"][:, 70:75] = 1.0
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    exact = {key: x.detach().double().requires_grad_() for key, x in inputs.items()}
    out, true = case.run("fast", inputs, chunk=64), case.run("slow", exact)
    torch.testing.assert_close((out[0].double(), out[1].double()), true, rtol=1e-5, atol=1e-5)
    got, wanted = (
        torch.autograd.grad(y.square().sum() + m.sum(), leaves(given))
        for (y, m), given in ((out, inputs), (true, exact))
    )
    for mine, right in zip(got, wanted, strict=True):  # that of a decay of 0 is right too: nothing is a logarithm
        assert float((mine.double() - right).abs().max() / right.abs().max()) < 1e-4


def test_a_decay_that_is_the_same_in_all_channels_is_that_of_a_head() -> None:
    for case in ("linear attention, decay", "delta, decay"):
        inputs = CASES[case].inputs(2, 70)
        of_head = CASES[case].run("fast", inputs)
        inputs["decay"] = inputs["decay"][..., None].expand(-1, -1, -1, 3)
        torch.testing.assert_close(CASES[case].run("fast", inputs), of_head, rtol=1e-10, atol=1e-10)


def test_levels_are_the_recurrences() -> None:
    q, k, v = (torch.nn.functional.normalize(torch.randn(2, 70, 2, 4, dtype=F64), dim=-1) for _ in range(3))
    keep, eta = torch.rand(2, 70, 2, 4, dtype=F64), torch.rand(2, 70, 2, dtype=F64)
    y, state = run(gla(), q, k, v, gates={"retention.keep": keep})
    torch.testing.assert_close(
        (y, state["level"]["memory"]["m"]), loop_linear_attention(q, k, v, decay=keep), rtol=1e-10, atol=1e-10
    )
    y, state = run(kda(), q, k, v, gates={"retention.keep": keep, "lr": eta})
    torch.testing.assert_close(
        (y, state["level"]["memory"]["m"]), loop_delta_rule(q, k, v, lr=eta, decay=keep), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("chunks", [[130], [3, 60, 1, 66]])
def test_hgrn2_writes_what_it_forgets(chunks: list[int]) -> None:
    q, k, v = (torch.randn(2, 130, 2, 4, dtype=F64) for _ in range(3))
    level, ys, state = hgrn2(), [], None
    for at in torch.arange(130).split(chunks):
        y, state = run(level, q[:, at], k[:, at], v[:, at], state=state)
        ys.append(y)
    m, wanted = torch.zeros(2, 2, 4, 4, dtype=F64), []
    least = torch.tensor([0.5, 0.75], dtype=F64)[:, None]
    for t in range(130):
        keep = least + (1 - least) / (1 + torch.exp(-k[:, t]))
        m = m * keep[:, :, None] + v[:, t, :, :, None] * (1 - keep)[:, :, None]
        wanted.append((m @ q[:, t, :, :, None])[..., 0])
    assert state is not None
    end = state["level"]["memory"]["m"]
    torch.testing.assert_close((torch.cat(ys, 1), end), (torch.stack(wanted, 1), m), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunks", [[130], [3, 60, 1, 66]])
def test_rwkv6_answers_with_the_present_pair_by_its_bonus(chunks: list[int]) -> None:
    q, k, v = (torch.randn(2, 130, 2, 4, dtype=F64) for _ in range(3))
    keep, bonus = torch.rand(2, 130, 2, 4, dtype=F64), torch.randn(2, 4, dtype=F64)
    ys, state = [], None
    for at in torch.arange(130).split(chunks):
        gates = {"retention.keep": keep[:, at]}
        y, state = run(rwkv6(), q[:, at], k[:, at], v[:, at], gates=gates, state=state, learned={"bonus": bonus})
        ys.append(y)
    m, wanted = torch.zeros(2, 2, 4, 4, dtype=F64), []
    for t in range(130):
        pair = v[:, t, :, :, None] * k[:, t, :, None]
        wanted.append(((m + pair * bonus[:, None]) @ q[:, t, :, :, None])[..., 0])
        m = m * keep[:, t, :, None] + pair
    assert state is not None
    end = state["level"]["memory"]["m"]
    torch.testing.assert_close((torch.cat(ys, 1), end), (torch.stack(wanted, 1), m), rtol=1e-10, atol=1e-10)


def test_a_layer_learns_the_bonus_and_goes_on_with_it() -> None:
    layer = nestopt.layer("rwkv6", dim=8, heads=2)
    x = torch.randn(1, 5, 8)
    _, state = layer(x)
    with torch.no_grad():
        layer.start["bonus"].zero_()
    y, _ = layer(x[:, :1], state)
    y.sum().backward()
    bonus = layer.start["bonus"]
    assert bonus.shape == (2, 4)
    assert bonus.grad is not None
    assert bonus.grad.any()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hgrn2(retention=Decay(0.9)), r"hgrn2: retention=.* is not allowed: its keys say what is kept"),
        (lambda: hgrn2(lower=1.0), r"hgrn2: lower=1.0 is not allowed; give a number in \[0, 1\)"),
        (lambda: rwkv6(read="after"), r"rwkv6: read='after' is not allowed: its bonus is for read='before'"),
    ],
)
def test_says_what_hgrn2_and_rwkv6_do_not_allow(make: Callable[[], Level], message: str) -> None:
    with pytest.raises(FieldError, match=message):
        make()


def test_says_where_a_number_for_each_channel_is_not_allowed() -> None:
    each = Channels(0.9)
    with pytest.raises(FieldError, match=r"gated_linear: lr=Channels\(0.9\) is not allowed; give a number, or a Gate"):
        gated_linear(lr=each)
    with pytest.raises(FieldError, match=r"momentum: beta=Channels\(0.9\) is not allowed"):
        momentum(each)
    with pytest.raises(FieldError, match=r"titans: retention=.* is not allowed with memory=Mlp.*; give memory=Matrix"):
        titans(retention=Decay(each), memory=Mlp())
    for level in (mesa, log_linear):
        with pytest.raises(FieldError, match=r"retention=.* is not allowed: one share is kept of all; give a Gate"):
            level(retention=Decay(each))
    with pytest.raises(FieldError, match=r"kda: retention=.* is not allowed with chunk=4; give chunk=1, or a Gate"):
        kda(chunk=4, fade="with")
    inputs = CASES["delta, channels"].inputs(2, 5)
    with pytest.raises(ValueError, match=r"decay has the shape \[2, 5, 2, 3\], one for each channel; with momentum"):
        delta_rule(**inputs, momentum=0.5)
    with pytest.raises(ValueError, match=r"decay has the shape \[2, 5, 2, 4\] and q \[2, 5, 2, 3\]"):
        linear_attention(*(inputs[name] for name in "qkv"), decay=torch.ones(2, 5, 2, 4))
    gates = {"retention.keep": torch.ones(2, 5, 2)}
    with pytest.raises(ValueError, match=r"must be \[2, 5, 2, 3\], 3 numbers for each token and head"):
        run(gla(), *(inputs[name] for name in "qkv"), gates=gates)
    assert Channels(0.9) != Gate(0.9)
    assert repr(Channels(0.9, 0.5)) == "Channels(0.9, low=0.5, high=1.0)"
