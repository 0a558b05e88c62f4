"""torch's own fused kernels: one pass over memory for a whole step of Adam or of momentum."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def available(device: str, dtype: torch.dtype) -> bool:
    """Whether torch has the kernels for tensors of `dtype` on a device of this type; meta tensors are like CUDA's."""
    return device in ("cpu", "cuda", "meta") and dtype in (torch.float32, torch.float64)


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels take these tensors as they are: they read contiguous memory, whatever the strides say."""
    first = tensors[0]
    return (
        available(first.device.type, first.dtype)
        and all(map(Tensor.is_contiguous, tensors))
        and {tensor.dtype for tensor in tensors} == {first.dtype}
    )


_meta = torch.library.Library("aten", "IMPL", "Meta")
for _kernel in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_"):
    for _name in (_kernel, f"{_kernel}.tensor_lr"):
        # where torch has none: a step on tensors without data writes nothing
        if not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{_name}", "Meta"):
            _meta.impl(_name, lambda *args, **kwargs: None)


@functools.lru_cache(maxsize=64)
def _on_cpu(step: float) -> Tensor:
    return torch.tensor(step, dtype=torch.float32)


def _counts(step: float | Sequence[Tensor], params: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the step counts as the kernels read them: float32, on the device, and they don't look whether it is so."""
    if not isinstance(step, int | float):
        return step
    device = params[0].device
    count = _on_cpu(step) if device.type == "cpu" else torch.full((), step, dtype=torch.float32, device=device)
    return [count] * len(params)


def _rate(lr: float | Tensor) -> float | Tensor:
    """Return a learning rate as the kernels read it: on an accelerator in float32."""
    return lr.to(torch.float32) if isinstance(lr, Tensor) and lr.device.type != "cpu" else lr


def adam(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    step: float | Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
) -> None:
    """A step of Adam on every parameter and its memories, in place. AMSGrad where `max_exp_avg_sqs` is not empty.

    `step` counts from 1, for all or, as float32 tensors beside them, for each; `float("inf")` leaves out the bias
    correction. Weight decay is added to the gradient, or
    taken off the parameter if `decoupled`.
    """
    kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
    kernel(  # type: ignore[call-overload]
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs,
        _counts(step, params),
        lr=_rate(lr),
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=bool(max_exp_avg_sqs),
        maximize=maximize,
    )


def sgd(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momenta: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float,
    dampening: float = 0.0,
    nesterov: bool = False,
    weight_decay: float = 0.0,
    maximize: bool = False,
    first: bool = False,
) -> None:
    """A step of momentum on every parameter and its memory, in place; plain descent where `momenta` is empty.

    Weight decay is added to the gradient. `first`: the memory is set to the gradient, whatever `dampening`.
    """
    torch._fused_sgd_(  # type: ignore[call-overload]
        params,
        grads,
        momenta,
        weight_decay=weight_decay,
        momentum=momentum,
        lr=_rate(lr),
        dampening=dampening,
        nesterov=nesterov,
        maximize=maximize,
        is_first_step=first,
    )
