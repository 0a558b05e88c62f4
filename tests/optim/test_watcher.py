"""When a use of a layer counts, and what a watcher keeps alive: checkpointing, copies, compilers."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from nestopt.core.compose import chain, parallel
from nestopt.core.inputs import InputRequest, LayerInputs, request_of
from nestopt.core.level import Level
from nestopt.core.part import FieldError
from nestopt.levels import momentum
from nestopt.levels.gradient.dgd import Dgd, Ggd
from nestopt.optim import Nested
from nestopt.optim.layer_inputs.watcher import Watcher
from tests.optim.watched import Block, Cubic, Letter, agrees, expected, taken, told, watch


@pytest.mark.parametrize("level", [Letter(), Letter(solver="exact"), Ggd(Cubic())], ids=lambda level: level.label)
@pytest.mark.parametrize("n", [2, 40], ids=["few", "many"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_counts_once(reentrant: bool, n: int, level: Level) -> None:
    torch.manual_seed(0)
    blocks = nn.ModuleList([Block(8), Block(8)]).double()
    watcher = watch(blocks, level)
    batches = [torch.randn(n, 8, dtype=torch.float64) for _ in range(2)]

    def run(again: bool) -> list[LayerInputs]:
        for x in batches:
            x = x.clone().requires_grad_()
            for block in blocks:
                x = checkpoint(block, x, use_reentrant=reentrant) if again else block(x)
            x.square().mean().backward()
        return [taken(watcher, p) for p in blocks.parameters() if p.ndim > 1]

    for plain, recomputed in zip(run(False), run(True), strict=True):
        for key in ("wxx", "mean_square", "gram", "rows", "grad"):
            a, b = getattr(plain, key), getattr(recomputed, key)
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12)
    h = batches[0]
    loss = blocks[1](blocks[0](h)).square().mean()
    loss.backward()  # and its own numbers are those of the equation
    if isinstance(level, Dgd):
        agrees(taken(watcher, blocks[0].up.weight), expected(blocks[0].up.weight, h[None]))


def test_recomputation_does_no_product_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from nestopt.optim.layer_inputs.rows import LinearRows

    calls, product = [], LinearRows.product

    def counted(self: LinearRows, e: Tensor, scale: float = 1.0) -> Tensor:
        calls.append(e.shape)
        return product(self, e, scale)

    monkeypatch.setattr(LinearRows, "product", counted)
    layer = nn.Linear(4, 3)
    watcher = watch(layer)
    checkpoint(layer, torch.randn(40, 4, requires_grad=True), use_reentrant=False).sum().backward()
    assert told(watcher, layer.weight) is not None
    assert len(calls) == 1


@pytest.mark.parametrize("n", [2, 40], ids=["few", "many"])
@pytest.mark.parametrize("level", [Letter(), Ggd(Cubic())], ids=lambda level: level.label)
def test_checkpoints_within_checkpoints_count_once(level: Level, n: int) -> None:
    layer = nn.Linear(4, 4).double()
    watcher = watch(layer, level)
    x = torch.randn(n, 4, dtype=torch.float64, requires_grad=True)

    def outer(x: Tensor) -> Tensor:
        return checkpoint(lambda x: layer(x).tanh(), x, use_reentrant=False).tanh()

    checkpoint(outer, x, use_reentrant=False).sum().backward()
    assert watcher._known[layer.weight].sums.n == n


@pytest.mark.parametrize("outside", [True, False])
def test_an_inner_gradient_within_checkpointing_counts_only_with_the_weight_s_own(outside: bool) -> None:
    layer = nn.Linear(4, 4).double()
    watcher = watch(layer)
    x = torch.randn(30, 4, dtype=torch.float64, requires_grad=True)

    def inner(x: Tensor) -> Tensor:
        y = layer(x)
        (g,) = torch.autograd.grad(y.square().sum(), x, retain_graph=True)
        return (y if outside else x) * g

    checkpoint(inner, x, use_reentrant=False).sum().backward()
    assert watcher._known[layer.weight].sums.n == (30 if outside else 0)


# -- what is kept alive ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [Letter(), Letter(solver="exact"), Ggd(Cubic())], ids=lambda level: level.label)
@pytest.mark.parametrize("n", [2, 40])
def test_activations_are_released(n: int, level: Level) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    watcher = watch(model, level)
    seen: list[weakref.ref[Tensor]] = []
    model[2].register_forward_pre_hook(lambda module, args: seen.append(weakref.ref(args[0])))
    gc.disable()
    try:
        loss = model(torch.randn(n, 8)).sum()
        loss.backward()
        assert seen[0]() is None, "an activation outlives the backward pass"
    finally:
        gc.enable()
    assert loss.grad_fn is not None
    assert told(watcher, model[2].weight) is not None


def test_many_rows_are_not_held_by_a_checkpointed_graph() -> None:
    layer = nn.Linear(8, 8)
    watcher = watch(layer)
    seen: list[weakref.ref[Tensor]] = []

    def run(x: Tensor) -> Tensor:
        h = torch.tanh(x)
        seen.append(weakref.ref(h))
        return layer(h)

    for n in (40, 2):
        loss = checkpoint(run, torch.randn(n, 8, requires_grad=True), use_reentrant=False).sum()
        assert seen[-1]() is None
        loss.backward()
    assert told(watcher, layer.weight) is not None


def test_a_copied_or_pickled_model_is_not_watched() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    watcher = watch(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = [
        copy.deepcopy(model),
        copy.copy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(file, weights_only=False),
    ]
    for other in (copies[0], *copies[2:]):
        other(torch.randn(5, 4)).sum().backward()
        assert told(watcher, model[0].weight) is None
    copies[1](torch.randn(5, 4)).sum().backward()  # a shallow copy has the same weights
    assert told(watcher, model[0].weight) is not None


def test_a_copied_watcher_watches_nothing() -> None:
    model = nn.Linear(4, 3)
    watcher = watch(model)
    for other in (copy.deepcopy(watcher), pickle.loads(pickle.dumps(watcher))):
        model(torch.randn(5, 4)).sum().backward()
        assert told(other, model.weight) is None
        assert other.name(model.weight) is None
    assert len(model._forward_hooks) == 1


@pytest.mark.parametrize("how", ["remove", "drop"])
def test_hooks_go_with_the_watcher(how: str) -> None:
    model = nn.Linear(4, 3)
    watcher: Watcher | None = watch(model)
    gone = weakref.ref(watcher)
    assert len(model._forward_hooks) == 1
    gc.disable()
    try:
        if how == "remove":
            watcher.remove()  # type: ignore[union-attr]
        watcher = None
        assert gone() is None, "a cycle keeps it alive"
    finally:
        gc.enable()
    assert not model._forward_hooks
    model(torch.randn(5, 4)).sum().backward()


def test_a_watcher_does_not_keep_its_model() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    watcher = watch(model)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    watcher.remove()


# -- what can't be seen ------------------------------------------------------------------------------------------------


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.used, self.idle = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.own, self.matrix = Own(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.own(self.used(self.table(ids)) @ self.matrix)


def test_unseen_parameters_are_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model, stray = Odd(), nn.Parameter(torch.randn(2, 2))
    stray.grad = torch.zeros(2, 2)
    optimizer = Nested([stray, *(p for p in model.parameters() if p.ndim > 1)], Letter())
    optimizer.watch(model)
    for _ in range(2):
        model(torch.tensor([0, 1, 2])).sum().backward()
        optimizer.step()
    (said,) = (record.getMessage() for record in caplog.records)
    unseen = "a parameter of shape [2, 2] that is not the model's, matrix, table.weight, own.weight"
    assert f"dgd has not seen the inputs of {unseen}: " in said  # nor of `idle`, which has no gradient


def test_request_of_a_stack() -> None:
    assert request_of(momentum()) is None
    assert request_of(Dgd(delta=0.0)) is None
    assert request_of(Dgd()) == InputRequest(wxx=False, gram=True)
    assert request_of(chain(momentum(), Letter(solver="exact"))) == InputRequest(gram=True)
    assert request_of(parallel(Letter(), Letter(solver="exact"), Ggd())) == InputRequest(gram=True)
    with pytest.raises(ValueError, match="normalize_inputs"):
        request_of(parallel(Letter(), Letter(normalize_inputs=True)))
    with pytest.raises(FieldError, match=r"chain: period=4 is not allowed around dgd.*parameter group"):
        request_of(chain(momentum(), Letter(), period=4))


def test_float16_needs_to_know_the_scale() -> None:
    layer = nn.Linear(4, 3).half()
    x = torch.randn(5, 4).half()
    watcher = watch(layer, Ggd(Cubic()))
    with pytest.raises(RuntimeError, match=r"'weight' runs in float16.*loss_scale"):
        layer(x)
    watcher.remove()
    for level, scale in [(Ggd(Cubic()), 1.0), (Ggd(Cubic(), value="sign"), None), (Letter(), None)]:
        watcher = watch(layer, level, loss_scale=scale)
        layer(x).sum().backward()
        assert told(watcher, layer.weight) is not None
        watcher.remove()


# -- compiled ----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, as it loads its compiler
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # and as it runs it
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("level", [Letter(), Ggd(Cubic())], ids=lambda level: level.label)
def test_compiled_models_give_the_same_sums(level: Level, backend: str) -> None:
    torch._dynamo.reset()
    model = nn.Sequential(Block(8), Block(8)).double()
    watcher = watch(model, level)
    compiled = torch.compile(model, backend=backend)
    for n in (2, 40, 40):
        x = torch.randn(n, 8, dtype=torch.float64)
        found = []
        for run in (model, compiled):
            for _ in range(2):
                run(x).square().mean().backward()
            found.append([taken(watcher, p) for p in model.parameters() if p.ndim > 1])
        for eager, quick in zip(*found, strict=True):
            for key in ("wxx", "mean_square", "grad"):
                torch.testing.assert_close(getattr(quick, key), getattr(eager, key), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        compiled(x)
    assert told(watcher, next(iter(model.parameters()))) is None
