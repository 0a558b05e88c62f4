from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core import Gate, Level, scan
from nestopt.core.memories import Window
from nestopt.core.retentions import Decay
from nestopt.core.tree import leaves, nested, tree_map
from nestopt.levels import adam, attention, cms, deltanet, linear_attention, momentum, titans, ttt
from nestopt.nn import SequenceMemory, layer
from nestopt.nn.rotary import rotary

F64 = torch.float64

LEVELS = {
    "attention": attention(),
    "window": attention(memory=Window(3)),
    "linear_attention": linear_attention(),
    "gated": linear_attention(retention=Decay(Gate(0.9))),
    "momentum": momentum(Gate(0.9)),
    "deltanet": deltanet(),
    "ttt": ttt(),
    "titans": titans(),
    "titans with adam": titans(rule=adam(), step_size=0.01),
}


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """Parameters away from where they start, so that gates differ from token to token."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


def make(name: str, **options: object) -> SequenceMemory:
    return randomised(SequenceMemory(LEVELS[name], 8, 2, **options).double())  # type: ignore[arg-type, return-value]


def turned(x: Tensor, base: float) -> Tensor:
    """Pairs of entries as complex numbers, times exp(i · position · speed)."""
    half = x.shape[-1] // 2
    out = x.clone()
    for t in range(x.shape[1]):
        for i in range(half):
            angle = torch.tensor(1j * t * base ** (-2 * i / (2 * half)), dtype=torch.complex128)
            z = torch.complex(x[:, t, :, i], x[:, t, :, i + half]) * angle.exp()
            out[:, t, :, i], out[:, t, :, i + half] = z.real, z.imag
    return out


def by_the_equations(module: SequenceMemory, level: Level, x: Tensor, width: int) -> Tensor:
    """The layer written out, token by token where tokens meet."""
    p = dict(module.named_parameters())
    h = x.clone()
    if width:
        for t in range(x.shape[1]):
            for i in range(min(width, t + 1)):
                h[:, t] += p["conv.weight"][:, 0, -1 - i] * x[:, t - i]
    q, k, v = (
        torch.stack((h @ p[f"{name}.weight"].mT).split(module.dim_head, -1), 2) for name in ("query", "key", "value")
    )
    if isinstance(level, deltanet | ttt | titans):
        q, k = (z / z.norm(dim=-1, keepdim=True) for z in (q, k))
    if module.rope:
        q, k = (turned(z, module.rope) for z in (q, k))
    gates = {}
    for i, path in enumerate(module.level_gates.learned):
        rows = slice(i * module.heads, (i + 1) * module.heads)
        gates[path] = torch.sigmoid(h @ p["gates.weight"][rows].mT + p["gates.bias"][rows])
    learned = {name.removeprefix("start."): weight for name, weight in p.items() if name.startswith("start.")}
    y, _ = scan(level, q, k, v, gates=gates, learned=learned)
    if "norm.weight" in p:
        y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]
    y = y.flatten(2)
    if "output_gate.weight" in p:
        y = y * F.silu(h @ p["output_gate.weight"].mT)
    return y @ p["out.weight"].mT


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("attention", {}),
        ("attention", {"out_norm": True, "gate_output": True, "conv": 0}),
        ("gated", {"gate_output": True}),
        ("momentum", {"dim_head": 3, "conv": 1}),
        ("attention", {"rope": 0}),
        ("deltanet", {"conv": 9, "rope": 50.0, "dim_head": 5}),
        ("titans", {}),
    ],
)
def test_equals_its_equations(name: str, options: dict[str, object]) -> None:
    module = make(name, **options)
    x = torch.randn(2, 6, 8, dtype=F64)
    true = by_the_equations(module, LEVELS[name], x, options.get("conv", 4))  # type: ignore[arg-type]
    torch.testing.assert_close(module(x)[0], true, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("cuts", [[1], [5], [1, 2, 3]])
@pytest.mark.parametrize("name", LEVELS)
def test_streaming_is_parallel(name: str, cuts: list[int]) -> None:
    module = make(name)
    x = torch.randn(2, 7, 8, dtype=F64)
    whole, end = module(x)
    state, ys, edges = None, [], [0, *cuts, 7]
    for a, b in itertools.pairwise(edges):
        y, state = module(x[:, a:b], state)
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-10, atol=1e-10)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", LEVELS)
def test_no_token_sees_a_later_one_and_sequences_do_not_meet(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 6, 8, dtype=F64)
    other = x.clone()
    other[0, 4:], other[1] = torch.randn(2, 8), torch.randn(6, 8)
    before, after = module(x)[0], module(other)[0]
    torch.testing.assert_close(after[0, :4], before[0, :4], rtol=0, atol=1e-13)
    assert not torch.isclose(after[0, 4:], before[0, 4:]).any()


@pytest.mark.parametrize("gate_output", [False, True])
@pytest.mark.parametrize("name", LEVELS)
def test_every_parameter_gets_a_gradient_as_it_starts(name: str, gate_output: bool) -> None:
    module = SequenceMemory(LEVELS[name], 8, 2, gate_output=gate_output).double()
    module(torch.randn(2, 6, 8, dtype=F64))[0].square().sum().backward()
    dead = [key for key, p in module.named_parameters() if p.grad is None or not p.grad.any(dim=-1).all()]
    assert dead == []


def test_gates_start_at_their_initial_values_whatever_the_token() -> None:
    level = momentum(Gate(0.9), dampening=Gate(1.5, 1.0, 3.0))
    module = SequenceMemory(level, 8, 2)
    gates = module.gates_at(torch.randn(2, 3, 8))
    torch.testing.assert_close(gates, {"beta": torch.full((2, 3, 2), 0.9), "dampening": torch.full((2, 3, 2), 1.5)})


def test_heads_start_apart_from_learned_memories() -> None:
    module = SequenceMemory(titans(), 8, 2)
    w1 = module.start["W1"]
    assert w1.shape == (2, 4, 8)
    assert not torch.isclose(w1[0], w1[1]).all()


def test_rotated_attention_knows_distances_only() -> None:
    module = make("attention", conv=0)
    x = torch.randn(2, 6, 8, dtype=F64)
    late = module.init_state(2)
    late["memory"]["step"] = late["memory"]["step"] + torch.tensor([[7], [1000]])
    torch.testing.assert_close(module(x, late)[0], module(x)[0], rtol=1e-9, atol=1e-9)
    swapped = x[:, [1, 0, 2, 3, 4, 5]]
    assert not torch.isclose(module(swapped)[0][:, 5], module(x)[0][:, 5]).any()
    unordered = make("attention", conv=0, rope=0)
    torch.testing.assert_close(unordered(swapped)[0][:, 5], unordered(x)[0][:, 5])


def test_positions_are_counted_beyond_what_bfloat16_can() -> None:
    x = torch.ones(1, 2, 1, 4, dtype=torch.bfloat16)
    at = rotary(x, torch.tensor([[1000, 1001]]), 1000.0)
    true = rotary(x.double(), torch.tensor([[1000, 1001]]), 1000.0)
    torch.testing.assert_close(at.double(), true, rtol=0.02, atol=0.02)
    assert not torch.isclose(at[0, 0], at[0, 1]).all()


def test_normalisation_is_as_the_level_asks_unless_told() -> None:
    assert not SequenceMemory(linear_attention(), 8, 2).qk_norm
    assert SequenceMemory(deltanet(), 8, 2).qk_norm
    assert SequenceMemory(attention(), 8, 2, qk_norm=True).qk_norm
    assert not SequenceMemory(deltanet(), 8, 2, qk_norm=False).qk_norm
    assert [SequenceMemory(level, 8, 2).norm is None for level in (attention(), linear_attention())] == [True, False]


@pytest.mark.parametrize("name", LEVELS)
def test_a_state_survives_a_flat_file(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 5, 8, dtype=F64)
    _, state = module(x)
    flat = {path: leaf.clone() for path, leaf in leaves(state)}
    again, _ = module(x, nested(flat))
    torch.testing.assert_close(again, module(x, state)[0], rtol=0, atol=0)


def test_states_that_do_not_fit_are_refused_in_words() -> None:
    x = torch.randn(2, 5, 8)
    module, other = SequenceMemory(deltanet(), 8, 2), SequenceMemory(attention(), 8, 2)
    _, state = module(x)
    with pytest.raises(ValueError, match=r"state\['conv'\] is of a batch of 2, and the input of 3"):
        module(torch.randn(3, 5, 8), state)
    with pytest.raises(ValueError, match=r"\['level'\]\['memory'\] has 'm'.* It has: keys, values"):
        other(x, state)
    with pytest.raises(ValueError, match=r"\['memory'\] has 'keys'.* another layer"):
        module(x, other(x)[1])
    with pytest.raises(ValueError, match=r"state\['conv'\] is missing"):
        module(x, {"memory": state["memory"]})
    with pytest.raises(ValueError, match=r"state\['conv'\] has the shape \[2, 3, 8\]; .* \[2, 2, 8\]"):
        SequenceMemory(deltanet(), 8, 2, conv=3)(x, state)
    with pytest.raises(ValueError, match=r"\['m'\] has the shape \[2, 2, 4, 4\]; .*\[2, 4, 2, 2\]|\['step'\]"):
        SequenceMemory(deltanet(), 8, 4)(x, state)
    with pytest.raises(ValueError, match=r"state\['conv'\] is NoneType, not a tensor"):
        module(x, {**state, "conv": None})
    with pytest.raises(ValueError, match="state is tuple, not a dict"):
        module(x, (state,))
    grown = tree_map(lambda leaf: leaf, other(x)[1])
    grown["memory"]["level"]["memory"]["values"] = grown["memory"]["level"]["memory"]["values"][:, :, 1:]
    with pytest.raises(ValueError, match="values"):
        other(x, grown)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"heads": 0}, "heads=0"),
        ({"conv": -1}, "conv=-1"),
        ({"heads": 3}, "heads=3 does not divide dim=8"),
        ({"dim_head": 0}, "dim_head=0"),
        ({"rope": 1.0}, "rope=1.0"),
        ({"rope": float("nan")}, "rope=nan"),
    ],
)
def test_says_what_is_not_allowed(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceMemory(attention(), **{"dim": 8, "heads": 2, **options})


def test_refuses_what_is_not_a_level_for_it() -> None:
    with pytest.raises(TypeError, match=r"nestopt\.nn\.CMS"):
        SequenceMemory(cms(), 8)
    with pytest.raises(TypeError, match="'titans'"):
        layer("titans", 8)  # type: ignore[arg-type]
    module = layer(attention(), 8, 2, conv=0)
    assert isinstance(module, SequenceMemory)
    with pytest.raises(ValueError, match=r"\[2, 5, 9\].*dim=8"):
        module(torch.zeros(2, 5, 9))
    with pytest.raises(ValueError, match="no token"):
        module(torch.zeros(2, 0, 8))
