"""`SequenceMemory` of `self_modifying`: what is learned, and what is state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestopt
from nestopt.core import Gate
from nestopt.core.memories import Mlp
from nestopt.core.part import FieldError
from nestopt.core.tree import leaves, tree_map
from nestopt.levels import self_modifying
from nestopt.nn import SequenceMemory, cat, detach
from tests.levels.self_modifying.self_twin import twin
from tests.nn.tools import F64, in_steps, same, same_states

ALL = ("k", "v", "q", "eta", "alpha")


def layer(heads: int = 2, dim: int = 8, conv: int = 4, **fields: Any) -> SequenceMemory:
    """A float64 layer away from where it starts."""
    level = self_modifying(**({"chunk": 2, "projection_chunk": 4} | fields))
    module = SequenceMemory(level, dim, heads, conv=conv).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize(
    ("chunk", "projection_chunk", "adaptive", "momentum"),
    [
        (2, 4, ALL, 0.5),
        (2, 4, ("k", "v", "eta", "alpha"), None),
        (4, 2, ("k", "v", "eta", "alpha"), 0.5),
        (4, 2, ("alpha",), None),
        (1, 1, ALL, None),
        (4, 4, (), 0.5),
    ],
)
def test_is_the_token_loop_between_its_projections(
    chunk: int, projection_chunk: int, adaptive: tuple[str, ...], momentum: float | None
) -> None:
    module = layer(conv=0, chunk=chunk, projection_chunk=projection_chunk, adaptive=adaptive, momentum=momentum)
    x = torch.randn(2, 9, 8, dtype=F64, requires_grad=True)
    y, state = module(x)
    q, k, v = (part(x).unflatten(-1, (2, -1)) for part in (module.query, module.key, module.value))
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    start = dict(module.start)
    starts = {name: [start[f"{name}-W{i}"].expand(2, -1, -1, -1) for i in (1, 2)] for name in ("memory", *adaptive)}
    readout = {name: (start[f"readout-{name}-w"], start[f"readout-{name}-b"]) for name in ("eta", "alpha")}
    theta = None if momentum is None else torch.full((2, 9, 2), momentum, dtype=F64)
    how = {"chunk": chunk, "projection_chunk": projection_chunk, "momentum": theta}
    answers, ends, _ = twin(q, k, v, starts=starts, readout=readout, **how)
    assert module.norm is not None
    true = module.out(module.norm(answers).flatten(-2))
    same(y, true)
    kept = state["memory"]["level"]
    for name, weights in ends.items():
        box = kept["memory"] if name == "memory" else kept["projections"][name]
        same(list(box["weights"].values()), weights)
    given = [x, *module.parameters()]
    mine, slow = (torch.autograd.grad(z.sin().sum(), given, retain_graph=True) for z in (y, true))
    same(mine, slow, 1e-9)


@pytest.mark.parametrize("level", [self_modifying(), self_modifying(Mlp(depth=3), ALL, momentum=Gate(0.5), chunk=64)])
def test_every_parameter_learns(level: nestopt.Level) -> None:
    """From the first step on, given enough tokens for what was written to be read."""
    module = SequenceMemory(level, 16, 2)
    y, _ = module(torch.randn(2, 200, 16))
    y.square().mean().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name != "gates.weight":
            assert (parameter.grad.flatten(1) != 0).any(1).all() if parameter.ndim > 1 else parameter.grad.any(), name


def test_only_momentum_is_a_gate() -> None:
    assert layer().gates is None
    assert list(layer(momentum=Gate(0.5)).level_gates.learned) == ["momentum"]


@pytest.mark.parametrize("learn", [True, False])
def test_the_gates_parameters_are_the_present_ones_whatever_the_state(learn: bool) -> None:
    module = layer()
    x = torch.randn(2, 11, 8, dtype=F64)
    _, state = module(x)
    names = [f"start.readout-{name}-{part}" for name in ("eta", "alpha") for part in "wb"]
    parameters = dict(module.named_parameters())
    y, after = module(x, detach(state), learn=learn)
    if learn:
        for name in names:
            (gradient,) = torch.autograd.grad(y.square().sum(), parameters[name], retain_graph=True)
            assert gradient.abs().sum() > 0, name
    elsewhere = detach(state)
    elsewhere["memory"]["level"]["readout"] = tree_map(lambda w: w + 1, elsewhere["memory"]["level"]["readout"])
    other, end = module(x, elsewhere, learn=learn)
    assert torch.equal(other, y)
    same_states(end, after, 0)


def test_pending_tokens_keep_the_gates_that_they_were_given() -> None:
    """What was made of a token is kept: parameters that change since do not make it again."""
    module = layer(conv=0)
    x = torch.randn(2, 3, 8, dtype=F64)
    with torch.no_grad():
        _, state = module(x)
        before = tree_map(torch.clone, state["memory"]["level"]["projections"]["pending"])
        for parameter in module.parameters():
            parameter.add_(1.0)
        _, state = module(x.new_zeros(2, 1, 8), state, learn=False)
    after = state["memory"]["level"]["projections"]["pending"]
    same_states(after, before, 0)
    assert after["lr"].shape == (2, 2, 3)


@pytest.mark.parametrize(("chunk", "projection_chunk"), [(4, 4), (2, 4), (8, 4)])
@pytest.mark.parametrize("sizes", [(5, 6), (3, 8), (1, 4), (2, 5), (4, 9)])
def test_sequences_at_other_places_of_a_chunk_go_on_together(
    sizes: tuple[int, int], chunk: int, projection_chunk: int
) -> None:
    module = layer(chunk=chunk, projection_chunk=projection_chunk, conv=0)
    states = [module(torch.randn(1, size, 8, dtype=F64))[1] for size in sizes]
    x = torch.randn(2, 9, 8, dtype=F64)
    y, end = module(x, cat(states))
    assert end["memory"]["step"][:, 0].tolist() == [size + 9 for size in sizes]
    for i in range(2):
        same(y[i], module(x[i : i + 1], states[i])[0][0])


def test_begun_anew_within_a_chunk() -> None:
    module = layer(conv=0, chunk=2, projection_chunk=8)
    x = torch.randn(2, 7, 8, dtype=F64)
    _, state = module(x[:, :4])  # at the end of a chunk of the memory, and within one of the others
    state = module.reset(state, [0])
    y, _ = module(x[:, 4:], state)
    fresh, _ = module(x[:1, 4:])
    same(y[:1], fresh)
    plain, _ = module(x)
    same(y[1:], plain[1:, 4:])


def test_steps_are_the_whole_and_their_state_is_as_large() -> None:
    module = layer(momentum=Gate(0.5))
    x = torch.randn(2, 19, 8, dtype=F64)
    y, state = module(x)
    stepped, end = in_steps(module, x)
    same(stepped, y)
    same_states(end, state)


@pytest.mark.parametrize("checkpoint", [1, 2])
def test_recomputing_gives_the_same_gradients(checkpoint: int) -> None:
    module = layer(chunk=8, projection_chunk=16)
    x = torch.randn(2, 150, 8, dtype=F64)
    kept = torch.autograd.grad(module(x)[0].sin().sum(), list(module.parameters()))
    module.checkpoint = checkpoint
    same(torch.autograd.grad(module(x)[0].sin().sum(), list(module.parameters())), kept, 1e-9)


def test_the_norm_that_is_shown_is_of_the_memories_alone() -> None:
    module = layer(momentum=0.5)
    x = torch.randn(2, 11, 8, dtype=F64)
    _, state = module(x[:, :6])
    _, _, stats = module(x[:, 6:], state, return_stats=True)
    boxes = {path: leaf for path, leaf in leaves(state["memory"]["level"]) if "W" in path}
    assert len(boxes) == 2 * 2 * 5
    total = torch.stack([leaf.square().sum((-2, -1)) for leaf in boxes.values()]).sum(0).sqrt()
    same(stats["memory_norm"][..., 0], total)
    assert stats["memory_norm"].shape[-1] == 2  # 2 tokens to the end of the chunk of 4, then 3


def test_lower_precision() -> None:
    torch.manual_seed(1)
    module = SequenceMemory(self_modifying(chunk=4, projection_chunk=8), 16, 2)
    x = torch.randn(2, 40, 16)
    true = module.double()(x.double())[0]
    low, state = module.bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    kept = {leaf.dtype for _, leaf in leaves(state["memory"]) if leaf.is_floating_point()}
    assert kept == {torch.float32}
    error: Tensor = (low.double() - true).norm() / true.norm()
    assert error < 0.1


def test_a_clock_is_not_for_tokens() -> None:
    with pytest.raises(FieldError, match="period=2 is not allowed on tokens, where chunk and projection_chunk are"):
        SequenceMemory(self_modifying(period=2), 8, 2)
