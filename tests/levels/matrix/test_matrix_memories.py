"""What must hold of every matrix memory on tokens, each compared with its loop over tokens in `twins`."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nestopt.levels.matrix import segments
from tests.levels.matrix.twins import CASES, F64, Case, leaves, mapped

each = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
some = pytest.mark.parametrize(
    "case",
    [
        CASES[name]
        for name in (
            "linear attention, decay",
            "delta, momentum, decay",
            "delta, channels",
            "rank one, channels",
            "oja, decay",
            "omega, decay, powers",
        )
    ],
    ids=["linear_attention", "delta_rule", "delta_rule by channel", "rank_one", "oja", "omega"],
)


def same(a: Any, b: Any, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def off(mine: Tensor, right: Tensor) -> float:
    """The greatest error, as a share of the greatest number."""
    return float(((mine.double() - right).abs().max() / right.abs().max().clamp_min(1e-30)).detach())


def gradients(out: Any, inputs: Any) -> list[Tensor]:
    """Of a sum of all outputs with fixed weights."""
    weights = torch.Generator().manual_seed(1)
    total = sum(
        (torch.randn(x.shape, generator=weights, dtype=F64) * x).sum() for x in leaves({"y": out[0], "state": out[1]})
    )
    return list(torch.autograd.grad(total, leaves(inputs)))  # type: ignore[arg-type]


def parted(inputs: dict[str, Any], where: slice) -> dict[str, Any]:
    """Some tokens of all that comes by the token."""
    return {name: x[:, where] if name != "weights" else x for name, x in inputs.items()}


@each
@pytest.mark.parametrize("length", [1, 5, 64, 130])
@pytest.mark.parametrize("begun", [False, True], ids=["from zero", "from a state"])
def test_equals_the_loop_with_every_gradient_whatever_the_chunk(case: Case, length: int, begun: bool) -> None:
    inputs = case.inputs(2, length)
    if begun:
        inputs["state"] = case.start(2)
    inputs = mapped(lambda x: x.detach().requires_grad_(), inputs)
    true = case.run("slow", inputs)
    wanted = gradients(true, inputs)
    for chunk in (1, 3, 16, 64) if length < 100 else (16, 64):
        out = case.run("fast", inputs, chunk=chunk)
        same(out, true)
        for mine, right in zip(gradients(out, inputs), wanted, strict=True):
            same(mine, right, 1e-9)


@each
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_short_dtypes(case: Case, dtype: torch.dtype, bound: float) -> None:
    inputs = case.inputs(2, 130, dim_k=16, dim_v=16)
    gates = {name: inputs.pop(name) for name in list(inputs) if name not in "qkv"}
    inputs = {name: x.to(dtype).requires_grad_() for name, x in inputs.items()}
    inputs |= {name: x.float().requires_grad_() for name, x in gates.items()}
    rounded = mapped(lambda x: x.detach().double().requires_grad_(), inputs)
    out, true = case.run("fast", inputs), case.run("slow", rounded)
    assert out[0].dtype == dtype
    assert {x.dtype for x in leaves(out[1])} == {torch.float32}
    assert off(out[0], true[0]) < bound
    assert all(off(*pair) < 1e-5 for pair in zip(leaves(out[1]), leaves(true[1]), strict=True))
    pairs = zip(gradients(out, inputs), gradients(true, rounded), strict=True)
    assert all(off(*pair) < 2 * bound for pair in pairs)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(CASES)),
    length=st.integers(1, 12),
    chunk=st.integers(1, 16),
    dims=st.tuples(*[st.integers(1, 4)] * 4),
)
def test_any_shape_and_chunk(name: str, length: int, chunk: int, dims: tuple[int, int, int, int]) -> None:
    case, (batch, heads, dim_k, dim_v) = CASES[name], dims
    inputs = case.inputs(batch, length, heads, dim_k, dim_v)
    state = case.start(batch, heads, dim_k, dim_v)
    same(case.run("fast", inputs, state=state, chunk=chunk), case.run("slow", inputs, state=state))


@each
def test_constants_and_heads_are_gates_of_every_token(case: Case) -> None:
    inputs = case.inputs(2, 7)
    numbers = dict.fromkeys(case.gates, 0.7)
    heads = {name: torch.rand(2, dtype=F64) for name in case.gates}
    for gates in (numbers, heads):
        full = {name: torch.ones(2, 7, 2, dtype=F64) * value for name, value in gates.items()}
        same(case.run("fast", {**inputs, **gates}, chunk=3), case.run("slow", {**inputs, **full}))
    scalars = {name: torch.tensor(0.7, dtype=F64) for name in case.gates}
    same(case.run("fast", {**inputs, **scalars}), case.run("fast", {**inputs, **numbers}))


@each
@settings(max_examples=8)
@given(cuts=st.lists(st.integers(1, 12), max_size=4, unique=True))
def test_any_pieces_are_the_whole(case: Case, cuts: list[int]) -> None:
    inputs = case.inputs(2, 13)
    whole, end = case.run("fast", inputs, chunk=5)
    ys, state = [], None
    for a, b in itertools.pairwise([0, *sorted(cuts), 13]):
        y, state = case.run("fast", parted(inputs, slice(a, b)), state=state, chunk=5)
        ys.append(y)
    same((torch.cat(ys, 1), state), (whole, end))


@each
def test_segments_that_fit_a_cache_do_not_change_it(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mapped(lambda x: x.requires_grad_(), case.inputs(2, 43))
    whole = case.run("fast", inputs, chunk=4)
    monkeypatch.setattr(segments, "CACHED", 2 * 2 * 4 * 4 * 3)
    cut = case.run("fast", inputs, chunk=4)
    same(cut, whole)
    same(gradients(cut, inputs), gradients(whole, inputs))


@each
def test_sequences_do_not_meet_and_no_token_sees_a_later_one(case: Case) -> None:
    inputs = case.inputs(2, 11)
    y, _ = case.run("fast", inputs, chunk=4)
    others = {name: x.clone() for name, x in inputs.items()}
    for name, x in others.items():
        if name != "weights":
            x[1] = torch.rand_like(x[1])
            x[0, 6:] = torch.rand_like(x[0, 6:])
    changed, _ = case.run("fast", others, chunk=4)
    same(changed[0, :6], y[0, :6], 1e-14)
    assert not torch.isclose(changed[0, 7:], y[0, 7:]).any()


@each
def test_packed_sequences_are_each_alone(case: Case) -> None:
    inputs, state = case.inputs(1, 14), case.start(3)
    ends = [0, 3, 4, 14]
    y, end = case.run("fast", inputs, state=state, chunk=4, cu_seqlens=torch.tensor(ends))
    for n, (a, b) in enumerate(itertools.pairwise(ends)):
        alone = case.run("fast", parted(inputs, slice(a, b)), state=mapped(lambda x: x[n : n + 1], state), chunk=4)  # noqa: B023
        same((y[:, a:b], mapped(lambda x: x[n : n + 1], end)), alone)  # noqa: B023


@each
def test_padding_anywhere_is_as_if_it_were_not_there(case: Case) -> None:
    inputs, state = case.inputs(2, 12), case.start(2)
    mask = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0], [1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0]]).bool()
    for name in "qkv":  # what stands in padding does not matter
        inputs[name] = torch.where(mask[..., None, None], inputs[name], 1e300)
    inputs = mapped(lambda x: x.requires_grad_(), {**inputs, "state": state})
    out = case.run("fast", inputs, mask=mask, chunk=5)
    assert not out[0][~mask].any()
    got = gradients(out, inputs)
    assert all(x.isfinite().all() for x in got)
    for n in range(2):
        alone = {name: x[n : n + 1, mask[n]] if name in case.by_token else x for name, x in inputs.items()}
        alone["state"] = mapped(lambda x: x[n : n + 1], state)  # noqa: B023
        y, end = case.run("fast", alone, chunk=5)
        same((out[0][n : n + 1, mask[n]], mapped(lambda x: x[n : n + 1], out[1])), (y, end))  # noqa: B023


@each
@pytest.mark.parametrize("which", ["q", "k", "v", "gate"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_token_that_is_not_finite_is_answered_nan_and_touches_nothing(case: Case, which: str, bad: float) -> None:
    inputs, state = case.inputs(2, 9), case.start(2)
    which = case.gates[-1] if which == "gate" and case.gates else "v" if which == "gate" else which
    inputs[which][0, 4, 1] = bad
    inputs = mapped(lambda x: x.requires_grad_(), {**inputs, "state": state})
    y, end = case.run("fast", inputs, chunk=4)
    wrong = torch.zeros(2, 9, 2, dtype=torch.bool)
    wrong[0, 4, 1] = True
    assert torch.equal(y.isnan().all(-1), wrong)
    assert torch.equal(y.isnan().any(-1), wrong)
    rest = [n for n in range(9) if n != 4]
    tokens = {name: x[:1, rest, 1:] for name, x in inputs.items() if name in case.by_token}
    alone = {**inputs, **tokens, "state": mapped(lambda x: x[:1, 1:], inputs["state"])}
    same((y[:1, rest, 1:], mapped(lambda x: x[:1, 1:], end)), case.run("fast", alone, chunk=4))
    total = torch.where(y.isnan(), y * 3, y.square()).sum() + sum(x.sum() for x in leaves(end))  # NaN flows back
    assert all(x.isfinite().all() for x in torch.autograd.grad(total, leaves(inputs)))


@some
@pytest.mark.parametrize("check", [torch.autograd.gradcheck, torch.autograd.gradgradcheck])
def test_numerical_gradients(case: Case, check: Any) -> None:
    inputs = mapped(lambda x: x.requires_grad_(), {**case.inputs(1, 5, 1, 2, 2), "state": case.start(1, 1, 2, 2)})
    names, flat = list(inputs), leaves(inputs)

    def function(*values: Tensor) -> tuple[Tensor, ...]:
        given = iter(values)
        filled = {
            name: mapped(lambda _: next(given), dict(sorted(x.items())) if isinstance(x, dict) else x)
            for name, x in sorted(inputs.items())
        }
        out = case.run("fast", {name: filled[name] for name in names}, chunk=2)
        return (out[0], *leaves(out[1]))

    assert check(function, flat)


@each
def test_vmap_over_another_dimension_is_a_loop(case: Case) -> None:
    several = [{**case.inputs(1, 9), "state": case.start(1)} for _ in range(3)]
    stacked = {
        name: {key: torch.stack([x[name][key] for x in several]) for key in value}
        if isinstance(value, dict)
        else torch.stack([x[name] for x in several])
        for name, value in several[0].items()
    }
    out = torch.func.vmap(lambda x: case.run("fast", x, chunk=4))(stacked)
    for n, inputs in enumerate(several):
        same(
            mapped(lambda x: x[n], {"y": out[0], "state": out[1]}),  # noqa: B023
            dict(zip(("y", "state"), case.run("fast", inputs, chunk=4), strict=True)),
        )


@some
def test_gradients_by_torch_func(case: Case) -> None:
    inputs = case.inputs(1, 9)
    by_func = torch.func.grad(lambda x: case.run("fast", x, chunk=4)[0].square().sum())(inputs)
    leaves_of = mapped(lambda x: x.requires_grad_(), inputs)
    by_autograd = torch.autograd.grad(case.run("fast", leaves_of, chunk=4)[0].square().sum(), leaves(leaves_of))
    same(leaves(by_func), list(by_autograd))


@some
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's compiler does it itself
def test_compiled_whole_it_is_the_same_with_gradients(case: Case) -> None:
    inputs = mapped(lambda x: x.requires_grad_(), {**case.inputs(1, 9), "state": case.start(1)})
    compiled = torch.compile(lambda x: case.run("fast", x, chunk=4), fullgraph=True, backend="aot_eager")
    out, eager = compiled(inputs), case.run("fast", inputs, chunk=4)
    same(out, eager)
    same(gradients(out, inputs), gradients(eager, inputs))


@some
def test_checkpointed_it_is_the_same_with_gradients(case: Case) -> None:
    inputs = mapped(lambda x: x.requires_grad_(), case.inputs(2, 9))
    out = checkpoint(lambda x: case.run("fast", x, chunk=4), inputs, use_reentrant=False)
    same(gradients(out, inputs), gradients(case.run("fast", inputs, chunk=4), inputs))


@each
def test_autocast_does_not_shorten_the_memory(case: Case) -> None:
    inputs = mapped(lambda x: x.float(), case.inputs(1, 30))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = case.run("fast", inputs)
    same(out, case.run("fast", inputs), 0)


@each
@pytest.mark.parametrize("least", [1e-6, 0.0])
def test_float32_is_right_where_memories_are_wiped(case: Case, least: float) -> None:
    inputs = mapped(lambda x: x.float(), case.inputs(1, 150, dim_k=8, dim_v=8))
    for name in {"decay", "momentum"} & set(case.gates):
        inputs[name] = torch.where(torch.rand(1, 150, 2) < 0.3, least, 0.999)
    inputs = mapped(lambda x: x.requires_grad_(), inputs)
    exact = mapped(lambda x: x.detach().double().requires_grad_(), inputs)
    out, true = case.run("fast", inputs), case.run("slow", exact)
    same(mapped(lambda x: x.double(), {"y": out[0], "state": out[1]}), {"y": true[0], "state": true[1]}, 1e-4)
    got = dict(zip(sorted(inputs), gradients(out, inputs), strict=True))
    for name, right in zip(sorted(exact), gradients(true, exact), strict=True):
        if least == 0 and name in ("decay", "momentum"):  # at exactly 0 a logarithm has no gradient, and it is 0 there
            assert got[name].isfinite().all()
        else:
            assert off(got[name], right) < 1e-4


@some
def test_a_hundred_thousand_tokens_stay_finite(case: Case) -> None:
    inputs = mapped(lambda x: x.float(), case.inputs(1, 100_000, 1, 4, 4))
    for name in {"decay", "momentum"} & set(case.gates):
        inputs[name] = torch.rand(1, 100_000, 1).pow(20).clamp(1e-6, 1.0)
    inputs = mapped(lambda x: x.requires_grad_(), inputs)
    y, state = case.run("fast", inputs)
    grads = torch.autograd.grad(y.square().mean(), leaves(inputs))
    assert all(x.isfinite().all() for x in (y, *leaves(state), *grads))
    tail = {name: x.detach()[:, -300:].double() for name, x in inputs.items()}  # decays have wiped all before
    same(y[:, -100:].double(), case.run("slow", tail)[0][:, -100:], 1e-4)


@each
def test_what_is_not_in_its_range_is_named_where_asked_for(case: Case) -> None:
    inputs = case.inputs(2, 5)
    case.run("fast", inputs, validate=True, mask=torch.ones(2, 5, dtype=torch.bool))
    for name in case.gates:
        wrong = {
            **inputs,
            name: inputs[name].index_put(
                (torch.tensor(1), torch.tensor(3), torch.tensor(0)), torch.tensor(2.5).double()
            ),
        }
        with pytest.raises(ValueError, match=rf"{name}\[1, 3, 0(, 0)?\] is 2.5"):
            case.run("fast", wrong, validate=True)
        with pytest.raises(ValueError, match=rf"{name}=-0.5 is not allowed"):
            case.run("fast", {**inputs, name: -0.5})
        with pytest.raises(ValueError, match=rf"{name} is 2.5"):
            case.run("fast", {**inputs, name: 2.5}, validate=True)
        with pytest.raises(ValueError, match=rf"{name} has the shape \[2, 4, 2\]"):
            case.run("fast", {**inputs, name: torch.ones(2, 4, 2)})
    inputs["k"][1, 2, 0, 1] = torch.inf
    with pytest.raises(ValueError, match=r"k\[1, 2, 0, 1\] is inf"):
        case.run("fast", inputs, validate=True)


@each
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 5, 3)}, r"q has the shape \[2, 5, 3\]"),
        ({"k": torch.zeros(2, 5, 2, 7)}, r"k has the shape \[2, 5, 2, 7\] and q \[2, 5, 2, 3\]"),
        ({"v": torch.zeros(2, 6, 2, 4)}, r"v has the shape \[2, 6, 2, 4\] and q \[2, 5, 2, 3\]"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, r"mask has the shape \[2, 4\].*\[2, 5\]"),
        ({"mask": torch.ones(2, 5)}, r"mask is torch.float32"),
        ({"chunk": 0}, "chunk=0"),
        ({"read": "during"}, "read='during'"),
        ({"cu_seqlens": [0, 5]}, "cu_seqlens is for sequences end to end"),
        ({name: torch.zeros(2, 0, 2, 3) for name in "qkv"}, "no token"),
    ],
)
def test_says_what_does_not_fit(case: Case, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        case.run("fast", {**case.inputs(2, 5), **change})


@each
def test_says_what_state_does_not_fit(case: Case) -> None:
    inputs, state = case.inputs(2, 5), case.start(3)
    with pytest.raises(ValueError, match=r"state.* has the shape \[3, 2, .*must be \[2, 2, "):
        case.run("fast", inputs, state=state)
    other = {"m": torch.zeros(2, 2, 4, 3)} if case.state else None
    if other is not None:
        with pytest.raises(ValueError, match=r"state has the keys \['m'\]"):
            case.run("fast", inputs, state=other)
