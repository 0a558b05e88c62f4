"""Newton-Schulz orthogonalisation, batched: the matrix with the singular vectors of X and singular values near 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Jordan 2024: the steepest at 0, singular values end in about [0.7, 1.2]."""
CUBIC = (1.5, -0.5, 0.0)
"""The classical iteration: converges to 1 exactly, slowly."""


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
        dtype: in which to iterate. Default: bfloat16, as `torch.optim.Muon` does, and float64 for float64.

    Returns:
        In the dtype of the iteration.
    """
    a, b, c = coefficients
    if dtype is None:
        dtype = torch.float64 if x.dtype == torch.float64 else torch.bfloat16
    tall = x.shape[-2] > x.shape[-1]
    x = x.to(dtype)
    x = x.mT if tall else x
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    shape, x = x.shape, x.reshape(-1, *x.shape[-2:])
    for _ in range(steps):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.reshape(shape)
    return x.mT if tall else x
