"""Which form runs a level: a package brings its own, for its own levels or for nestopt's, and a user overrules."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core import Accepted, Level, Refused, Signal, State, TokenForm, registry
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_choice import LEAVE_OUT, choose_form, make_form, scan
from nestopt.core.token_form import FormSetting
from nestopt.core.tree import leaves
from nestopt.levels import adam, deltanet, linear_attention, retnet, titans
from nestopt.nn import SequenceMemory
from nestopt.ops import fast_form, run

CPU = FormSetting(torch.device("cpu"))
F64 = torch.float64


class Leaky(Level):
    """The sum of what it is shown, of which a share leaks at each step."""

    leak: float = 0.1

    def init(self, param: Tensor) -> State:
        return {"sum": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        total = (1 - self.leak) * state["sum"] + grad
        return total, {"sum": total}


class LeakyForm(TokenForm):
    """All tokens at once: each sees those before it, times what is left of them."""

    levels: ClassVar[tuple[type[Level], ...]] = (Leaky,)
    level: Leaky
    calls = 0

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, Leaky)
        return Accepted("one product") if level.leak < 1 else Refused("leak=1 leaves nothing")

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        LeakyForm.calls += 1
        time = tokens.active.long().cumsum(-1)
        age = (time[..., :, None] - time[..., None, :]).clamp_min(0)
        left = ((1 - self.level.leak) ** age).to(tokens.dtype).tril() * tokens.active[..., None, :]
        since = ((1 - self.level.leak) ** time).to(tokens.dtype)
        start = state["level"]["sum"]
        y = (tokens.q @ tokens.k.mT * left) @ tokens.v + since[..., None] * (tokens.q @ start.mT)
        kept = left[..., -1:, :].mT * tokens.v
        end = since[..., -1, None, None] * start + kept.mT @ tokens.k
        return y, {"step": state["step"] + tokens.count, "level": {"sum": end}}


class OwnDelta(TokenForm):
    """In the place of nestopt's form of the delta rule: the same by a loop, with a state of its own layout."""

    levels: ClassVar[tuple[type[Level], ...]] = (deltanet,)
    priority: ClassVar[int] = 10

    @classmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        if device.type != "cpu":
            return Refused(f"it is written for CPUs, and the tokens are on {device.type!r}")
        return Refused("lr is no gate") if isinstance(level.lr, float) else Accepted("a loop of another package")

    def init(
        self, batch: int, heads: int, dim_k: int, dim_v: int, like: Tensor, learned: Mapping[str, Tensor]
    ) -> State:
        count = torch.zeros(batch, heads, dtype=torch.int64, device=like.device)
        return {"step": count, "matrix": like.new_zeros(batch, heads, dim_k, dim_v)}

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        m, lr, ys = state["matrix"], tokens.gate(gates["lr"], 0.0), []
        for t in range(tokens.k.shape[2]):
            k = tokens.k[:, :, t, :, None]
            m = m + lr[:, :, t, None, None] * k @ (tokens.v[:, :, t, None] - k.mT @ m)
            ys.append(tokens.q[:, :, t, None] @ m)
        return torch.cat(ys, 2), {"step": state["step"] + tokens.count, "matrix": m}


def plugin(**forms: type[TokenForm]) -> Any:
    @nestopt.hookimpl
    def nestopt_register_token_forms(register: Any) -> None:
        for name, form in forms.items():
            register(name, form)

    @nestopt.hookimpl
    def nestopt_register_levels(register: Any) -> None:
        register("leaky", Leaky)

    return SimpleNamespace(
        nestopt_register_token_forms=nestopt_register_token_forms, nestopt_register_levels=nestopt_register_levels
    )


@pytest.fixture
def forms() -> Iterator[None]:
    registry.add(plugin(leaky_product=LeakyForm, own_delta=OwnDelta), "test-forms")
    yield
    registry.remove("test-forms")


def tokens(length: int = 9) -> list[Tensor]:
    return [(torch.randn(2, length, 3, 4, dtype=F64) / 2).requires_grad_() for _ in range(3)]


@pytest.mark.usefixtures("forms")
def test_a_package_brings_a_fast_form_for_its_own_level() -> None:
    x, before = tokens(), LeakyForm.calls
    fast, end = run(Leaky(0.3), *x)
    slow, other = scan(Leaky(0.3), *x)
    assert LeakyForm.calls == before + 1
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(dict(leaves(end)), dict(leaves(other)))
    own, wanted = (torch.autograd.grad(y.sin().sum(), x) for y in (fast, slow))
    torch.testing.assert_close(own, wanted)
    assert fast_form(Leaky()) == "leaky_product"
    assert fast_form(Leaky(1.0)) is None


@pytest.mark.usefixtures("forms")
def test_its_level_is_a_layer_that_streams_pads_and_takes_single_tokens() -> None:
    layer = nestopt.layer("leaky", 8, 2).double()
    x = torch.randn(2, 7, 8, dtype=F64)
    y, end = layer(x)
    first, state = layer(x[:, :3])
    steps = []
    for t in range(3, 7):
        one, state = layer.step(x[:, t], state)
        steps.append(one[:, None])
    torch.testing.assert_close(torch.cat([first, *steps], 1), y)
    mask = torch.tensor([[True] * 7, [False] * 2 + [True] * 5])
    torch.testing.assert_close(layer(x, mask=mask)[0][1:, 2:], layer(x[1:, 2:])[0])
    anew = layer.reset(end, [0])
    torch.testing.assert_close(layer(x, anew)[0][:1], layer(x[:1])[0])


@pytest.mark.usefixtures("forms")
def test_a_package_replaces_a_built_in_form_with_a_state_of_its_own() -> None:
    layer = SequenceMemory(deltanet(), 8, 2).double()
    assert set(layer.init_state(1)["memory"]) == {"step", "matrix"}
    theirs = SequenceMemory(deltanet(), 8, 2, form="delta_rule").double()
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(2, 9, 8, dtype=F64)
    torch.testing.assert_close(layer(x)[0], theirs(x)[0])
    with pytest.raises(ValueError, match="has 'matrix', which this layer's state has not"):
        theirs(x, layer(x)[1])
    assert layer.explain() == "deltanet runs on tokens as own_delta: a loop of another package"
    assert choose_form(deltanet(lr=0.5), CPU).name == "delta_rule"
    assert ("own_delta", "lr is no gate") in choose_form(deltanet(lr=0.5), CPU).refused
    assert choose_form(retnet(), CPU).name == "linear_attention"  # which it was not asked about


@pytest.mark.usefixtures("forms")
def test_a_form_handles_the_rows_of_a_state_of_its_own_layout() -> None:
    layer = SequenceMemory(deltanet(), 8, 2).double()
    x = torch.randn(3, 9, 8, dtype=F64)
    begun, state = layer.init_state(3)["memory"], layer(x)[1]["memory"]
    one, two = layer.form.index(state, [2]), layer.form.index(state, [0, 1])
    assert one["matrix"].shape == (1, 2, 4, 4)
    back = layer.form.index(layer.form.cat([one, two]), [1, 2, 0])
    torch.testing.assert_close(dict(leaves(back)), dict(leaves(state)), rtol=0, atol=0)
    anew = layer.form.reset(state, begun, torch.tensor([True, False, True]))
    for name, leaf in leaves(anew):
        torch.testing.assert_close(leaf[[0, 2]], dict(leaves(begun))[name][[0, 2]], rtol=0, atol=0)
        torch.testing.assert_close(leaf[1], dict(leaves(state))[name][1], rtol=0, atol=0)


@pytest.mark.usefixtures("forms")
def test_the_form_is_chosen_anew_where_a_layer_moves_to() -> None:
    layer = SequenceMemory(deltanet(), 8, 2)
    assert layer.form.choice.name == "own_delta"
    other = copy.deepcopy(layer).to("meta")
    assert other.form.choice.name == "delta_rule"
    assert "not as own_delta: it is written for CPUs, and the tokens are on 'meta'" in other.explain()
    assert other.double().form.setting == FormSetting(torch.device("meta"), F64)
    assert layer.form.choice.name == "own_delta"


def test_a_form_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LEAVE_OUT, "delta_rule, oja")
    choice = choose_form(deltanet(), CPU)
    assert choice.name == "deep_memory"  # exact at chunk=1, too
    assert ("delta_rule", f"left out by {LEAVE_OUT}") in choice.refused
    assert choose_form(retnet(), CPU).name == "linear_attention"
    monkeypatch.setenv(LEAVE_OUT, "all")
    assert choose_form(deltanet(), CPU).name == "reference"
    level = nestopt.parallel(retnet(), deltanet())
    assert [f.choice.name for f in make_form(level, CPU).parts.values()] == ["reference"] * 2  # type: ignore[attr-defined]
    x = tokens()
    left_out = run(deltanet(), *x)[0]
    monkeypatch.delenv(LEAVE_OUT)
    torch.testing.assert_close(run(deltanet(), *x)[0], left_out)
    monkeypatch.setenv(LEAVE_OUT, "delta_rul")
    with pytest.raises(ValueError, match=r"names 'delta_rul', which is no form. Did you mean 'delta_rule'\?"):
        run(deltanet(), *x)


def test_a_form_may_be_named() -> None:
    x = tokens()
    torch.testing.assert_close(run(deltanet(), *x, form="deep_memory")[0], run(deltanet(), *x)[0])
    torch.testing.assert_close(run(deltanet(), *x, form="reference")[0], run(deltanet(), *x)[0])
    layer = SequenceMemory(deltanet(), 8, 2, form="reference")
    assert layer.explain() == "deltanet runs on tokens as reference: the reference machine, a token at a time"
    with pytest.raises(ValueError, match="form='oja' is not allowed for deltanet: objective=l2"):
        SequenceMemory(deltanet(), 8, 2, form="oja")
    with pytest.raises(ValueError, match=r"form='delta' is no form.*Known: attention, chain"):
        SequenceMemory(deltanet(), 8, 2, form="delta")
    with pytest.raises(ValueError, match="form='omega' is not allowed for adam: it is for Omega"):
        run(adam(), *x, form="omega")


def test_why_no_fast_form_runs_a_level_can_be_read() -> None:
    layer = SequenceMemory(titans(rule=adam(), step_size=0.01), 8, 2)
    assert (
        layer.explain().splitlines()[0]
        == "titans runs on tokens as reference: the reference machine, a chunk at a time"
    )
    assert "not as deep_memory: rule=adam is no linear recurrence" in layer.explain()
    said = str(nestopt.describe(layer))
    assert "titans runs on tokens as reference" in said
    assert "rule=adam is no linear recurrence" in said
    assert "deltanet runs on tokens as delta_rule" in str(nestopt.describe(SequenceMemory(deltanet(), 8, 2)))


def test_what_is_no_form_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not a subclass of nestopt\.core\.token_form\.TokenForm"):
        registry.add(plugin(wrong=Leaky), "wrong")  # type: ignore[arg-type]

    class Half(TokenForm):
        levels = (Leaky,)

    with pytest.raises(ValueError, match="lacks accepts, forward"):
        registry.add(plugin(half=Half), "half")


def test_a_form_is_listed_with_its_plugin(forms: None) -> None:
    (found,) = (p for p in registry.plugins() if p.name == "test-forms")
    assert ("token_form", "own_delta") in found.provides


def test_linear_attention_with_weights_given_as_tensors_waits_for_nothing() -> None:
    level = linear_attention(lr=torch.tensor(0.5), step_size=torch.tensor(1.0))
    x = torch.empty(1, 4, 2, 4, device="meta")
    assert run(level, x, x, x)[0].shape == x.shape
