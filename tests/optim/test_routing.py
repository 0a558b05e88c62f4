"""`nestopt.optim.optimizer`: which parameter goes where, and how that is said."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import nestopt
from nestopt import levels
from nestopt.config import ConfigError, OptimizerConfig, load
from nestopt.core import Level, chain, nest
from nestopt.core.periodic import Periodic
from nestopt.optim import Nested, optimizer


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3))


def where(built: Nested) -> dict[str, str]:
    """The level of each parameter, by name."""
    return {row.name: row.level for row in built.explain()}


def why(built: Nested) -> dict[str, str]:
    return {row.name: row.why for row in built.explain()}


def taken(built: Nested, level: str) -> set[str]:
    return {name for name, label in where(built).items() if label == level}


def assert_complete(built: Nested, model: nn.Module) -> None:
    """Every parameter that requires a gradient is in exactly one group, in whole."""
    placed = [param for group in built.param_groups for param in group["params"]]
    assert len(placed) == len({id(param) for param in placed})
    assert {id(param) for param in placed} == {id(param) for param in model.parameters() if param.requires_grad}
    assert len(built.explain()) == len(placed)


# -- models ------------------------------------------------------------------------------------------------------------


def test_mlp() -> None:
    model = mlp()
    built = optimizer(model, "muon", 0.02)
    assert_complete(built, model)
    assert taken(built, "muon") == {"0.weight", "2.weight"}
    assert why(built) == {
        "0.weight": "a hidden matrix",
        "2.weight": "a hidden matrix",
        "0.bias": "a vector",
        "1.weight": "of a normalisation",
        "1.bias": "of a normalisation",
        "2.bias": "a vector",
        "3.weight": "the last linear layer, taken for the output",
        "3.bias": "a vector",
    }


def test_convolutions() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),  # one channel in: a matrix, not depthwise
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 12, (3, 2), groups=2),
        nn.Conv1d(12, 5, 3),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    built = optimizer(model, "muon")
    assert_complete(built, model)
    assert taken(built, "muon") == {"0.weight", "3.weight", "4.weight"}
    assert why(built)["2.weight"] == "a depthwise convolution, which mixes no channels"
    assert why(built)["3.weight"] == "a convolution, seen as 12×48"
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    built.step()
    assert built.state[model[3].weight]["momentum"].shape == (12, 48)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.scale = nn.Parameter(torch.ones(()))
        self.heads = nn.Parameter(torch.ones(2, 4, 4))
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.table.weight


def test_transformer_with_tied_head() -> None:
    model = Tied()
    built = optimizer(model, "muon")
    assert_complete(built, model)
    assert taken(built, "muon") == {
        f"body.layers.{i}.{name}.weight"
        for i in range(2)
        for name in ("self_attn.in_proj", "self_attn.out_proj", "linear1", "linear2")
    } - {"body.layers.0.self_attn.in_proj.weight", "body.layers.1.self_attn.in_proj.weight"} | {
        "body.layers.0.self_attn.in_proj_weight",
        "body.layers.1.self_attn.in_proj_weight",
    }
    reasons = why(built)
    assert reasons["table.weight"] == "an embedding"
    assert "head.weight" not in reasons
    assert reasons["scale"] == "a scalar"
    assert reasons["heads"] == "3-dimensional, and not a convolution"


def test_a_tied_weight_is_stepped_once() -> None:
    model = Tied()
    before = model.table.weight.detach().clone()
    built = optimizer(model, "gd", 1.0)
    model.table.weight.grad = torch.ones_like(before)
    built.step()
    assert torch.equal(model.head.weight, before - 1)


class SaysItsOutput(nn.Module):
    """The output layer is not the last module, as in many a Hugging Face model."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(8, 11, bias=False)
        self.body = nn.Linear(8, 8, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.readout


def test_the_output_layer_that_the_model_names() -> None:
    built = optimizer(SaysItsOutput(), "muon")
    assert taken(built, "muon") == {"body.weight"}
    assert why(built)["readout.weight"] == "the output layer, by get_output_embeddings()"


class HeadFirst(nn.Module):
    """As Hugging Face ties them, with the use as an output layer defined before the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.body = nn.Linear(8, 8, bias=False)
        self.embed = nn.Embedding(11, 8)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def test_a_tie_is_found_by_identity() -> None:
    model = HeadFirst()
    built = optimizer(model, "muon")
    assert_complete(built, model)
    assert where(built) == {"lm_head.weight": "adamw", "body.weight": "muon"}
    model.lm_head.weight = nn.Parameter(torch.zeros(11, 8))  # equal in shape is not tied
    model.get_output_embeddings = lambda: None  # type: ignore[assignment]
    assert taken(optimizer(model, "muon"), "muon") == {"lm_head.weight"}  # now body is the last, and so the output
    assert where(optimizer(model, "muon"))["embed.weight"] == "adamw"


def test_a_model_within_another_still_names_its_output() -> None:
    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = SaysItsOutput()

    assert taken(optimizer(Wrapper(), "muon"), "muon") == {"model.body.weight"}


def test_a_single_linear_layer_is_hidden() -> None:
    assert where(optimizer(nn.Linear(3, 2), "muon")) == {"weight": "muon", "bias": "adamw"}


def test_a_stack_without_matrices_takes_everything() -> None:
    built = optimizer(mlp(), ["momentum", "adam"])
    assert set(where(built).values()) == {"chain"}
    assert set(why(built).values()) == {"chain takes any parameter"}
    assert len(built.param_groups) == 1


def test_a_stack_with_a_matrix_level_anywhere_takes_matrices_only() -> None:
    built = optimizer(mlp(), {"level": "parallel", "levels": ["gd", ["momentum", "muon"]]})
    assert taken(built, "parallel") == {"0.weight", "2.weight"}


# -- parameters without a model ----------------------------------------------------------------------------------------


def test_plain_parameters() -> None:
    made = [torch.zeros(shape, requires_grad=True) for shape in [(3, 2), (3,), (), (2, 2, 2)]]
    built = optimizer(iter([*made, made[0]]), "muon")
    assert where(built) == {
        "parameter 0": "muon",
        "parameter 1": "adamw",
        "parameter 2": "adamw",
        "parameter 3": "adamw",
    }
    assert why(built)["parameter 1"] == "1-dimensional (no model was given to tell its role)"


def test_named_parameters() -> None:
    built = optimizer(mlp().named_parameters(), "muon", groups=[{"match": "^3", "stack": "gd"}])
    assert taken(built, "muon") == {"0.weight", "2.weight"}
    assert taken(built, "gd") == {"3.weight", "3.bias"}


def test_what_are_no_parameters_is_refused() -> None:
    param = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match=r"parameter groups are for nestopt\.optim\.Nested"):
        optimizer([{"params": [param]}])
    with pytest.raises(TypeError, match=r"give \[tensor\]"):
        optimizer(param)
    with pytest.raises(ValueError, match="two parameters are called 'w'"):
        optimizer([("w", param), ("w", torch.ones(2, requires_grad=True))])
    with pytest.raises(ValueError, match="nothing to optimize"):
        optimizer(nn.ReLU())


@pytest.mark.parametrize("stack", ["adamw", "muon", "dgd", "shampoo"])
def test_what_is_frozen_trains_once_it_is_unfrozen(stack: str) -> None:
    """As if it had been there, and without a gradient, until then."""
    weights = []
    for frozen in (True, False):
        model = mlp()
        torch.manual_seed(1)
        for param in model.parameters():
            nn.init.normal_(param)
        model[2].requires_grad_(not frozen)
        built = optimizer(model, stack, 0.01, weight_decay=0.1)
        assert {row.name for row in built.explain() if row.frozen} == ({"2.weight", "2.bias"} if frozen else set())
        assert where(built).keys() == dict(model.named_parameters()).keys()
        for step in range(4):
            if step == 2:
                assert model[2].weight not in built.state
                model.requires_grad_(True)
            model.zero_grad()
            model(torch.full((3, 4), 1.0 + step)).square().sum().backward()
            if step < 2:
                model[2].zero_grad()
            built.step()
        weights.append(nn.utils.parameters_to_vector(model.parameters()))
    assert torch.equal(*weights)


def test_frozen_parameters_are_named_and_counted_apart(caplog: pytest.LogCaptureFixture) -> None:
    model = mlp()
    model[0].requires_grad_(False)
    model.codes = nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)  # never trained
    text = str(optimizer(model, "muon").explain())
    assert "muon: 1 tensor, 36 numbers" in text
    assert "frozen: 2 tensors, 30 numbers" in text
    assert "frozen; a hidden matrix" in text
    assert "codes" not in text
    with pytest.raises(ValueError, match="nothing to optimize"):
        optimizer(mlp().requires_grad_(False))
    model.requires_grad_(False)
    model[3].bias.requires_grad_(True)
    with pytest.raises(ValueError, match="muon gets none of the 1 parameters"):
        optimizer(model, "muon", strict=True)


# -- explain -----------------------------------------------------------------------------------------------------------


def test_explain() -> None:
    built = optimizer(mlp(), "muon", 0.02, rest={"stack": "adam", "lr": 0.001}, groups=[{"match": "2", "period": 4}])
    rows = {row.name: row for row in built.explain()}
    row = rows["0.weight"]
    assert (row.shape, row.level, row.lr, row.period, row.why) == ((6, 4), "muon", 0.02, 1, "a hidden matrix")
    assert (rows["3.bias"].level, rows["3.bias"].lr) == ("adam", 0.001)
    with pytest.raises(ValueError, match=r"muon takes matrices, and 2.bias"):
        optimizer(mlp(), "muon", groups=[{"match": "2", "stack": "muon"}])


def test_explain_as_text() -> None:
    text = str(optimizer(nn.Linear(3, 2), "muon", 0.02).explain()).splitlines()
    assert [line.split(maxsplit=5) for line in text[:3]] == [
        ["parameter", "shape", "level", "lr", "period", "why"],
        ["weight", "2×3", "muon", "0.02", "1", "a hidden matrix"],
        ["bias", "2", "adamw", "0.001", "1", "a vector"],
    ]
    assert text[3:] == ["", "muon: 1 tensor, 6 numbers", "adamw: 1 tensor, 2 numbers"]


def test_explain_of_a_hand_made_optimizer() -> None:
    built = Nested([torch.ones(2, requires_grad=True)], "momentum", lr=torch.tensor(0.5))
    (row,) = built.explain()
    assert (row.name, row.lr, row.why) == ("group 0, parameter 0", 0.5, "given by the caller")


# -- nothing for the stack ---------------------------------------------------------------------------------------------


def test_strict_refuses_a_stack_that_gets_nothing(caplog: pytest.LogCaptureFixture) -> None:
    vectors = [torch.ones(3, requires_grad=True)]
    with pytest.raises(ValueError, match="muon gets none of the 1 parameters, as it takes hidden matrices only"):
        optimizer(vectors, "muon", strict=True)
    with pytest.raises(ValueError, match="momentum gets none of the 1 parameters"):
        optimizer(vectors, "momentum", route="hidden_matrices", strict=True)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, "nestopt"):
        assert where(optimizer(vectors, "muon")) == {"parameter 0": "adamw"}
    assert "muon gets none of the 1 parameters" in caplog.text


# -- route, rest, groups -----------------------------------------------------------------------------------------------


def test_routes() -> None:
    model = mlp()
    assert taken(optimizer(model, "momentum", route="hidden_matrices"), "momentum") == {"0.weight", "2.weight"}
    assert taken(optimizer(model, "momentum", route="all"), "momentum") == set(dict(model.named_parameters()))
    assert taken(optimizer(model, "muon", route="auto"), "muon") == {"0.weight", "2.weight"}

    def two_dimensional(name: str, param: Tensor) -> bool:
        return param.ndim == 2 and not name.startswith("0")

    built = optimizer(model, "muon", route=two_dimensional)
    assert taken(built, "muon") == {"2.weight", "3.weight"}
    assert set(why(built).values()) == {"as the route function says"}
    with pytest.raises(ValueError, match=r"muon takes matrices, and 0.bias has shape \(6,\)"):
        optimizer(model, "muon", route="all")
    with pytest.raises(ConfigError, match=r"route: 'hidden' is not allowed.*Did you mean 'hidden_matrices'"):
        optimizer(model, "muon", route="hidden")


@pytest.mark.parametrize(
    "rest",
    [
        "momentum",
        levels.momentum(),
        {"level": "momentum"},
        {"stack": "momentum"},
        {"stack": levels.momentum(), "lr": 0.3, "weight_decay": 0.2},
    ],
)
def test_rest(rest: Any) -> None:
    built = optimizer(mlp(), "muon", 0.02, 0.1, rest)
    stack, others = built.param_groups
    assert (stack["lr"], stack["weight_decay"]) == (0.02, 0.1)
    assert others["stack"] == levels.momentum()
    own = isinstance(rest, dict) and "lr" in rest
    assert (others["lr"], others["weight_decay"]) == ((0.3, 0.2) if own else (0.001, 0.1))


MUON_LIKE: list[Any] = ["muon", "m3", {"level": "m3", "scale": None}, ["momentum", "muon"], "newton_schulz", "shampoo"]
ADAM_LIKE: list[Any] = [
    {"level": "muon", "scale": "match_rms_adamw"},
    {"level": "m3", "scale": "match_rms_adamw"},
    ["momentum", {"level": "muon", "scale": "match_rms_adamw"}],
]


@given(
    st.sampled_from([*MUON_LIKE, *ADAM_LIKE]),
    st.sampled_from(["adamw", "adam", "second_moment", "regression_optimum", ["momentum", "adam"], "gd", "momentum"]),
    st.floats(0, 1),
    st.booleans(),
)
def test_the_rest_has_its_own_rate_unless_both_are_comparable(stack: Any, rest: Any, lr: float, tensor: bool) -> None:
    built = optimizer(mlp(), stack, torch.tensor(lr) if tensor else lr, rest=rest)
    first, others = built.param_groups
    alike = stack in ADAM_LIKE and rest not in ("gd", "momentum")
    assert float(first["lr"]) == pytest.approx(lr)
    assert float(others["lr"]) == pytest.approx(lr if alike else 1e-3)
    assert isinstance(others["lr"], torch.Tensor) == tensor
    assert others["lr"] is not first["lr"] or not tensor


def test_a_rest_comparable_by_its_own_kind_shares_the_rate() -> None:
    assert optimizer(mlp(), chain(levels.muon(), levels.gd()), 0.2, rest="gd").param_groups[1]["lr"] == 0.2


@pytest.mark.parametrize(
    ("stack", "says"),
    [
        (levels.momentum(period=4), ["momentum applies the sum of 4 gradients at each of 4 steps"]),
        (levels.gd(period=2), ["gd applies the sum of 2 "]),
        (levels.cms(periods=(1, 8), rule=levels.momentum()), ["momentum applies the sum of 8 "]),
        (chain(levels.adam(), levels.momentum(period=3)), ["momentum applies the sum of 3 "]),
        (levels.momentum(period=4, clock="mean"), []),
        (levels.adam(period=4), []),
        (levels.muon(period=4), []),
        (chain(levels.momentum(period=3), levels.adam()), []),
        (nest(levels.momentum(period=3), levels.momentum()), []),
        (levels.momentum(), []),
    ],
)
def test_explain_says_which_clock_applies_a_sum_at_every_step(stack: Level, says: list[str]) -> None:
    before = torch.get_rng_state()
    for row in Nested([torch.ones(3, 2, requires_grad=True)], stack).explain():
        assert ("applies the sum" in row.why) == bool(says)
        assert all(said in row.why for said in says)
    assert torch.equal(torch.get_rng_state(), before)


def test_rest_as_a_list_is_a_chain() -> None:
    assert optimizer(mlp(), "muon", rest=["momentum", "adam"]).param_groups[1]["stack"] == chain(
        levels.momentum(), levels.adam()
    )


def test_groups_first_match_counts() -> None:
    built = optimizer(
        mlp(),
        "muon",
        0.02,
        0.1,
        groups=[
            {"match": r"^2\.weight$", "lr": 0.5, "period": 4, "weight_decay": 0.0},
            {"match": "^[23]", "stack": {"level": "momentum", "beta": 0.5}},
        ],
    )
    exact, regex = built.param_groups[2:]
    assert exact["param_names"] == ["2.weight"]
    assert (exact["stack"], exact["lr"], exact["period"], exact["weight_decay"]) == (levels.muon(), 0.5, 4, 0.0)
    assert regex["param_names"] == ["2.bias", "3.weight", "3.bias"]
    assert (regex["stack"], regex["lr"], regex["weight_decay"]) == (levels.momentum(0.5), 0.02, 0.1)
    assert why(built)["2.bias"] == "matches '^[23]'"


def test_a_group_without_a_stack_is_routed() -> None:
    built = optimizer(mlp(), "muon", 0.02, rest={"stack": "adam", "lr": 0.001}, groups=[{"match": "^2", "period": 4}])
    found = {row.name: (row.level, row.lr, row.period) for row in built.explain()}
    assert found["2.weight"] == ("muon", 0.02, 4)
    assert found["2.bias"] == ("adam", 0.001, 4)
    assert found["0.bias"] == ("adam", 0.001, 1)
    assert why(built)["2.bias"] == "matches '^2'; a vector"


def test_a_pattern_without_a_parameter_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"groups\[0\].match: '2.wieght' matches no .* Did you mean '2.weight'"):
        optimizer(mlp(), "muon", groups=[{"match": "2.wieght", "lr": 1.0}])
    with pytest.raises(ConfigError, match=r"matches no parameter .* Names look like '0.weight'"):
        optimizer(mlp(), "muon", groups=[{"match": "zzzzzzzz"}])
    with pytest.raises(ConfigError, match=r"groups\[1\].match: all parameters that '2.bias' matches belong to groups"):
        optimizer(mlp(), "momentum", groups=[{"match": "2"}, {"match": "2.bias"}])
    with pytest.raises(ConfigError, match=r"groups\[0\].match.*regular expression"):
        optimizer(mlp(), "muon", groups=[{"match": "("}])
    with pytest.raises(ConfigError, match=r"groups\[0\].*Did you mean 'period'"):
        optimizer(mlp(), "muon", groups=[{"match": "2", "perid": 3}])


# -- clocks of modules -------------------------------------------------------------------------------------------------


class Slow(Periodic, nn.Linear):
    period = 5


class Counter(nn.Linear):
    """Of a user, whose `period` has nothing to do with optimizers."""

    period = 5


def test_an_attribute_that_happens_to_be_called_period_says_nothing() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Counter(4, 4), nn.Linear(4, 2))
    built = optimizer(model, "muon", 0.1)
    assert {row.period for row in built.explain()} == {1}
    before = model[1].weight.detach().clone()
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    built.step()
    assert not torch.equal(before, model[1].weight)


def test_the_blocks_of_a_static_continuum_are_periodic() -> None:
    module = nestopt.layer({"level": "cms", "periods": [1, 4]}, dim=4)
    assert {row.period for row in optimizer(module, "adam", 0.1).explain()} == {1, 4}


def test_modules_with_a_period() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Slow(4, 4), nn.Linear(4, 2))
    built = optimizer(model, "muon", 0.1, groups=[{"match": r"^0\.bias", "lr": 0.3}])
    periods = {row.name: row.period for row in built.explain()}
    assert periods == {"0.weight": 1, "1.weight": 5, "1.bias": 5, "2.weight": 1, "2.bias": 1, "0.bias": 1}
    assert why(built)["1.weight"] == "a hidden matrix; its module has period 5"
    assert where(built)["1.weight"] == "muon"
    before = [param.detach().clone() for param in model[1].parameters()]
    for t in range(1, 6):
        for param in model.parameters():
            param.grad = torch.randn_like(param)
        built.step()
        moved = [not torch.equal(a, b) for a, b in zip(before, model[1].parameters(), strict=True)]
        assert moved == [t == 5] * 2


def test_a_group_may_overrule_the_period_of_a_module() -> None:
    built = optimizer(Slow(4, 4), "momentum", groups=[{"match": "bias", "period": 2}])
    assert {row.name: row.period for row in built.explain()} == {"weight": 5, "bias": 2}


# -- what is given, and files ------------------------------------------------------------------------------------------


def test_learning_rate_as_a_tensor() -> None:
    rate = torch.tensor(0.25)
    built = optimizer(mlp(), "muon", rate, rest={"stack": "gd", "lr": 0.5})
    assert built.param_groups[0]["lr"] is rate
    assert built.param_groups[1]["lr"] == 0.5
    rate.fill_(0.125)
    assert built.explain()[0].lr == 0.125


def test_later_groups_have_the_same_settings() -> None:
    built = optimizer(mlp(), "momentum", 0.3, 0.2, maximize=True)
    built.add_param_group({"params": [("late", torch.ones(2, requires_grad=True))]})
    late = built.param_groups[-1]
    assert (late["stack"], late["lr"], late["weight_decay"], late["maximize"]) == (levels.momentum(), 0.3, 0.2, True)


def test_ways_of_the_optimizer() -> None:
    model = mlp()
    built = optimizer(model, "muon", metrics=True, on_nonfinite="raise")
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    built.step()
    assert built.metrics()["0.update_rms"] > 0
    model[0].weight.grad.fill_(torch.nan)
    with pytest.raises(RuntimeError, match=r"0\.weight"):
        built.step()
    with pytest.raises(TypeError, match=r"nestopt.optimizer has no argument 'metric'\. Did you mean 'metrics'"):
        optimizer(model, "muon", metric=True)
    with pytest.raises(TypeError, match=r"has no argument 'layerdecay'\. Did you mean 'layer_decay'"):
        optimizer(model, "muon", layerdecay=0.9)
    with pytest.raises(TypeError, match="has no argument 'period'"):
        optimizer(model, "muon", period=2)


def test_defaults() -> None:
    built = optimizer(mlp())
    assert built.param_groups[0]["lr"] == 1e-3
    assert built.param_groups[0]["weight_decay"] == 0
    assert built.param_groups[0]["stack"] == levels.adamw()


CONFIG = """
optimizer:
  stack: [{level: momentum, beta: 0.5, period: 2}, muon]
  lr: 0.03
  weight_decay: 0.1
  rest: {stack: adam, lr: 0.004}
  groups:
    - {match: ^2, stack: momentum, period: 3}
"""


def check_configured(built: Nested) -> None:
    stack, rest, group = built.param_groups
    assert stack["stack"] == chain(levels.momentum(0.5, period=2), levels.muon())
    assert (stack["lr"], stack["weight_decay"]) == (0.03, 0.1)
    assert (rest["stack"], rest["lr"]) == (levels.adam(), 0.004)
    assert (group["stack"], group["period"], group["lr"]) == (levels.momentum(), 3, 0.03)
    assert group["param_names"] == ["2.weight", "2.bias"]


def test_a_yaml_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    config = load(path)
    section = config.optimizer.model_dump()
    for spec in (path, str(path), config, config.optimizer, section):
        check_configured(optimizer(mlp(), spec))
    # what is given goes before what the file says
    built = optimizer(mlp(), path, lr=0.5, rest="gd", groups=[{"match": "^3"}])
    assert built.param_groups[0]["lr"] == 0.5
    assert built.param_groups[1]["stack"] == levels.gd()
    assert built.param_groups[2]["param_names"] == ["3.weight", "3.bias"]
    with pytest.raises(ValueError, match="chain gets none"):
        optimizer([torch.ones(3, requires_grad=True)], path, groups=[])  # a file is strict unless it says otherwise


def test_a_yaml_file_with_a_stack_alone(tmp_path: Path) -> None:
    path = tmp_path / "stack.yml"
    path.write_text("[momentum, {level: adam, eps: 0.001}]", encoding="utf-8")
    built = optimizer(mlp(), str(path), lr=0.2)
    (group,) = built.param_groups
    assert group["stack"] == chain(levels.momentum(), levels.adam(eps=0.001))
    assert group["lr"] == 0.2


def test_a_wrong_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("no file")):
        optimizer(mlp(), tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"stack: 'moun' .*Did you mean 'muon'"):
        optimizer(mlp(), "moun")
    with pytest.raises(ConfigError, match=r"stack.bta: .*Did you mean 'beta'"):
        optimizer(mlp(), {"level": "momentum", "bta": 0.5})
    with pytest.raises(ConfigError, match=r"lr: -1"):
        optimizer(mlp(), "muon", -1)


def test_the_steps_are_those_of_the_parts() -> None:
    """Routed and run as one, equal to two optimizers by hand."""
    model, twin = mlp(), mlp()
    twin.load_state_dict(model.state_dict())
    hidden, others = [twin[0].weight, twin[2].weight], [twin[0].bias, *twin[1].parameters(), twin[2].bias]
    others += list(twin[3].parameters())
    built = [optimizer(model, "muon", 0.02, rest={"stack": "adam", "lr": 0.01})]
    by_hand = [Nested(hidden, "muon", 0.02), torch.optim.Adam(others, 0.01)]
    for _ in range(10):
        x = torch.randn(16, 4)
        for net, optimizers in ((model, built), (twin, by_hand)):
            net.zero_grad()
            net(x).square().mean().backward()
            for each in optimizers:
                each.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_configuration_section_of_all_defaults_is_taken() -> None:
    assert taken(optimizer(mlp(), OptimizerConfig()), "muon") == {"0.weight", "2.weight"}


def test_a_number_by_itself_is_not_decayed() -> None:
    model = nn.Linear(3, 3)
    model.scale = nn.Parameter(torch.tensor(-2.0))
    found = nestopt.optimizer(model, "muon", weight_decay=0.1)
    decay = {param: group["weight_decay"] for group in found.param_groups for param in group["params"]}
    assert [decay[model.weight], decay[model.bias], decay[model.scale]] == [0.1, 0.1, 0.0]
    own = nestopt.optimizer(model, "muon", weight_decay=0.1, groups=[{"match": "scale", "stack": "momentum"}])
    assert {group["weight_decay"] for group in own.param_groups if model.scale in set(group["params"])} == {0.0}
    sgd = nestopt.optimizer(model, "momentum", lr=1.0, weight_decay=0.1)
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    sgd.step()
    assert model.scale.item() == -2.0
    groups = [{"match": "scale", "weight_decay": 0.2}]
    found = nestopt.optimizer(model, "adamw", weight_decay=0.1, groups=groups)
    assert {group["weight_decay"] for group in found.param_groups} == {0.1, 0.2}
