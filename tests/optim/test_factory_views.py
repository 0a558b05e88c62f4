"""Parameters that are several matrices: where they are recognised, how they are given, and what comes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestopt import levels
from nestopt.config import Config, ConfigError, GroupConfig
from nestopt.optim import Nested, Split, optimizer

MATRIX_LEVELS = [levels.muon(), levels.shampoo(), levels.delta_momentum(), levels.m3(slow_period=2)]
MATRIX_IDS = [level.label for level in MATRIX_LEVELS]


def views(built: Nested) -> dict[str, Split | None]:
    return {name: group.get("view") for group in built.param_groups for name in group["param_names"]}


def why(built: Nested) -> dict[str, str]:
    return {row.name: row.why for row in built.explain()}


class Fused(nn.Module):
    """Attention with one projection for queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8, bias=False)
        self.conv = nn.Conv1d(8, 6, 3)
        self.head = nn.Linear(8, 2)


QKV = {"match": "qkv", "view": {"split": 3}}


def stepped(params: list[Tensor], grads: list[list[Tensor]], built: Nested) -> list[Tensor]:
    for each in grads:
        for param, grad in zip(params, each, strict=True):
            param.grad = grad.clone()
        built.step()
    return [param.detach() for param in params]


@pytest.mark.parametrize("level", MATRIX_LEVELS, ids=MATRIX_IDS)
@pytest.mark.parametrize(("split", "dim"), [(3, 0), (6, 0), (2, 1)])
def test_parts_are_stepped_as_if_each_were_a_parameter(level: Any, split: int, dim: int) -> None:
    model = Fused().double()
    model.qkv.bias = None
    start = model.qkv.weight.detach().clone()
    apart = [nn.Parameter(part.clone()) for part in start.chunk(split, dim)]
    grads = [torch.randn_like(start) for _ in range(4)]
    group = {"match": "qkv", "view": {"split": split, "dim": dim}}
    built = optimizer(model, level, 0.1, 0.01, groups=[group])
    (whole,) = stepped([model.qkv.weight], [[grad] for grad in grads], built)
    parts = stepped(apart, [list(grad.chunk(split, dim)) for grad in grads], Nested(apart, level, 0.1, 0.01))
    torch.testing.assert_close(whole, torch.cat(parts, dim), rtol=1e-9, atol=1e-11)
    # and that is another thing than to step the whole
    single = nn.Parameter(start.clone())
    (other,) = stepped([single], [[grad] for grad in grads], Nested([single], level, 0.1, 0.01))
    assert (whole - other).abs().max() > 1e-4


def test_a_fused_projection() -> None:
    built = optimizer(Fused(), "muon", groups=[QKV])
    assert views(built)["qkv.weight"] == Split(3)
    assert why(built)["qkv.weight"] == (
        "matches 'qkv'; the hidden matrices of queries, keys and values, by its name 'qkv'; seen as 3 matrices"
    )
    assert views(built)["qkv.bias"] is None  # a vector, which goes to the rest
    assert views(built)["out.weight"] is None


# -- nn.MultiheadAttention -------------------------------------------------------------------------------------------


def attention() -> nn.Module:
    return nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8), nn.Linear(8, 2))


@pytest.mark.parametrize("level", MATRIX_LEVELS, ids=MATRIX_IDS)
def test_the_projection_of_multihead_attention_is_known(level: Any) -> None:
    built = optimizer(attention(), level)
    found = views(built)
    assert found.pop("0.in_proj_weight") == Split(3)
    assert set(found.values()) == {None}
    assert "seen as 3 matrices" in why(built)["0.in_proj_weight"]


def test_the_three_are_as_apart() -> None:
    """Fused, or of other sizes and so not fused by torch, the steps are the same."""
    fused, apart = nn.MultiheadAttention(8, 2).double(), nn.MultiheadAttention(8, 2, kdim=7, vdim=6).double()
    apart.k_proj_weight = nn.Parameter(torch.empty(8, 8, dtype=torch.double))
    apart.v_proj_weight = nn.Parameter(torch.empty(8, 8, dtype=torch.double))
    three = [apart.q_proj_weight, apart.k_proj_weight, apart.v_proj_weight]
    with torch.no_grad():
        for param, part in zip(three, fused.in_proj_weight.chunk(3), strict=True):
            param.copy_(part)
    grads = [torch.randn(24, 8, dtype=torch.double) for _ in range(3)]
    (one,) = stepped([fused.in_proj_weight], [[grad] for grad in grads], optimizer(fused, "muon", 0.1))
    parts = stepped(three, [list(grad.chunk(3)) for grad in grads], optimizer(apart, "muon", 0.1))
    torch.testing.assert_close(one, torch.cat(parts), rtol=1e-10, atol=1e-12)


def test_what_was_recognised_can_be_overruled() -> None:
    whole = {"match": "in_proj_weight", "view": {"split": 1}}
    assert views(optimizer(attention(), "muon", groups=[whole]))["0.in_proj_weight"] is None
    heads = {"match": "in_proj_weight", "view": {"split": 6}}
    assert views(optimizer(attention(), "muon", groups=[heads]))["0.in_proj_weight"] == Split(6)


@pytest.mark.parametrize("spec", ["adamw", ["momentum", "adam"]])
def test_levels_that_go_entry_by_entry_see_no_parts(spec: Any) -> None:
    built = optimizer(attention(), spec)
    assert set(views(built).values()) == {None}
    assert len(built.param_groups) == 1


def test_levels_with_inputs_see_no_parts() -> None:
    for route in ("all", "hidden_matrices"):
        assert set(views(optimizer(attention(), "dgd", route=route)).values()) == {None}
    own = {"match": "in_proj_weight", "stack": "dgd"}
    assert set(views(optimizer(attention(), "gd", groups=[own])).values()) == {None}


def test_a_step_and_a_checkpoint() -> None:
    model, twin = attention(), attention()
    twin.load_state_dict(model.state_dict())
    first, second = optimizer(model, "muon", 0.1), optimizer(twin, "muon", 0.1)
    grads = [torch.randn_like(param) for param in model.parameters()]
    for net, built in ((model, first), (twin, second)):
        stepped(list(net.parameters()), [grads], built)
    again = optimizer(twin, "muon", 0.1)
    again.load_state_dict(second.state_dict())
    assert views(again) == views(first)
    for net, built in ((model, first), (twin, again)):
        stepped(list(net.parameters()), [[grad.cos() for grad in grads]], built)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


# -- what is given -----------------------------------------------------------------------------------------------------


def test_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    text = "optimizer: {stack: muon, groups: [{match: qkv, view: {split: 4, dim: 1}}]}"
    path.write_text(text, encoding="utf-8")
    assert views(optimizer(Fused(), path))["qkv.weight"] == Split(4, 1)
    config = Config.from_data({"optimizer": {"groups": [QKV]}})
    assert Config.from_data(config.to_data()) == config
    assert config.to_data()["optimizer"]["groups"][0]["view"] == {"split": 3, "dim": 0, "transposed": False}


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({"split": 5}, r"groups\[0\]\.view\.split: 5 does not divide dimension 0 of qkv.weight, which is 24×8"),
        ({"split": 3, "dim": 1}, r"groups\[0\]\.view\.split: 3 does not divide dimension 1 of qkv.weight"),
    ],
)
def test_what_does_not_divide(view: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizer(Fused(), "muon", groups=[{"match": "qkv", "view": view}])


@pytest.mark.parametrize(
    ("view", "message"),
    [
        ({}, r"view\.split: missing"),
        ({"splt": 3}, r"view\.splt: .*Did you mean 'split'"),
        ({"split": 0}, r"view\.split: 0 is not allowed"),
        ({"split": True}, r"view\.split: .*give a whole number"),
        ({"split": 3, "dim": 2}, r"view\.dim: 2 is not allowed"),
        ({"split": 3, "dim": True}, r"view\.dim: .*give 0 or 1"),
        (3, r"view: 3"),
    ],
)
def test_what_is_no_view(view: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupConfig(match="qkv", view=view)


def test_what_would_change_nothing_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"groups\[0\]\.view.* changes nothing: what 'qkv' matches goes to adamw, which"
    ):
        optimizer(Fused(), "adamw", groups=[QKV])
    with pytest.raises(ConfigError, match="changes nothing: what 'bias' matches goes to adamw, which"):
        optimizer(Fused(), "muon", groups=[{"match": "bias", "view": {"split": 3}}])
    with pytest.raises(ConfigError, match=r"groups\[0\]\.view.*only matrices can be split, and conv.weight is 6×8×3"):
        optimizer(Fused(), "muon", groups=[{"match": "conv", "view": {"split": 3}}])
    with pytest.raises(ValueError, match="dgd takes layer inputs, which are not split"):
        optimizer(Fused(), "dgd", groups=[QKV])
