"""What a watcher sums, against the rows themselves in float64: taken patch by patch, in plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from nestopt.levels.gradient.dgd import Dgd
from tests.optim.watched import Block, Letter, agrees, expected, patches, taken, told, watch

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(4, 3), (20, 4)),
    "linear without bias": (lambda: nn.Linear(4, 3, bias=False), (20, 4)),
    "few rows": (lambda: nn.Linear(9, 7), (2, 9)),
    "one vector": (lambda: nn.Linear(4, 3), (4,)),
    "sequences": (lambda: nn.Linear(4, 3), (2, 5, 4)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2, groups=2), (3, 4, 11)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2), (2, 4, 6, 7)),
    "conv2d without bias": (lambda: nn.Conv2d(2, 3, 3, stride=2, bias=False), (2, 2, 8, 8)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (2, 3, 1), stride=(2, 1, 1), padding=(1, 0, 0)), (2, 2, 3, 4, 3)),
    "depthwise": (lambda: nn.Conv1d(4, 8, 3, groups=4, padding=2), (2, 4, 6)),
    "same": (lambda: nn.Conv2d(2, 3, (2, 4), padding="same", dilation=(1, 3)), (2, 2, 6, 11)),
    "valid": (lambda: nn.Conv1d(2, 3, 2, padding="valid"), (2, 2, 6)),
    "circular": (lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), (2, 2, 6, 5)),
    "reflect same": (lambda: nn.Conv1d(2, 3, 4, padding="same", padding_mode="reflect"), (2, 2, 6)),
    "no batch": (lambda: nn.Conv2d(2, 3, 3), (2, 6, 5)),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's own, of what it does itself
@pytest.mark.parametrize(
    "level",
    [Letter(), Letter(normalize_inputs=True), Letter(solver="exact"), Letter(solver="exact", normalize_inputs=True)],
    ids=["explicit", "normalized", "exact", "exact normalized"],
)
@pytest.mark.parametrize("name", LAYERS)
def test_sums_are_those_of_the_rows(name: str, level: Dgd) -> None:
    make, shape = LAYERS[name]
    layer = make().double()
    watcher = watch(layer, level)
    x = torch.randn(shape, dtype=torch.float64)
    if name == "sequences":
        x[1, 2] = 0.0  # as padding is; it has no direction
    layer(x).square().sum().backward()
    got = taken(watcher, layer.weight)
    want = expected(layer.weight, patches(layer, x), level.normalize_inputs)
    agrees(got, want)
    if level.solver == "exact":
        rows = patches(layer, x)
        assert (got.rows is None) != (got.gram is None)
        assert (got.gram is None) == (rows.shape[1] < rows.shape[2])
    assert told(watcher, layer.weight) is None, "sums start anew"


@pytest.mark.parametrize("solver", ["explicit", "exact"])
@pytest.mark.parametrize("sizes", [(20, 30), (1, 2, 1), (2, 30), (30, 2), (7, 1, 1)])
def test_accumulation_is_one_mean_over_all_rows(sizes: tuple[int, ...], solver: Any) -> None:
    layer = nn.Linear(9, 7).double()
    watcher = watch(layer, Letter(solver=solver))
    batches = [torch.randn(n, 9, dtype=torch.float64) for n in sizes]
    for x in batches:
        layer(x).square().mean().backward()
    agrees(taken(watcher, layer.weight), expected(layer.weight, torch.cat(batches)[None]))


def test_tied_weights_sum_over_uses() -> None:
    one, two = nn.Linear(5, 5).double(), nn.Linear(5, 5).double()
    two.weight = one.weight
    model = nn.Sequential(one, nn.Tanh(), two, nn.Tanh(), one)
    watcher = watch(model)
    x = torch.randn(11, 5, dtype=torch.float64)
    model(x).sum().backward()
    h = torch.tanh(one(x))
    rows = torch.cat([x, h, torch.tanh(two(h))])
    agrees(taken(watcher, one.weight), expected(one.weight, rows[None]))


def test_only_uses_with_a_backward_pass_count() -> None:
    layer = nn.Linear(4, 3).double()
    watcher = watch(layer)
    x, other = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    with torch.no_grad():
        layer(other)
    layer(other)
    layer.eval()
    with torch.inference_mode():
        layer(other)
    assert told(watcher, layer.weight) is None
    layer(x).sum().backward()  # still in evaluation: what has a gradient counts
    agrees(taken(watcher, layer.weight), expected(layer.weight, x[None]))


@pytest.mark.parametrize("n", [2, 40])
def test_a_graph_used_twice_counts_twice(n: int) -> None:
    layer = nn.Linear(6, 5).double()
    watcher = watch(layer)
    a, b = torch.randn(n, 6, dtype=torch.float64), torch.randn(n, 6, dtype=torch.float64)
    loss = layer(a).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    layer(b).sum().backward()
    agrees(taken(watcher, layer.weight), expected(layer.weight, torch.cat([a, a, b])[None]))


def test_a_frozen_weight_is_not_summed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    watcher = watch(model)
    model[1].weight.requires_grad_(False)
    model(torch.randn(5, 4)).sum().backward()
    assert told(watcher, model[1].weight) is None
    assert told(watcher, model[0].weight) is not None


@pytest.mark.parametrize("n", [2, 60])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_autocast(kind: str, n: int) -> None:
    layer = nn.Linear(8, 6) if kind == "linear" else nn.Conv1d(8, 6, 3)
    watcher = watch(layer)
    x = torch.randn(n, 8) if kind == "linear" else torch.randn(n, 8, 9)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    (y.float().square().mean() * 2.0**16).backward()  # and a loss that is scaled
    got = taken(watcher, layer.weight)
    want = expected(layer.weight, patches(layer, x))
    assert got.wxx is not None
    assert got.wxx.dtype is torch.float32
    torch.testing.assert_close(got.mean_square, want["mean_square"], rtol=1e-5, atol=0)
    error = (got.wxx - want["wxx"]).norm() / want["wxx"].norm()
    assert error < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_models_sum_in_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(8, 6).to(dtype)
    watcher = watch(layer)
    x = 8 + torch.rand(3000, 8).to(dtype)  # float16 can't hold the sum
    layer(x).float().mean().backward()
    got, want = taken(watcher, layer.weight), expected(layer.weight.double(), x.double()[None])
    assert got.wxx is not None
    assert got.wxx.dtype is torch.float32
    torch.testing.assert_close(got.mean_square, want["mean_square"].float(), rtol=1e-4, atol=0)
    assert (got.wxx - want["wxx"]).norm() < 0.02 * want["wxx"].norm()


def test_layers_that_follow_may_work_in_place() -> None:
    for inputs in (torch.randn(3, 8), torch.randn(50, 8)):
        model = Block(8).double()
        watcher = watch(model)
        inputs = inputs.double()
        model(inputs).sum().backward()
        hidden = model.up(inputs).relu()
        agrees(taken(watcher, model.up.weight), expected(model.up.weight, inputs[None]))
        agrees(taken(watcher, model.down.weight), expected(model.down.weight, hidden[None]))


def test_inputs_by_keyword_and_other_hooks() -> None:
    layer = nn.Linear(4, 3).double()
    layer.register_forward_hook(lambda module, args, y: 2 * y)
    watcher = watch(layer)
    x = torch.randn(20, 4, dtype=torch.float64)
    layer(input=x).sum().backward()
    agrees(taken(watcher, layer.weight), expected(layer.weight, x[None]))


def test_empty_batches_are_nothing() -> None:
    layer = nn.Linear(4, 3)
    watcher = watch(layer)
    layer(torch.randn(0, 4)).sum().backward()
    assert told(watcher, layer.weight) is None
