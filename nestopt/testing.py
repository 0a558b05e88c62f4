"""What authors run in tests of theirs: `check_level(Lion())` for a level, `check_optimizer(Lion)` for an optimizer."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.optim import Optimizer

from nestopt.config import ConfigError, build, to_spec
from nestopt.core.clock import advance, advance_, start
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

    On gradients: `step` is a pure function (it changes none of its arguments, and the same arguments give the same
    result), keeps the gradient's shape and dtype and the state's keys, stays finite on zeros, does the same for a stack
    of tensors as for each of them, and on a clock sees sums; `step_` does the same in place, and a level that calls
    itself `entrywise` does the same on pieces. As an optimizer: a run that is saved and loaded goes on
    bit for bit. As a spec: writing and reading it gives an equal level. On tokens: `check_layer`.

    Args:
        level: to check. It is not changed.
        shape: of the parameters it is tried on; a level of matrices needs two dimensions.

    Raises:
        AssertionError: it does not, in words.
    """
    before, generator = copy.deepcopy(level), torch.Generator().manual_seed(0)
    grads = [torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(STEPS)]
    _check_purity(bind(level), grads)
    _check_stacks(bind(level), grads)
    _check_in_place(bind(level), grads)
    _check_entrywise(bind(level), grads)
    _check_clock(bind(level), grads)
    _check_optimizer(level, grads)
    _check_spec(level)
    if "inputs" not in level.needs:
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
    name, param = level.label, torch.zeros_like(grads[0])
    state = start(level, param)
    assert isinstance(state, dict), f"{name}: init gives {type(state).__name__}, not a dict of tensors"
    for path, leaf in leaves(state):
        assert isinstance(leaf, Tensor), f"{name}: init's {path!r} is {type(leaf).__name__}, not a tensor"
    for t, grad in enumerate([*grads, torch.zeros_like(param)], start=1):
        kept = grad.clone(), tree_map(torch.clone, state), param.clone()
        direction, new = advance(level, grad, state, Signal(t, param, LR))
        again, _ = advance(level, grad, state, Signal(t, param, LR))
        assert torch.equal(grad, kept[0]), f"{name}: step changes the gradient in place"
        assert torch.equal(param, kept[2]), f"{name}: step changes the parameter in place"
        for path, leaf in leaves(kept[1]):
            assert torch.equal(dict(leaves(state))[path], leaf), f"{name}: step changes the state's {path!r} in place"
        assert direction.isfinite().all(), f"{name}: the direction is not finite (step {t})"
        assert torch.equal(direction, again), (
            f"{name}: the same step twice gives two results; keep all state in `state`"
        )
        assert direction.shape == grad.shape, (
            f"{name}: the direction is {list(direction.shape)}, not {list(grad.shape)}"
        )
        assert direction.dtype == grad.dtype, f"{name}: the direction is {direction.dtype}, the gradient {grad.dtype}"
        keys = [path for path, _ in leaves(new)]
        assert sorted(keys) == sorted(path for path, _ in leaves(state)), (
            f"{name}: step changes the state's keys: {keys}"
        )
        state = new


def _check_stacks(level: Level, grads: list[Tensor]) -> None:
    pairs = list(zip(grads[::2], grads[1::2], strict=True))
    torch.manual_seed(0)
    alone = [_run(level, [pair[i] for pair in pairs], start(level, pairs[0][i])) for i in range(2)]
    torch.manual_seed(0)
    states = [start(level, pairs[0][i]) for i in range(2)]
    state = tree_map(lambda *each: torch.stack(each), *states)
    stacked = [torch.stack(pair) for pair in pairs]
    if level.batched:
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


def _check_entrywise(level: Level, grads: list[Tensor]) -> None:
    if not level.is_entrywise:
        return
    whole = _run(level, grads, start(level, grads[0]))
    cut = [grad.flatten().split(4) for grad in grads]
    pieces = [_run(level, [grad[i] for grad in cut], start(level, cut[0][i])) for i in range(len(cut[0]))]
    joined = torch.cat(pieces, dim=1).reshape(whole.shape)
    _same(joined, whole, f"{level.label}: says it is entrywise, and pieces of a tensor give other directions")


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


# -- optimizers --------------------------------------------------------------------------------------------------------

Make = Callable[[list[Tensor]], Optimizer]


def check_optimizer(make: Make, shape: Sequence[int] = (5, 3)) -> None:
    """Assert that an optimizer does what a training loop written for `torch.optim` relies on.

    It goes downhill; it leaves gradients as they are and keeps none; a parameter without a gradient stays as it is, and
    so does its state; groups, those added later too, follow their own `lr` as it is then; closures, hooks and
    parameters that are not contiguous work; a run that is copied, or saved and loaded under `weights_only=True`, goes
    on bit for bit.

    Args:
        make: the class, or what else makes an optimizer of a list of parameters. Its learning rate should be one that
            30 steps on ½‖W‖² go down with, W of unit length.
        shape: of the parameters it is tried on; a level of matrices needs two dimensions.

    Raises:
        AssertionError: it does not, in words.

    >>> from nestopt.optim import AdamW
    >>> check_optimizer(lambda params: AdamW(params, lr=0.01, amsgrad=True))
    """

    def trial(make: Make = make) -> Optimizer:
        torch.manual_seed(0)  # a memory may start at random
        size = math.sqrt(math.prod(shape))
        return make([(torch.randn(*shape) / size).requires_grad_() for _ in range(3)])

    _check_descends(trial())
    _check_gradients_stay(trial())
    _check_missing_gradients(trial())
    _check_groups(trial(), torch.ones(*shape), torch.ones(*shape))
    _check_closure(trial())
    _check_hooks(trial())
    _check_resumes(trial(), trial())
    turned = trial(lambda params: make([param.detach().mT.contiguous().mT.requires_grad_() for param in params]))
    _check_strides(trial(), turned)


def _params(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _weights(optimizer: Optimizer) -> list[Tensor]:
    return [param.detach().clone() for param in _params(optimizer)]


def _memory(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    return [leaf for _, leaf in leaves(optimizer.state.get(param, {})) if isinstance(leaf, Tensor)]


def _feed(optimizer: Optimizer, steps: range) -> None:
    """Step on gradients of about unit length that depend on the step only."""
    for t in steps:
        torch.manual_seed(t)
        for param in _params(optimizer):
            param.grad = torch.randn(param.shape) / math.sqrt(param.numel())
        optimizer.step()


def _equal(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _check_descends(optimizer: Optimizer) -> None:
    name, before = type(optimizer).__name__, float(torch.stack(_weights(optimizer)).square().sum()) / 2
    for _ in range(30):
        for param in _params(optimizer):
            param.grad = param.detach().clone()
        assert optimizer.step() is None, f"{name}: step() without a closure returns something"
    after = float(torch.stack(_weights(optimizer)).square().sum()) / 2
    assert after < before, f"{name}: ½‖W‖² went from {before:.6g} to {after:.6g} in 30 steps"


def _check_gradients_stay(optimizer: Optimizer) -> None:
    name = type(optimizer).__name__
    for _ in range(4):
        grads = [torch.randn(param.shape) for param in _params(optimizer)]
        kept = [grad.clone() for grad in grads]
        for param, grad in zip(_params(optimizer), grads, strict=True):
            param.grad = grad
        optimizer.step()
        assert _equal(kept, grads), f"{name}: step changes the gradients"
        state = {leaf.untyped_storage().data_ptr() for param in optimizer.state for leaf in _memory(optimizer, param)}
        assert not state & {grad.untyped_storage().data_ptr() for grad in grads}, f"{name}: a gradient becomes state"


def _check_missing_gradients(optimizer: Optimizer) -> None:
    name, (first, second, late) = type(optimizer).__name__, _params(optimizer)
    for turn in ((first, second), (first,), (first, second, late), (late,)):
        optimizer.zero_grad()
        assert all(param.grad is None for param in _params(optimizer)), f"{name}: zero_grad() leaves gradients"
        for param in turn:
            param.grad = torch.randn(param.shape)
        before = [
            [param.detach().clone(), *map(torch.clone, _memory(optimizer, param))] for param in _params(optimizer)
        ]
        optimizer.step()
        for param, kept in zip(_params(optimizer), before, strict=True):
            if param.grad is None:
                assert torch.equal(param, kept[0]), f"{name}: steps a parameter that has no gradient"
                now = _memory(optimizer, param)
                assert len(now) == len(kept) - 1, f"{name}: makes state for a parameter that has no gradient"
                assert _equal(now, kept[1:]), f"{name}: changes the state of a parameter that has no gradient"


def _check_groups(optimizer: Optimizer, added: Tensor, still: Tensor) -> None:
    name = type(optimizer).__name__
    _feed(optimizer, range(2))
    optimizer.add_param_group({"params": [added.requires_grad_()]})
    optimizer.add_param_group({"params": [still.requires_grad_()], "lr": 0.0})
    before = _weights(optimizer)
    _feed(optimizer, range(2, 12))
    *moved, unmoved = (not torch.equal(now, was) for now, was in zip(_weights(optimizer), before, strict=True))
    assert all(moved), f"{name}: a parameter is not moved by 10 steps (the first group's, one added later: {moved})"
    assert not unmoved, f"{name}: moves a group whose lr is 0"
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = _weights(optimizer)
    _feed(optimizer, range(12, 14))
    assert _equal(_weights(optimizer), before), f"{name}: does not follow the lr of a group when it becomes 0"


def _check_closure(optimizer: Optimizer) -> None:
    losses: list[float] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = torch.stack([param.square().sum() for param in _params(optimizer)]).sum()
        loss.backward()
        losses.append(loss.item())
        return losses[-1]

    with torch.no_grad():
        told = optimizer.step(closure)
    assert told in losses, f"{type(optimizer).__name__}: step(closure) returns {told}, the closure {losses}"


def _check_hooks(optimizer: Optimizer) -> None:
    ran: list[str] = []
    for kind in ("step", "state_dict", "load_state_dict"):
        for when in ("pre", "post"):
            register = getattr(optimizer, f"register_{kind}_{when}_hook")
            register(lambda *_, word=f"{kind} {when}": ran.append(word))
    _feed(optimizer, range(1))
    optimizer.load_state_dict(optimizer.state_dict())
    wanted = [f"{kind} {when}" for kind in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")]
    assert ran == wanted, f"{type(optimizer).__name__}: of the hooks {wanted}, there ran {ran}"


def _check_resumes(optimizer: Optimizer, other: Optimizer) -> None:
    name, file = type(optimizer).__name__, io.BytesIO()
    _feed(optimizer, range(5))
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    copied = copy.deepcopy(optimizer)
    with torch.no_grad():
        for param, value in zip(_params(other), _params(optimizer), strict=True):
            param.copy_(value)
    other.load_state_dict(torch.load(file, weights_only=True))
    for each in (optimizer, copied, other):
        _feed(each, range(5, 11))
    for words, each in (("copied", copied), ("saved and loaded", other)):
        assert _equal(_weights(each), _weights(optimizer)), f"{name}: a run that was {words} goes on otherwise"
        for one, twin in zip(_params(each), _params(optimizer), strict=True):
            assert _equal(_memory(each, one), _memory(optimizer, twin)), f"{name}: {words}, its state differs"


def _check_strides(optimizer: Optimizer, turned: Optimizer) -> None:
    for each in (optimizer, turned):
        _feed(each, range(6))
    for have, want in zip(_weights(turned), _weights(optimizer), strict=True):
        assert torch.allclose(have, want, rtol=1e-4, atol=1e-5), (
            f"{type(optimizer).__name__}: steps a parameter that is not contiguous otherwise"
        )


__all__ = ["check_layer", "check_level", "check_optimizer"]
