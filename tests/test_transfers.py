"""The four ways in which knowledge crosses levels (NL sec. 3.3): what each means, and the guide's examples of them."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core import Signal
from nestopt.core.tree import leaves, replaced
from nestopt.levels import gd, momentum

GUIDE = Path(__file__).parents[1] / "docs" / "composing.md"


def test_the_guides_examples_print_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    section = GUIDE.read_text(encoding="utf-8").split("## Where knowledge crosses levels")[1].split("\n## ")[0]
    assert re.findall(r"^\*\*(\w+)\.\*\*", section, re.MULTILINE) == ["Condition", "Backprop", "Init", "Generate"]
    blocks = re.findall(r"^```\{(testcode|testoutput)\}\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    assert [kind for kind, _ in blocks] == ["testcode", "testoutput"] * 4
    names = {"__name__": "example"}
    for (_, code), (_, wanted) in zip(blocks[::2], blocks[1::2], strict=True):
        capsys.readouterr()
        exec(compile(code, "composing.md", "exec"), names)
        assert doctest.OutputChecker().check_output(wanted, capsys.readouterr().out, 0)


def test_condition_what_one_has_read_changes_what_another_answers_and_nothing_comes_back() -> None:
    slow, fast = (nestopt.layer(name, dim=16, heads=2) for name in ("titans", "deltanet"))
    question, answers = torch.randn(1, 4, 16), []
    for seed in (0, 1):
        _, memory = slow(torch.randn(1, 32, 16, generator=torch.Generator().manual_seed(seed)))
        kept = {path: leaf.clone() for path, leaf in leaves(memory)}
        seen, after = slow(question, memory, learn=False)
        y, _ = fast(question + seen.detach())
        answers.append(y.detach())
        y.square().sum().backward()
        assert all(torch.equal(leaf, kept[path]) for path, leaf in leaves(memory))  # asked, not written
        assert all(torch.equal(leaf, kept[path]) for path, leaf in leaves(after["memory"]) if path in kept)
    assert not torch.allclose(*answers, atol=1e-3)
    assert all(p.grad is None for p in slow.parameters())
    assert any(p.grad is not None and p.grad.any() for p in fast.parameters())


def norm(x: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps).sqrt()


def test_backprop_one_gradient_and_two_clocks() -> None:
    """Against the same two blocks in plain torch: the slow one moves once, by the sum of four gradients."""
    layer, lr = nestopt.layer({"level": "cms", "periods": [1, 4]}, dim=6).double(), 0.05
    optimizer = nestopt.optimizer(layer, "gd", lr=lr)
    weights = {name: p.detach().clone() for name, p in layer.named_parameters()}
    total = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(1, 5):
        x = torch.randn(2, 5, 6, dtype=torch.float64)
        optimizer.zero_grad()
        layer(x)[0].square().sum().backward()
        optimizer.step()
        now = {name: w.clone().requires_grad_() for name, w in weights.items()}
        y = x
        for block in [name for name, _ in layer.levels.named_children()]:
            w1, w2 = now[f"levels.{block}.W1"], now[f"levels.{block}.W2"]
            y = y + torch.nn.functional.silu(norm(y) @ w2.mT) @ w1.mT
        for name, grad in zip(now, torch.autograd.grad(y.square().sum(), list(now.values())), strict=True):
            total[name] += grad
            if "every_1" in name:
                weights[name] = weights[name] - lr * grad
            elif step == 4:
                weights[name] = weights[name] - lr * total[name]
        for name, p in layer.named_parameters():
            torch.testing.assert_close(p.detach(), weights[name], rtol=1e-9, atol=1e-12, msg=f"{name}, step {step}")


def test_init_a_slow_level_learns_where_a_fast_one_begins() -> None:
    beta, rate, grads = 0.5, 0.25, [torch.randn(3, dtype=torch.float64) for _ in range(6)]
    level = nestopt.nest(momentum(0.8, period=3), momentum(beta), step_size=rate)
    state, start, slow, memory = level.init(grads[0]), torch.zeros(3).double(), torch.zeros(3).double(), None
    memory = start
    for t, grad in enumerate(grads, start=1):
        u, state = level.step(grad, state, Signal(t))
        memory = beta * memory + grad
        torch.testing.assert_close(u, memory)
        if t % 3 == 0:  # the context is over: one step of the slow level, and the fast one is put back
            slow = 0.8 * slow + (start - memory)
            start = memory = start - rate * slow
    torch.testing.assert_close(state["inner"]["momentum"], start)
    assert start.any()


def test_init_by_the_outer_loss_moves_where_new_sequences_begin_and_no_sequence_that_runs() -> None:
    layer = nestopt.layer({"level": "titans", "chunk": 4}, dim=8, heads=2)
    optimizer, x = nestopt.optimizer(layer, "adam", lr=0.1), torch.randn(1, 9, 8)
    y, state = layer(x)
    running = {path: leaf.detach().clone() for path, leaf in leaves(state)}
    y.square().sum().backward()
    slope = layer.start["W2"].grad
    assert slope.any()
    with torch.no_grad():  # and it is the slope of the loss through all that the memory learned from there
        step = 1e-3 * torch.randn_like(slope)
        losses = []
        for sign in (1, -1):
            layer.start["W2"].add_(sign * step)
            losses.append(layer(x)[0].square().sum())
            layer.start["W2"].sub_(sign * step)
    assert float(losses[0] - losses[1]) == pytest.approx(2 * float((slope * step).sum()), rel=0.05)
    before = layer.start["W2"].detach().clone()
    optimizer.step()
    assert not torch.equal(layer.start["W2"], before)
    assert all(torch.equal(leaf.detach(), running[path]) for path, leaf in leaves(state))
    begun = layer.init_state(1)["memory"]["level"]["memory"]["W2"]
    torch.testing.assert_close(begun[0], layer.start["W2"])


def test_generate_what_makes_the_keys_changes_what_the_memory_is_written_with() -> None:
    layer = nestopt.layer({"level": "self_modifying", "chunk": 4, "projection_chunk": 4}, dim=8, heads=2)
    x = torch.randn(1, 8, 8)
    _, state = layer(x[:, :4])
    path = "memory.level.projections.k.weights.W2"
    made = dict(leaves(state))[path]
    other = replaced(state, {path: made + 0.5 * torch.randn_like(made)})
    written = [dict(leaves(layer(x[:, 4:], s)[1]))["memory.level.memory.weights.W1"] for s in (state, other)]
    assert not torch.allclose(*written, atol=1e-5)
    # the memories that generate are written, too: what they make of the same tokens changes as the sequence is read
    start = dict(leaves(layer.init_state(1)))[path]
    assert not torch.allclose(made, start, atol=1e-6)


def test_generate_an_optimizer_makes_the_weights_of_the_network_that_makes_its_context() -> None:
    """The weights after two steps, and so what the optimizer is shown in the second, depend on its own number."""
    beta = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    w, state, x = {"w": torch.tensor([2.0], dtype=torch.float64)}, None, 3.0
    for _ in range(2):
        w, state = nestopt.optim.functional_step(momentum(beta), w, {"w": 2 * x * w["w"]}, state, lr=0.1)
    (slope,) = torch.autograd.grad(w["w"].sum(), beta)
    # w1 = w0 - lr g0; w2 = w1 - lr (β g0 + 2 x w1): only β g0 knows β
    assert float(slope) == pytest.approx(-0.1 * 2 * 3.0 * 2.0)


def test_levels_beside_each_other_know_nothing_of_each_other() -> None:
    """What a transfer is not: in a `parallel`, neither level's state depends on the other."""
    grads = [torch.randn(3) for _ in range(4)]
    both, alone = nestopt.parallel(a=momentum(0.9), b=gd(period=2)), momentum(0.9)
    one, other = both.init(grads[0]), alone.init(grads[0])
    for t, grad in enumerate(grads, start=1):
        _, one = both.step(grad, one, Signal(t))
        _, other = alone.step(grad, other, Signal(t))
    assert torch.equal(one["a"]["momentum"], other["momentum"])
