"""What the rules of an accelerator find: the faults that were there first, and others of their kinds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from nestopt.core.device import EXCEPTIONS, WaitError, by_contract, no_exceptions, number_like, upload
from nestopt.testing import AcceleratorFault, accelerator_rules


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


X, HOST = meta(3, 4), torch.ones(3, 4)


def adam(*, step: Tensor, lr: float | Tensor = 0.1, memory: Tensor = X) -> None:
    numbers = {"lr": lr, "beta1": 0.9, "beta2": 0.99, "weight_decay": 0.0, "eps": 1e-8}
    torch._fused_adamw_([X], [X], [memory], [X], [], [step], amsgrad=False, maximize=False, **numbers)  # type: ignore[call-overload]


FAULTS: dict[str, tuple[str, Callable[[], object]]] = {
    # the four that were found first
    "an integer count for a fused kernel": ("as float32", lambda: adam(step=torch.full((), 1, device="meta"))),
    "a number copied at each step": ("copied", lambda: torch.as_tensor(0.5, dtype=X.dtype, device=X.device)),
    "numbers per head copied at each forward": ("copied", lambda: X.new_tensor([0.5, 0.25])),
    "clocks that are asked on the device": ("waits", lambda: X.sum(1).tolist()),
    # and what is like them
    "a number asked for": ("waits", lambda: float(X.sum())),
    "a branch on a number": ("waits", lambda: 1 if X.any() else 0),
    "a shape that numbers decide": ("waits", lambda: X[X > 0]),
    "a draw that checks its sum": ("waits", lambda: torch.multinomial(X, 1)),
    "a decomposition that checks itself": ("waits", lambda: torch.linalg.eigh(meta(3, 3))),
    "a solution that checks itself": ("waits", lambda: torch.linalg.solve(meta(3, 3), meta(3, 3))),
    "a tensor taken to the host": ("waits", X.cpu),
    "a tensor of the host's": ("copied", lambda: HOST.to("meta")),
    "a tensor of the host's, written": ("copied", lambda: meta(3, 4).copy_(HOST)),
    "an array": ("copied", lambda: torch.as_tensor(np.ones(3), device="meta")),
    "a list as an index": ("copied", lambda: X[[0, 2]]),
    "an index on the host": ("copied|two devices", lambda: X.index_select(0, torch.tensor([0]))),
    "two devices": ("two devices", lambda: X + HOST),
    "a count on the host for a fused kernel": ("two devices", lambda: adam(step=torch.ones(()))),
    "a memory of another dtype": ("one dtype", lambda: adam(step=meta(), memory=meta(3, 4, dtype=torch.bfloat16))),
    "a rate that is no float32": ("float32", lambda: adam(step=meta(), lr=meta(dtype=torch.bfloat16))),
    "float64": ("float64", X.double),
    "float64 made there": ("float64", lambda: torch.zeros(2, dtype=torch.float64, device="meta")),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str) -> None:
    words, fault = FAULTS[name]
    with pytest.raises(AcceleratorFault, match=words), accelerator_rules():
        fault()


def test_a_fault_in_a_backward_pass_is_found() -> None:
    class Copies(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * torch.tensor([2.0], device=grad.device)

    x = meta(3).requires_grad_()
    with pytest.raises(AcceleratorFault, match="copied"), accelerator_rules():
        Copies.apply(x).sum().backward()


def test_a_fault_that_was_caught_is_told_at_the_end() -> None:
    rules = accelerator_rules()
    rules.__enter__()
    with contextlib.suppress(AcceleratorFault):
        X.sum().item()
    with pytest.raises(AcceleratorFault, match="waits"):
        rules.__exit__(None, None, None)


def test_what_is_right_passes() -> None:
    with accelerator_rules():
        adam(step=torch.full((), 1.0, device="meta"))
        torch.where(X > 0, X, 0.0)
        X * torch.tensor(2.0)  # one number of the host's goes with the launch
        number_like(0.5, X) + number_like(X, X)
        y = meta(3, 4)
        y[0], y[X > 0] = 1.0, 0.0
        upload([1, 2, 3], X.device)
        HOST.double().tolist()


def test_what_is_by_contract_passes_and_only_that() -> None:
    with accelerator_rules(), by_contract("eigh"):
        torch.linalg.eigh(meta(3, 3))
    for reason in EXCEPTIONS:
        with no_exceptions(), pytest.raises(WaitError), by_contract(reason):
            pass
    with pytest.raises(KeyError), by_contract("because"):
        pass
