"""Newton-Schulz orthogonalisation, batched: the matrix with the singular vectors of X and singular values near 1."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan 2024: the steepest at 0, singular values end in about [0.7, 1.2]."""

TINY = 8
"""Short sides below this: torch's batched product of so small matrices rounds bfloat16 otherwise than its plain one."""


@functools.cache
def _multiplies_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are native there. A CPU that emulates them takes ten times float32's time."""
    return device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype to iterate in: bfloat16 where the hardware multiplies in it, else float32; float64 for float64."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if _multiplies_bfloat16(x.device.type) else torch.float32


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: Sequence[float] = QUINTIC,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    r"""$X \leftarrow aX + b(XX^\top)X + c(XX^\top)^2X$ from $X / \lVert X\rVert_F$ (NL eq. 43-44).

    Args:
        x: `[..., m, n]`; each matrix on its own. The iteration runs on the short side.
        steps: how many.
        coefficients: `(a, b, c)`.
        eps: least norm divided by.
        dtype: in which to iterate. Default: `work_dtype(x)`.

    Returns:
        In the dtype of the iteration.
    """
    a, b, c = coefficients
    if dtype is None:
        dtype = work_dtype(x)
    if x.ndim > 2 and dtype == torch.bfloat16 and min(x.shape[-2:]) < TINY:
        alone = [newton_schulz(each, steps, coefficients, eps, dtype) for each in x.flatten(0, -3)]
        return torch.stack(alone).reshape(x.shape)
    tall = x.shape[-2] > x.shape[-1]
    x = x.to(dtype)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    shape, x = x.shape, x if x.ndim == 2 else x.flatten(0, -3)
    product, add_product = (torch.mm, torch.addmm) if x.ndim == 2 else (torch.bmm, torch.baddbmm)
    for _ in range(steps):
        gram = product(x, x.mT)
        x = add_product(x, add_product(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x
