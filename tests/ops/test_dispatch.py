from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nestopt.core import AssociativeMemory, Channels, Gate, Level, Signal, chain, gates_of, scan
from nestopt.core.features import Elu, Polynomial, Random
from nestopt.core.memories import Mlp, Window
from nestopt.core.objectives import L2, Huber, Lp
from nestopt.core.outputs import Sign
from nestopt.core.retentions import Decay, Keep
from nestopt.core.tree import leaves
from nestopt.levels import (
    adam,
    attention,
    cms,
    comba,
    delta_momentum,
    deltanet,
    deltaproduct,
    dgd,
    dla,
    gated_deltanet,
    gd,
    gla,
    hgrn2,
    kda,
    linear_attention,
    momentum,
    muon,
    oja,
    omega,
    rwkv6,
    rwkv7,
    self_modifying,
    titans,
    ttt,
)
from nestopt.ops import fast_form, run

F64 = torch.float64

LINEAR = {
    "plain": linear_attention(),
    "elu": linear_attention(features=Elu()),
    "polynomial": linear_attention(features=Polynomial(2)),
    "random features": linear_attention(features=Random(6)),
    "retnet": linear_attention(retention=Decay(0.9)),
    "decay of 0": linear_attention(retention=Decay(0.0)),
    "gated": linear_attention(retention=Decay(Gate(0.9)), lr=Gate(0.5), step_size=Gate(1.0, 0.0, 2.0)),
    "tensors": linear_attention(retention=Decay(torch.tensor(0.9, dtype=F64)), lr=torch.tensor(0.3, dtype=F64)),
    "weighted": linear_attention(lr=0.5, step_size=3.0),
    "before": linear_attention(retention=Decay(0.8), read="before"),
    "chunk of one": linear_attention(retention=Decay(Gate(0.8)), read="chunk"),
    "gla": gla(lr=Gate(0.5)),
    "gla before": gla(read="before"),
    "by its parts": AssociativeMemory(),
    "momentum": momentum(0.9),
    "average": momentum(0.9, dampening=0.9),
    "growing": momentum(1.05),
    "gated momentum": momentum(Gate(0.9), dampening=Gate(0.5)),
    "momentum of tensors": momentum(torch.tensor(0.9, dtype=F64), dampening=torch.tensor(0.2, dtype=F64)),
}
HGRN2 = {"hgrn2": hgrn2(), "hgrn2, gated": hgrn2(lower=Gate(0.5), lr=Gate(0.5))}
RWKV6 = {"rwkv6": rwkv6(), "rwkv6, weighted": rwkv6(lr=Gate(0.5), step_size=0.5, retention=Decay(Gate(0.9)))}
SOFTMAX = {
    "attention": attention(),
    "window": attention(memory=Window(3)),
    "wide window": attention(memory=Window(50)),
    "features": attention(features=Elu(), memory=Window(4)),
}
G = Gate(0.5)
DELTA = {
    "deltanet": deltanet(),
    "deltanet, long steps": deltanet(lr=Gate(0.5, 0, 2), features=Elu(), step_size=0.5),
    "deltanet before": deltanet(read="before", retention=Decay(Gate(0.8))),
    "deltanet fading with the write": gated_deltanet(fade="with"),
    "gated deltanet": gated_deltanet(),
    "kda": kda(),
    "kda, fading with the write, before": kda(fade="with", read="before"),
    "deltanet with momentum": gated_deltanet(rule=momentum(Gate(0.5))),
    "with momentum, fading with the write": deltanet(rule=momentum(0.7), retention=Decay(0.9)),
    "normalized deltanet": deltanet(normalized=True, retention=Decay(Gate(0.8)), rule=momentum(Gate(0.5)), bound=1.5),
}
RWKV7 = {
    "rwkv7": rwkv7(),
    "rwkv7 of numbers": rwkv7(rate=0.7, retention=Decay(Gate(0.9))),
    "rwkv7 that keeps": rwkv7(rate=Gate(0.5), retention=Keep()),
}
PRODUCT = {
    "deltaproduct": deltaproduct(),
    "deltaproduct, gated, before": deltaproduct(writes=4, retention=Decay(Gate(0.9)), read="before"),
    "deltaproduct of one": deltaproduct(writes=1, lr=0.5, retention=Decay(0.9)),
}
COMBA = {
    "comba": comba(),
    "comba with momentum, before": comba(rule=momentum(Gate(0.5)), read="before"),
    "comba by channel": comba(retention=Decay(Channels(0.9)), fade="with"),
}
OJA = {"oja": oja(), "gated oja": oja(retention=Decay(Gate(0.8)))}
OMEGA = {"omega": omega(), "omega of one": omega(window=1), "weighted omega": omega(window=3, weight=0.5)}
MATRIX = {
    "chunks": linear_attention(chunk=2),
    "linear attention with momentum": linear_attention(rule=momentum(0.9)),
    "delta rule in chunks": deltanet(chunk=4, retention=Decay(Gate(0.8))),
    "delta rule in chunks, normalized": deltanet(chunk=4, normalized=True, read="chunk", rule=dgd(momentum(Gate(0.5)))),
    "delta decay": deltanet(rule=dgd()),
    "huber": deltanet(objective=Huber(0.5)),
    "lp": deltanet(objective=Lp(3.0), rule=momentum(0.5)),
}
DEEP = {
    "ttt": ttt(chunk=4),
    "ttt raw": ttt(chunk=1, normalized=False, lr=Gate(0.1)),
    "ttt of one weight": ttt(memory=Mlp(depth=1), chunk=3),
    "titans": titans(chunk=4),
    "titans, token by token": titans(chunk=1),
    "titans before": titans(chunk=4, read="before", bound=1.5, step_size=0.5, rule=gd()),
    "titans, chunks": titans(chunk=4, read="chunk"),
    "titans, raw": titans(chunk=4, read="chunk", normalized=False, lr=Gate(0.1)),
    "deep titans": titans(memory=Mlp(depth=3, hidden=5, activation="gelu", norm=True), chunk=4),
    "relu": titans(memory=Mlp(activation="relu", residual=False), chunk=4, read="chunk"),
    "tanh": titans(memory=Mlp(activation="tanh", norm=True), chunk=3, features=Elu()),
    "dla": dla(chunk=4),
    "titans by huber": titans(objective=Huber(0.1), chunk=4),
    "ttt by lp": ttt(objective=Lp(2.5), chunk=3, read="chunk"),
    "self-modifying write": titans(rule=dgd(momentum(Gate(0.5))), chunk=4, read="chunk"),
    "self-modifying write, read after": titans(rule=dgd(momentum(0.5), delta=0.5), chunk=4),
    "self-modifying write without momentum": titans(rule=dgd(), chunk=4, retention=Keep()),
}
DEEP |= {
    "layer norm": titans(memory=Mlp(norm="layer"), chunk=4, normalized=True),
    "layer norm, chunks": ttt(memory=Mlp(depth=3, hidden=5, norm="layer"), chunk=3, normalized=False, read="chunk"),
    "huber by the norm": titans(objective=Huber(0.5, "norm"), chunk=4),
    "huber by a switch": ttt(objective=Huber(0.5, "switch"), chunk=4, normalized=False, lr=Gate(0.1)),
}
LAYERWISE = {"normalized": "layerwise", "chunk": 4}
DEEP |= {
    "layerwise": ttt(**LAYERWISE),
    "layerwise, token by token": titans(normalized="layerwise", chunk=1, read="before"),
    "layerwise titans": titans(**LAYERWISE, forget="outer"),
    "layerwise, chunks": titans(**LAYERWISE, read="chunk", bound=1.5),
    "titans that forget in W1 alone": titans(chunk=4, forget="outer", rule=dgd(momentum(Gate(0.5)))),
    "layerwise, without momentum": titans(**LAYERWISE, rule=gd(), step_size=0.5),
    "layerwise, three layers": titans(**LAYERWISE, memory=Mlp(depth=3, hidden=5, activation="gelu")),
    "layerwise, normalised reads": titans(**LAYERWISE, memory=Mlp(activation="tanh", norm=True), features=Elu()),
    "layerwise, layer norm": titans(**LAYERWISE, memory=Mlp(norm="layer")),
    "layerwise dla": dla(**LAYERWISE, rule=dgd(momentum(Gate(0.5)), delta=0.5)),
    "layerwise huber": titans(**LAYERWISE, objective=Huber(0.1)),
    "layerwise lp": ttt(**LAYERWISE, objective=Lp(2.5)),
    "layerwise self-modifying write": titans(**LAYERWISE, rule=dgd(momentum(Gate(0.5))), read="chunk"),
    "a matrix, layerwise": deltanet(**LAYERWISE, retention=Decay(Gate(0.8))),
    "a matrix, layerwise, token by token": deltanet(normalized="layerwise"),
}
SELF = {
    "self-modifying, layerwise": self_modifying(
        normalized="layerwise", chunk=2, projection_chunk=4, momentum=Gate(0.5)
    ),
    "self-modifying": self_modifying(chunk=2, projection_chunk=4),
    "self-modifying, longer chunks of the memory": self_modifying(chunk=4, projection_chunk=2, momentum=Gate(0.5)),
    "self-modifying by products": self_modifying(objective="dot", chunk=2, projection_chunk=4, momentum=Gate(0.5)),
    "self-modifying matrices": self_modifying(
        Mlp(depth=1, residual=False), normalized=False, objective="dot", eta_max=0.1, chunk=2, projection_chunk=2
    ),
    "self-modifying, token by token": self_modifying(chunk=1, projection_chunk=1, delta=0.5),
    "self-modifying, raw": self_modifying(normalized=False, eta_max=0.1, chunk=3, projection_chunk=3, momentum=0.5),
    "self-modifying, one memory": self_modifying(Mlp(depth=1), adaptive=(), chunk=4),
    "self-modifying queries": self_modifying(
        Mlp(depth=3, hidden=5, activation="gelu", norm=True), adaptive=("q", "v"), chunk=2, projection_chunk=2
    ),
}
GENERIC = {
    "kda with momentum": kda(rule=momentum(Gate(0.5))),
    "adam": adam(),
    "delta momentum": delta_momentum(),
    "nesterov": momentum(0.9, nesterov=True),
    "undamped": momentum(0.9, dampening=0.5, undamped_start=True),
    "slow momentum": momentum(0.9, period=2),
    "slow": linear_attention(period=2),
    "sign": linear_attention(output=Sign()),
    "attention before": attention(read="before"),
    "titans by adam": titans(rule=adam(), step_size=0.05, normalized=False, chunk=3),
    "titans by a chain": titans(rule=chain(momentum(0.5), adam()), step_size=0.05, chunk=1),
    "titans by adam, layerwise": titans(rule=adam(), step_size=0.05, normalized="layerwise", chunk=3),
    "deep omega": omega(memory=Mlp()),
    "dgd solved exactly": deltanet(rule=dgd(solver="exact")),
}
BY_CHUNK = {
    "titans by muon, once a chunk": titans(rule=muon(), step_size=0.05, chunk=3, write="chunk"),
    "titans by adam, once a chunk": titans(
        rule=adam(), step_size=0.05, normalized=False, chunk=4, write="chunk", read="chunk", objective=Huber(0.5)
    ),
    "a matrix by a chain, once a chunk": deltanet(
        rule=chain(momentum(Gate(0.5)), momentum(0.9)), step_size=Gate(0.5), chunk=3, write="chunk", features=Elu()
    ),
}
FORMS = {
    "rule_by_chunk": BY_CHUNK,
    "linear_attention": LINEAR,
    "hgrn2": HGRN2,
    "rwkv6": RWKV6,
    "attention": SOFTMAX,
    "delta_rule": DELTA,
    "rwkv7": RWKV7,
    "comba": COMBA,
    "deltaproduct": PRODUCT,
    "oja": OJA,
    "omega": OMEGA,
    "deep_memory": MATRIX | DEEP,
    "self_modifying": SELF,
}
FAST = {name: level for levels in FORMS.values() for name, level in levels.items()}


class Reversed(linear_attention):
    """A memory that writes the wrong way round: a preset by its class, not by its meaning."""

    def learn(self, theta, rules, surprise, signal, shown=None):  # type: ignore[no-untyped-def]
        return super().learn(theta, rules, {name: -g for name, g in surprise.items()}, signal, shown)


def inputs(level: Level, length: int = 9) -> dict[str, Tensor]:
    square = isinstance(getattr(level, "memory", None), Mlp) or isinstance(level, deltaproduct)
    tokens = {
        name: (torch.randn(2, length, 3, dim, dtype=F64) / 2).requires_grad_()
        for name, dim in (("q", 4), ("k", 4), ("v", 4 if square else 5))
    }
    starts = [level.learned_start(4, 4 if square else 5) for _ in range(3)]
    tokens |= {
        f"start.{name}": torch.stack([one[name].to(F64) for one in starts]).requires_grad_() for name in starts[0]
    }
    gates = {
        path: torch.rand(2, length, 3, *filter(None, [gate.width(4)]), dtype=F64, requires_grad=True)
        for path, gate in gates_of(level).items()
    }
    return tokens | gates


def call(how: Callable, level: Level, given: dict[str, Tensor], state=None, part: slice = slice(None)):  # type: ignore[no-untyped-def, type-arg]
    q, k, v, *_ = (given[name][:, part] for name in "qkv")
    gates = {path: given[path][:, part] for path in gates_of(level)}
    learned = {name.removeprefix("start."): x for name, x in given.items() if name.startswith("start.")}
    return how(level, q, k, v, gates=gates, state=state, learned=learned)


def flat(result) -> list[Tensor]:  # type: ignore[no-untyped-def]
    y, state = result
    return [y, *(leaf for _, leaf in sorted(leaves(state)))]


@pytest.mark.parametrize("name", FAST)
def test_fast_equals_the_generic_machine_with_every_gradient(name: str) -> None:
    level = FAST[name]
    assert fast_form(level) == next(form for form, levels in FORMS.items() if name in levels)
    given = inputs(level)
    fast, slow = call(run, level, given), call(scan, level, given)
    assert [path for path, _ in sorted(leaves(fast[1]))] == [path for path, _ in sorted(leaves(slow[1]))]
    weights = [torch.randn(x.shape, dtype=F64) for x in flat(slow)]
    gradients = []
    for result in (fast, slow):
        total = sum((w * x).sum() for w, x in zip(weights, flat(result), strict=True))
        gradients.append(torch.autograd.grad(total, list(given.values()), materialize_grads=True))
    torch.testing.assert_close(flat(fast), flat(slow), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("first", [run, scan])
@pytest.mark.parametrize("name", FAST)
def test_a_stream_may_change_machines(name: str, first: Callable) -> None:  # type: ignore[type-arg]
    level, second = FAST[name], scan if first is run else run
    given = inputs(level)
    whole = call(scan, level, given)
    y1, state = call(first, level, given, part=slice(0, 4))
    y2, state = call(second, level, given, state, slice(4, 6))
    y3, state = call(first, level, given, state, slice(6, None))
    torch.testing.assert_close(flat((torch.cat([y1, y2, y3], 1), state)), flat(whole), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", GENERIC)
def test_all_else_is_the_generic_machine(name: str) -> None:
    level = GENERIC[name]
    assert fast_form(level) is None
    given = inputs(level, 4)
    torch.manual_seed(0)
    mine = call(run, level, given)
    torch.manual_seed(0)
    torch.testing.assert_close(flat(mine), flat(call(scan, level, given)), rtol=0, atol=0)


def test_a_subclass_that_means_something_else_has_no_fast_form() -> None:
    assert fast_form(Reversed()) is None
    given = inputs(Reversed())
    torch.testing.assert_close(call(run, Reversed(), given)[0], -call(run, linear_attention(), given)[0])


def test_an_objective_that_means_something_else_has_no_fast_form() -> None:
    class Squared(L2):
        """Not of the gradient that it inherits."""

        def __call__(self, y, v):  # type: ignore[no-untyped-def]
            return (y - v).square().sum() + y.abs().sum()

    assert fast_form(titans(objective=L2())) == "deep_memory"
    assert fast_form(titans(objective=Squared())) is None


def test_a_tensor_that_is_not_one_number_has_no_fast_form() -> None:
    assert fast_form(momentum(torch.ones(5, 4))) is None
    assert fast_form(linear_attention(lr=torch.ones(5, 4))) is None
    assert fast_form(linear_attention(retention=Decay(torch.ones(5, 4)))) is None
    assert fast_form(cms()) is None


def test_gates_that_are_not_given_take_their_initial_value() -> None:
    level = linear_attention(retention=Decay(Gate(0.7)), lr=Gate(0.2))
    given = inputs(level)
    mine = run(level, given["q"], given["k"], given["v"])
    constant = call(run, linear_attention(retention=Decay(0.7), lr=0.2), given)
    torch.testing.assert_close(flat(mine), flat(constant))


def test_a_learned_start_is_begun_from() -> None:
    given, learned = inputs(linear_attention()), {"m": torch.randn(3, 5, 4, dtype=F64)}
    fast, slow = (how(linear_attention(), *(given[n] for n in "qkv"), learned=learned) for how in (run, scan))
    torch.testing.assert_close(flat(fast), flat(slow))


@pytest.mark.parametrize("objective", [Lp(3.0), Huber(0.5), None])  # the last has a closed form
def test_a_narrow_start_is_widened(objective: Lp | Huber | None) -> None:
    level = ttt(memory=Mlp(hidden=4)) if objective is None else AssociativeMemory(Mlp(hidden=4), objective, lr=0.1)
    q = torch.randn(2, 3, 2, 4).bfloat16()
    learned = {name: torch.randn(2, *w.shape).bfloat16() for name, w in level.learned_start(4, 4).items()}
    y, state = run(level, q, q, q, learned=learned)
    wide, _ = run(level, *[q.float()] * 3, learned={name: w.float() for name, w in learned.items()})
    assert {leaf.dtype for _, leaf in leaves(state["level"]) if leaf.is_floating_point()} == {torch.float32}
    torch.testing.assert_close(y, wide.bfloat16())


def test_the_slow_road_is_logged_once_for_each_level(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nestopt")
    q = torch.randn(1, 2, 1, 3)
    for level in (adam(eps=0.125), adam(eps=0.125), adam(eps=0.0625), linear_attention()):
        run(level, q, q, q)
    said = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert [(name, weight) for name, weight, _ in said] == [("nestopt", "INFO")] * 2
    assert "eps=0.125" in said[0][2]
    assert "eps=0.0625" in said[1][2]


def test_says_what_does_not_fit() -> None:
    q, gate = torch.zeros(2, 5, 3, 4), torch.zeros(2, 5, 3)
    level = linear_attention(retention=Decay(Gate(0.9)))
    with pytest.raises(ValueError, match=r"no gate 'retention.kep'. Did you mean 'retention.keep'\?"):
        run(level, q, q, q, gates={"retention.kep": gate})
    with pytest.raises(ValueError, match=r"gate 'retention.keep' has the shape \[2, 5\] and q \[2, 5, 3, 4\]"):
        run(level, q, q, q, gates={"retention.keep": gate[..., 0]})
    with pytest.raises(ValueError, match="no token"):
        run(deltanet(), q[:, :0], q[:, :0], q[:, :0])
    with pytest.raises(ValueError, match=r"v has the shape \[1, 5, 3, 4\]"):
        run(deltanet(), q, q, q[:1])


def test_a_memory_that_would_keep_padding_is_given_none() -> None:
    given = inputs(attention())
    q, k, v = (given[name] for name in "qkv")
    level, mask = attention(read="before"), torch.ones(q.shape[:2], dtype=torch.bool)
    with pytest.raises(ValueError, match="mask and cu_seqlens are not for attention with read='before'"):
        run(level, q, k, v, mask=mask)
    with pytest.raises(ValueError, match="mask and cu_seqlens are not for attention with read='before'"):
        run(level, q[:1], k[:1], v[:1], cu_seqlens=[0, 2, q.shape[1]])
    run(attention(), q, k, v, mask=mask)


@pytest.mark.parametrize("read", ["after", "before", "chunk"])
def test_a_delta_decay_may_be_a_gate(read: str) -> None:
    level, constant = (titans(rule=dgd(momentum(0.5), delta=d), chunk=3, read=read) for d in (Gate(0.5), 0.5))
    assert (fast_form(level), fast_form(constant)) == (None, "deep_memory")
    given = inputs(level)
    y, _ = call(run, level, given)
    at_half = call(run, level, given | {"rule.delta": torch.full_like(given["rule.delta"], 0.5)})
    torch.testing.assert_close(flat(at_half)[0], flat(call(run, constant, given))[0], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(y, at_half[0])
    changed, seen = (
        (3, 6) if read == "chunk" else (4, 4)
    )  # a chunk's writes are seen in the next, or from their token on
    later = given["rule.delta"].detach().clone()
    later[:, changed:] /= 2
    other, _ = call(run, level, given | {"rule.delta": later})
    torch.testing.assert_close(other[:, :seen], y[:, :seen])
    assert not torch.allclose(other[:, seen:], y[:, seen:])


class StartOfOnes(momentum):
    def init(self, param: Tensor) -> dict[str, Tensor]:
        return {"momentum": torch.ones_like(param)}


class OwnGain(momentum):
    @property
    def steady_gain(self) -> float:
        return 3.0


class Ascent(gd):
    def step(self, grad: Tensor, state: dict, signal: Signal) -> tuple[Tensor, dict]:
        return -grad, state


class OwnRate(titans):
    def _rate(self, theta: dict, k: Tensor) -> Tensor:
        return super()._rate(theta, k) / 2


@pytest.mark.parametrize(
    "level",
    [
        titans(rule=StartOfOnes(0.5)),
        titans(rule=OwnGain(0.5)),
        deltanet(rule=Ascent()),
        deltanet(rule=dgd(of=Ascent())),
        StartOfOnes(0.5),
        OwnRate(),
    ],
    ids=lambda level: repr(level)[:40],
)
def test_a_level_that_means_something_else_has_no_fast_form(level: Level) -> None:
    """A closed form stands for a level's own methods, all of them: `run` gives what the reference machine gives."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 6, 1, 4, dtype=F64) for _ in range(3))
    torch.manual_seed(1)  # deep memories start at random
    want, _ = scan(level, q, k, v)
    torch.manual_seed(1)
    got, _ = run(level, q, k, v)
    torch.testing.assert_close(got, want)
    assert fast_form(level) is None
