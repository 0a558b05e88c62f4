"""Layers under what PyTorch does to modules: short floats, autocast, compilation, copies, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from nestopt.core.tree import leaves
from nestopt.levels import titans
from nestopt.nn import SequenceMemory, detach, to
from tests.nn.tools import F64, LEVELS, REGISTERED, in_steps, level_of, make, same

QUICK = [
    "attention",
    "deltanet",
    "gated_deltanet",
    "gated_linear",
    "oja",
    "omega",
    "retnet",
    "titans",
    "titans in chunks",
    "self_modifying in chunks",
]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", REGISTERED)
def test_new_states_are_float32_at_least(name: str) -> None:
    module = SequenceMemory(level_of(name), 8, 2)
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (F64, F64)):
        state = module.to(dtype).init_state(2)
        assert {leaf.dtype for _, leaf in leaves(state) if leaf.is_floating_point()} == {want}


@pytest.mark.parametrize("name", QUICK)
def test_bfloat16_is_near_float64_and_keeps_its_memory_in_float32(name: str) -> None:
    torch.manual_seed(1)
    module = SequenceMemory(level_of(name), 16, 2).bfloat16()
    x = torch.randn(2, 40, 16, dtype=torch.bfloat16, requires_grad=True)
    y, state = module(x)
    true, _ = copy.deepcopy(module).double()(x.double())
    assert y.dtype == torch.bfloat16
    assert far(y, true) < 0.1
    kept = {path: leaf.dtype for path, leaf in leaves(state) if "keys" not in path and "values" not in path}
    assert set(kept.values()) <= {torch.float32, torch.int64, torch.bool}
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in (x, *module.parameters()))
    again, _ = module(x[:, :1], state)
    short, _ = module(x[:, :1], to(state, dtype=torch.bfloat16))
    assert far(short, again) < 0.1


@pytest.mark.parametrize("name", QUICK)
def test_autocast_is_near_float32_and_keeps_states_and_gradients_so(name: str) -> None:
    torch.manual_seed(1)
    module = SequenceMemory(level_of(name), 16, 2, gate_output=True)
    x = torch.randn(2, 20, 16)
    true, _ = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, state = module(x)
        stepped, _ = in_steps(module, x)
        masked, _ = module(x, mask=torch.ones(2, 20, dtype=torch.bool))
    assert y.dtype == torch.bfloat16
    assert far(y, true) < 0.1
    assert far(stepped, y) < 0.05
    assert far(masked, y) < 0.05
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters())
    module(x, state)  # what was begun in autocast goes on without


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize("name", ["titans", "deltanet", "gated_linear", "self_modifying"])
def test_one_graph_holds_all_of_it(name: str) -> None:
    torch._dynamo.reset()
    module = make(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    x = torch.randn(2, 18, 8, dtype=F64, requires_grad=True)
    mask = torch.arange(18) >= torch.tensor([[0], [7]])
    inputs = [x, *module.parameters()]
    y, state = module(x)
    fast, fast_state = compiled(x)
    same(fast, y)
    same(
        torch.autograd.grad(fast.sin().sum(), inputs, retain_graph=True),
        torch.autograd.grad(y.sin().sum(), inputs, retain_graph=True),
        1e-9,
    )
    if name == "deltanet":
        same(compiled(x, detach(fast_state))[0], module(x, state)[0])
        same(compiled(x, mask=mask)[0], module(x, mask=mask)[0])


@pytest.mark.parametrize("name", LEVELS)
def test_copies_and_saved_parameters_are_the_same_layer(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 5, 8, dtype=F64)
    y, state = module(x)
    in_steps(module, x)  # what a step keeps must not hinder a copy
    same(copy.deepcopy(module)(x)[0], y, 0)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other = SequenceMemory(level_of(name), 8, 2).double()
    other.load_state_dict(torch.load(file, weights_only=True))
    same(other(x, state)[0], module(x, state)[0], 0)


def test_a_layer_can_be_pickled() -> None:
    module = make("titans in chunks")
    x = torch.randn(2, 5, 8, dtype=F64)
    in_steps(module, x)
    same(pickle.loads(pickle.dumps(module))(x)[0], module(x)[0], 0)


@pytest.mark.parametrize("name", ["titans", "gated_deltanet", "attention", "self_modifying in chunks"])
def test_recomputed_layers_give_the_same_gradients(name: str) -> None:
    module = make(name)
    x = torch.randn(2, 9, 8, dtype=F64, requires_grad=True)
    _, state = module(torch.randn(2, 3, 8, dtype=F64))
    inputs = [x, *module.parameters()]
    true = torch.autograd.grad(module(x, state)[0].sin().sum(), inputs, retain_graph=True)
    y, _ = checkpoint(module, x, state, use_reentrant=False)
    same(torch.autograd.grad(y.sin().sum(), inputs), true)


@pytest.mark.parametrize("name", ["titans in chunks", "gated_deltanet", "attention", "self_modifying in chunks"])
def test_gradcheck(name: str) -> None:
    module = make(name, dim=4, heads=2)
    x = torch.randn(2, 6, 4, dtype=F64, requires_grad=True)
    mask = torch.tensor([[False, True, True, True, True, True], [True, True, False, True, True, False]])
    assert torch.autograd.gradcheck(lambda x: module(x, mask=mask)[0], x)


def test_no_grad_and_inference_mode_step_in_turn() -> None:
    module = SequenceMemory(titans(chunk=4, read="chunk"), 8, 2)
    x = torch.randn(2, 6, 8)
    with torch.inference_mode():
        stepped, _ = in_steps(module, x)
    again, _ = in_steps(module, x)
    again.sum().backward()
    torch.testing.assert_close(stepped, again.detach())
