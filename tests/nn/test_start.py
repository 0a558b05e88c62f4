"""How layers begin: of the right size, with a gradient for everything, and finite for long; and their gates."""

from __future__ import annotations

import pytest
import torch

import nestopt
from nestopt.core import Gate
from nestopt.levels import deltanet, gated_deltanet, momentum, oja, retnet, titans
from nestopt.nn import SequenceMemory
from nestopt.ops import fast_form
from tests.levels.gradient.tools import LINKS
from tests.nn.tools import COMPOSED, OF_THEIR_OWN, REFUSED, REGISTERED, level_of

SLOW = {name for name in REGISTERED if fast_form(level_of(name)) is None} - {"adam"}


def test_no_registered_level_is_left_out() -> None:
    assert set(nestopt.levels.list()) == {*REGISTERED, *REFUSED, *COMPOSED, *LINKS}
    for name in REFUSED - OF_THEIR_OWN:
        with pytest.raises(ValueError, match=name):
            SequenceMemory(nestopt.build("level", name), 8, 2)(torch.randn(1, 2, 8))


@pytest.mark.parametrize("name", REGISTERED)
def test_outputs_are_as_large_as_inputs_and_everything_learns(name: str) -> None:
    module = SequenceMemory(level_of(name), 32, 2)
    x = torch.randn(2, 64, 32)
    y, _ = module(x)
    assert 0.3 < float(y.detach().square().mean().sqrt()) < 3
    y.square().sum().backward()
    for path, parameter in module.named_parameters():
        assert parameter.grad is not None, path
        assert parameter.grad.isfinite().all(), path
        assert parameter.grad.any(), path


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in REGISTERED]
)
def test_long_sequences_stay_finite(name: str) -> None:
    module = SequenceMemory(level_of(name), 16, 2)
    with torch.no_grad():
        y, _ = module(torch.randn(1, 2048, 16))
    assert y.isfinite().all()
    assert float(y.square().mean().sqrt()) < 3


@pytest.mark.parametrize("name", [name for name in REGISTERED if fast_form(level_of(name))])
def test_gradients_through_long_sequences_are_finite(name: str) -> None:
    module = SequenceMemory(level_of(name), 16, 2)
    module(torch.randn(1, 2048, 16))[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_constants_per_head_are_not_learned() -> None:
    module = SequenceMemory(retnet(), 8, 4)
    assert module.gates is None
    x = torch.randn(2, 5, 8)
    alike = SequenceMemory(retnet(), 8, 4, gates=False)
    alike.load_state_dict(module.state_dict())
    torch.testing.assert_close(alike(x)[0], module(x)[0])


def test_gates_start_where_they_are_told() -> None:
    module = SequenceMemory(titans(), 8, 2, gates={"retention.keep": 0.75, "rule.beta": 0.25})
    gates = module.gates_at(torch.randn(2, 3, 8))
    want = {"lr": 0.5, "retention.keep": 0.75, "rule.beta": 0.25}
    torch.testing.assert_close(gates, {path: torch.full((2, 3, 2), value) for path, value in want.items()})


def test_gates_may_all_be_left_at_their_constants() -> None:
    torch.manual_seed(1)
    learned = SequenceMemory(titans(chunk=4), 8, 2)
    fixed = SequenceMemory(titans(chunk=4), 8, 2, gates=False)
    assert not [name for name, _ in fixed.named_parameters() if name.startswith("gates")]
    fixed.load_state_dict({k: v for k, v in learned.state_dict().items() if not k.startswith("gates")})
    x = torch.randn(2, 9, 8)
    torch.testing.assert_close(fixed(x)[0], learned(x)[0])


@pytest.mark.parametrize(
    ("gates", "message"),
    [
        ({"retention.kep": 0.5}, r"'retention.kep', which is no gate of it. Did you mean 'retention.keep'\?"),
        ({"lr": 1.0}, r"gates\['lr'\]=1.0 is not allowed; give a number strictly between 0.0 and 1.0"),
        ({"lr": True}, r"gates\['lr'\]=True"),
    ],
)
def test_gates_that_the_level_has_not_are_refused(gates: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SequenceMemory(gated_deltanet(), 8, 2, gates=gates)


def test_a_constant_per_head_has_no_start() -> None:
    with pytest.raises(ValueError, match=r"'retention\.keep', which is a constant per head\. retnet learns: none"):
        SequenceMemory(retnet(), 8, 2, gates={"retention.keep": 0.5})


def test_values_are_normalised_as_the_level_asks_unless_told() -> None:
    assert SequenceMemory(oja(), 8, 2).v_norm
    assert not SequenceMemory(oja(), 8, 2, v_norm=False).v_norm
    assert not SequenceMemory(deltanet(), 8, 2).v_norm
    module = SequenceMemory(oja(), 8, 2, out_norm=False, conv=0).double()
    x = torch.randn(1, 4, 8, dtype=torch.float64)
    before = module(x)[0]
    with torch.no_grad():
        module.value.weight.mul_(3)
    torch.testing.assert_close(module(x)[0], before)


def test_gates_keep_their_digits_in_bfloat16() -> None:
    module = SequenceMemory(momentum(Gate(0.99)), 8, 2).bfloat16()
    gate = module.gates_at(torch.randn(1, 2, 8, dtype=torch.bfloat16))["beta"]
    assert gate.dtype == torch.float32
    torch.testing.assert_close(gate, torch.full((1, 2, 2), 0.99), rtol=0, atol=1e-3)


def test_checkpointed_chunks_give_the_same_gradients() -> None:
    torch.manual_seed(1)
    whole = SequenceMemory(titans(chunk=2), 8, 2).double()
    again = SequenceMemory(titans(chunk=2), 8, 2, checkpoint=3).double()
    again.load_state_dict(whole.state_dict())
    x = torch.randn(2, 13, 8, dtype=torch.float64)
    one, two = (torch.autograd.grad(m(x)[0].sin().sum(), list(m.parameters())) for m in (whole, again))
    torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="checkpoint=-1"):
        SequenceMemory(titans(), 8, 2, checkpoint=-1)
