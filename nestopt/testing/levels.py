"""Whether a level keeps the contract that the library relies on."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.config import ConfigError, build, to_spec
from nestopt.core.clock import advance, advance_, start
from nestopt.core.contract import ContractError, begun, stepped
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, tree_map
from nestopt.nn import layer as make_layer
from nestopt.optim import Nested

STEPS = 6
LR = 0.1


def check_level(level: Level, shape: Sequence[int] = (5, 3)) -> None:
    """Assert that `level` does in every role what the library relies on.

    On gradients, in float64, float32 and bfloat16: `step` is a pure function (it changes none of its arguments, and the
    same arguments give the same result), keeps the gradient's shape and dtype and the state's keys, stays finite on
    zeros, does the same for a stack of tensors as for each of them, and on a clock sees sums; `step_` does the same in
    place, and a level that calls itself `elementwise` does the same on pieces. As an optimizer: a run that is saved and
    loaded goes on bit for bit. As a spec: writing and reading it gives an equal level. On tokens: `check_layer`.

    Args:
        level: to check. It is not changed.
        shape: of the parameters it is tried on; a level of matrices needs two dimensions.

    Raises:
        AssertionError: it does not, in words.
    """
    before, generator = copy.deepcopy(level), torch.Generator().manual_seed(0)
    grads = [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        _check_purity(bind(level), [grad.to(dtype) for grad in grads])
    _check_stacks(bind(level), grads)
    _check_in_place(bind(level), grads)
    _check_elementwise(bind(level), grads)
    if not level.of_weights:  # which take no gradients of their own
        _check_clock(bind(level), grads)
    _check_optimizer(level, grads)
    _check_spec(level)
    if not level.of_weights and level.needs.isdisjoint(("inputs", "param")):
        check_layer(level)
    assert level == before, f"{level.label}: running it changed its own fields"


def check_layer(level: Level, dim: int = 8, heads: int = 2) -> None:
    """Assert that `level` as a layer is causal, streams as it runs in parallel, and keeps sequences apart.

    Raises:
        AssertionError: it does not, in words.
    """
    torch.manual_seed(0)
    layer = make_layer(level, dim, heads).double()
    x = torch.randn(2, 7, dim, dtype=torch.float64)
    y, _ = layer(x)
    assert y.shape == x.shape, f"{level.label}: y has the shape {list(y.shape)}, x {list(x.shape)}"
    assert y.isfinite().all(), f"{level.label}: y is not finite"
    first, state = layer(x[:, :3])
    second, _ = layer(x[:, 3:], state)
    _same(torch.cat([first, second], 1), y, f"{level.label}: two halves of a sequence differ from the whole")
    changed = x.clone()
    changed[0, 4] += 1
    other, _ = layer(changed)
    _same(other[0, :4], y[0, :4], f"{level.label}: a token changes what was read before it")
    _same(other[1], y[1], f"{level.label}: a sequence changes another of its batch")


def _check_purity(level: Level, grads: list[Tensor]) -> None:
    param = torch.zeros_like(grads[0])
    try:
        state = begun(level, param)
        for t, grad in enumerate([*grads, torch.zeros_like(param)], start=1):
            signal = Signal(t, param, LR)
            direction, new = stepped(level, grad, state, signal)
            again, _ = stepped(level, grad, state, signal)
            for have, want in ((list(direction.shape), list(grad.shape)), (direction.dtype, grad.dtype)):
                assert have == want, f"{level.label}: the direction is {have}, not {want} as the gradient"
            assert direction.isfinite().all(), f"{level.label}: the direction is not finite (step {t}, {grad.dtype})"
            assert torch.equal(direction, again), (
                f"{level.label}: the same step twice gives two results; keep all state in `state`"
            )
            state = new
    except ContractError as error:
        raise AssertionError(f"{error} (with gradients in {param.dtype})") from None


def _check_stacks(level: Level, grads: list[Tensor]) -> None:
    pairs = list(zip(grads[::2], grads[1::2], strict=True))
    torch.manual_seed(0)
    alone = [_run(level, [pair[i] for pair in pairs], start(level, pairs[0][i])) for i in range(2)]
    torch.manual_seed(0)
    states = [start(level, pairs[0][i]) for i in range(2)]
    state = tree_map(lambda *each: torch.stack(each), *states)
    stacked = [torch.stack(pair) for pair in pairs]
    if level.is_batched:
        together = _run(level, stacked, state)
    else:
        try:
            together = _run(level, stacked, state, batched=True)
        except RuntimeError:
            return  # decides by values, which vmap can't: the optimizer will run it tensor by tensor
    for i in range(2):
        _same(together[:, i], alone[i], f"{level.label}: a stack of tensors gives other directions than each alone")


def _run(level: Level, grads: list[Tensor], state: State, batched: bool = False) -> Tensor:
    out = []
    for t, grad in enumerate(grads, start=1):

        def step(g: Tensor, s: State, t: int = t) -> tuple[Tensor, State]:
            return advance(level, g, s, Signal(t, torch.zeros_like(g), LR))

        direction, state = vmap(step)(grad, state) if batched else step(grad, state)
        out.append(direction)
    return torch.stack(out)


def _check_in_place(level: Level, grads: list[Tensor]) -> None:
    name, param = level.label, torch.zeros_like(grads[0])
    torch.manual_seed(0)
    state = start(level, param)
    own = tree_map(torch.clone, state)
    for t, grad in enumerate(grads, start=1):
        shown = grad.clone()
        direction, state = advance(level, grad, state, Signal(t, param, LR))
        _same(advance_(level, shown, own, Signal(t, param, LR)), direction, f"{name}: step_ gives another direction")
        assert torch.equal(shown, grad), f"{name}: step_ changes the gradient"
        for path, leaf in leaves(state):
            _same(dict(leaves(own))[path], leaf, f"{name}: step_ leaves another {path!r} in the state")


def _check_elementwise(level: Level, grads: list[Tensor]) -> None:
    if not level.is_elementwise:
        return
    whole = _run(level, grads, start(level, grads[0]))
    cut = [grad.flatten().split(4) for grad in grads]
    pieces = [_run(level, [grad[i] for grad in cut], start(level, cut[0][i])) for i in range(len(cut[0]))]
    joined = torch.cat(pieces, dim=1).reshape(whole.shape)
    _same(joined, whole, f"{level.label}: says it is elementwise, and pieces of a tensor give other directions")


def _check_clock(level: Level, grads: list[Tensor]) -> None:
    if level.period > 1 or "inputs" in level.needs:  # a clock sums gradients, not inputs
        return
    slow = dataclasses.replace(level, period=2)
    torch.manual_seed(0)
    got = _run(slow, grads, start(slow, grads[0]))
    torch.manual_seed(0)
    want = _run(level, [a + b for a, b in zip(grads[::2], grads[1::2], strict=True)], start(level, grads[0]))
    _same(got[1::2], want, f"{level.label}: with period=2 it does not see the sums of two gradients")


def _check_optimizer(level: Level, grads: list[Tensor]) -> None:
    def make() -> Any:
        param = torch.nn.Parameter(torch.ones_like(grads[0]))
        return param, Nested([param], copy.deepcopy(level), lr=LR)

    def steps(param: Tensor, optimizer: Nested, some: list[Tensor]) -> None:
        for grad in some:
            param.grad = grad.clone()
            optimizer.step()

    param, optimizer = make()
    steps(param, optimizer, grads[:3])
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other, loaded = make()
    with torch.no_grad():
        other.copy_(param)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    steps(param, optimizer, grads[3:])
    steps(other, loaded, grads[3:])
    assert torch.equal(param, other), f"{level.label}: a run that was saved and loaded goes on otherwise"


def _check_spec(level: Level) -> None:
    try:
        spec = to_spec(level)
    except ConfigError:
        return  # not registered, which is allowed
    assert build("level", spec) == level, f"{level.label}: written as {spec} and read back, it is another level"


def _same(got: Tensor, want: Tensor, words: str) -> None:
    error = (got - want).abs().max() if got.numel() else torch.zeros(())
    assert got.shape == want.shape, words
    assert bool(error <= 1e-8 * (1 + want.abs().max())), f"{words} (by {float(error):.2g})"
