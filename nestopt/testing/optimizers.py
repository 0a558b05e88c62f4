"""Whether an optimizer does what loops written for `torch.optim` rely on."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from nestopt.core.tree import leaves

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
