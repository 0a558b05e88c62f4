"""A long sequence goes through a layer in pieces, on which nothing depends."""

from __future__ import annotations

import math

import pytest
import torch

from nestopt.core.level import Level
from nestopt.core.token_choice import make_form
from nestopt.core.token_form import FormSetting, TokenForm
from nestopt.levels import adam, attention, deltanet, self_modifying, titans, window_attention
from nestopt.nn import SequenceMemory, pieces
from nestopt.nn.pieces import lengths
from tests.nn.tools import F64, make, same, same_states

NAMES = ["titans in chunks", "titans before", "deltanet", "gated", "short window", "omega", "self_modifying in chunks"]


def cut_into(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    """Let pieces be of as many blocks of 4 tokens as have so many numbers."""
    monkeypatch.setattr(TokenForm, "piece", 4)
    monkeypatch.setattr(pieces, "CACHED", count)


def form_of(level: Level) -> TokenForm:
    return make_form(level, FormSetting(torch.device("cpu")))


@pytest.mark.parametrize("options", [{}, {"rope": 100.0}])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_depends_on_pieces(name: str, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    module = make(name, **options)
    x = torch.randn(2, 31, 8, dtype=F64, requires_grad=True)
    inputs = [x, *module.parameters()]

    def run() -> tuple[torch.Tensor, dict[str, object], tuple[torch.Tensor, ...]]:
        first, state = module(x[:, :2])
        second, end = module(x[:, 2:], state)
        y = torch.cat([first, second], dim=1)
        return y, end, torch.autograd.grad(y.sin().sum(), inputs)

    y, end, slopes = run()
    cut_into(monkeypatch, 0)
    assert len(lengths(module.form, x, module.init_state(2)["memory"])) > 1
    in_pieces, same_end, same_slopes = run()
    same(in_pieces, y)
    same_states(same_end, end)
    same(same_slopes, slopes, 1e-9)
    frozen, _ = module(x, end, learn=False)
    monkeypatch.undo()
    same(frozen, module(x, end, learn=False)[0])


def test_pieces_end_where_chunks_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 2 * 8 * 12)
    module = SequenceMemory(titans(chunk=6, read="chunk"), 8, 2)
    x = torch.randn(2, 40, 8)
    _, state = module(x[:, :5])
    assert math.lcm(4, 6) == 12
    assert lengths(module.form, x, module.init_state(2)["memory"]) == [12, 12, 12, 4]
    assert lengths(module.form, x, state["memory"]) == [7, 12, 12, 9]
    assert lengths(module.form, x[:, :3], state["memory"]) == [3]
    other = SequenceMemory(self_modifying(chunk=3, projection_chunk=12), 8, 2)
    assert lengths(other.form, x, other.init_state(2)["memory"]) == [12, 12, 12, 4]


def test_what_grows_has_no_closed_form_or_is_elsewhere_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 0)
    x = torch.randn(2, 40, 8)
    assert lengths(form_of(deltanet()), x, {}) == [4] * 10
    assert lengths(form_of(window_attention()), x, {}) == [4] * 10
    for level in (attention(), deltanet(rule=adam(), step_size=0.1)):
        assert lengths(form_of(level), x, {}) == [40]
    assert lengths(form_of(deltanet()), x.to("meta"), {}) == [40]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
def test_pieces_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    cut_into(monkeypatch, 0)
    module = make("deltanet")
    x = torch.randn(2, 10, 8, dtype=F64, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    (own,) = torch.autograd.grad(compiled(x)[0].sin().sum(), x)
    (wanted,) = torch.autograd.grad(module(x)[0].sin().sum(), x)
    same(own, wanted)
