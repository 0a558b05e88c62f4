"""Levels that need the inputs of layers: what they get, and that these are watched."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from nestopt import levels
from nestopt.optim import Nested, optimizer


class Net(nn.Module):
    """One of everything."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.free = nn.Parameter(torch.eye(8))
        self.norm = nn.LayerNorm(8)
        self.up = nn.Linear(8, 12)
        self.head = nn.Linear(12, 7)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        x = x + self.depthwise(self.conv(x.mT)).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.up(self.norm(x @ self.free)))


LAYERS = {"conv.weight", "depthwise.weight", "up.weight", "head.weight"}


def taken(built: Nested, label: str) -> set[str]:
    return {row.name for row in built.explain() if row.level == label}


@pytest.mark.parametrize("level", [levels.dgd(), levels.dgd(levels.adam()), levels.ggd()])
def test_they_get_the_weights_of_layers(level: object, caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    built = optimizer(model, level, 0.1)
    assert taken(built, level.label) == LAYERS  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, "nestopt"):
        model(torch.randint(7, (2, 5))).square().mean().backward()
        built.step()
    assert not caplog.records  # every one of them was seen


def test_explain_says_why() -> None:
    rows = {row.name: row.why for row in optimizer(Net(), "dgd", 0.1).explain()}
    assert rows["up.weight"] == "a hidden matrix"
    assert rows["head.weight"] == (
        "the last linear layer, taken for the output, and dgd takes the weights of all layers"
    )
    assert rows["table.weight"] == "an embedding"
    assert rows["up.bias"] == "a vector"
    assert rows["free"] == "a hidden matrix, of no layer whose inputs are seen"
    assert rows["attention.out_proj.weight"] == "a hidden matrix, of no layer whose inputs are seen"


def test_with_matrices_too() -> None:
    built = optimizer(Net(), levels.dgd(levels.muon()), 0.1)
    assert taken(built, "dgd") == {"conv.weight", "up.weight"}


def test_a_weight_that_is_an_embedding_too() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model[2].weight = model[0].weight
    assert taken(optimizer(model, "dgd", 0.1), "dgd") == {"1.weight"}


def test_the_model_is_watched() -> None:
    """The first step of `dgd` differs from gradient descent as its equation says."""
    model, lr = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double(), 0.3
    x = torch.randn(6, 4, dtype=torch.float64)
    built = optimizer(model, "dgd", lr)
    model(x).square().mean().backward()
    weight, grad = model[0].weight.detach().clone(), model[0].weight.grad
    built.step()
    gram = x.T @ x / len(x)
    expected = weight - lr * grad @ torch.linalg.inv(torch.eye(4, dtype=torch.float64) + lr * gram)
    torch.testing.assert_close(model[0].weight.detach(), expected, rtol=1e-12, atol=1e-12)


def test_the_stack_of_a_group_is_watched_for() -> None:
    model, twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twin.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    group = {"match": r"^0\.weight", "stack": "dgd"}
    one, other = optimizer(model, "gd", 0.1, groups=[group]), optimizer(twin, "gd", 0.1)
    for net, built in ((model, one), (twin, other)):
        net(x).square().mean().backward()
        built.step()
    assert not torch.equal(model[0].weight, twin[0].weight)
    assert torch.equal(model[1].weight, twin[1].weight)


def test_strict_says_what_it_takes() -> None:
    with pytest.raises(ValueError, match="dgd gets none of the 1 parameters, as it takes the weights of layers only"):
        optimizer(nn.Embedding(4, 4), "dgd", strict=True)


def test_parameters_without_a_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "nestopt"):
        built = optimizer([torch.ones(3, 2, requires_grad=True)], "dgd", 0.1)
    assert taken(built, "adamw") == {"parameter 0"}
    assert "dgd gets none" in caplog.text
    assert (
        built.explain()[0].why
        == "2-dimensional (no model was given to tell its role), of no layer whose inputs are seen"
    )
