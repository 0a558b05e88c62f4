"""Newton-Schulz orthogonalisation, batched: the matrix with the singular vectors of X and singular values near 1."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from nestopt.core.device import constant_in_graphs
from nestopt.core.scale import largest

Triple = tuple[float, float, float]
Form = Literal["auto", "standard", "gram"]

QUINTIC: Triple = (3.4445, -4.7750, 2.0315)
"""Jordan 2024: the steepest at 0, singular values end in about [0.7, 1.2]."""
CUBIC: Triple = (1.5, -0.5, 0.0)
"""The classical iteration: slow, and converges to 1."""
POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Amsel et al. 2025 (arXiv 2505.16932), of its own optimal polynomial each step, for singular values in [0.001, 1]."""
SAFETY = 1.01
"""Polar Express divides singular values by this before each step but the last, so that rounding keeps them below 1."""

SETS: dict[str, tuple[Triple, ...]] = {"quintic": (QUINTIC,), "cubic": (CUBIC,), "polar_express": POLAR_EXPRESS}
Coefficients = str | Sequence[float]
Product = Callable[..., Tensor]

TINY = 8
"""Short sides below this: torch's batched product of so small matrices rounds bfloat16 otherwise than its plain one."""
WIDE = 1.5
"""Longer by more than this, the Gram form takes fewer FLOPs: 4m²n + 34m³ for five steps, or in bfloat16, with two
fresh starts, 12m²n + 22m³, not 20m²n + 10m³."""
GROWTH, LARGEST = 20.0, 1.5
"""In bfloat16 the Gram form starts anew from X before an error of its Gram matrix has grown so much, and in others as
their rounding is finer: by a² in a step, where an eigenvalue is near 0. It begins as 2⁻⁹ of the largest eigenvalue,
which is 1 at most, and then about 1.5. Grown towards 1 it would be an eigenvalue far below 0, on which the iteration
diverges; at 20 no matrix tried comes near that, and at 30 small ones of few directions do. For `quintic` that is after
every second step."""
STRIPS, STRIP, WORK = 4, 64, 1 << 19
"""A symmetric product of factors with so many numbers is made in so many strips, where one is this high at least:
10/16 of the FLOPs."""


@constant_in_graphs
def _multiplies_bfloat16(device: str) -> bool:
    """Whether matrix products in bfloat16 are native there. A CPU that emulates them takes ten times float32's time."""
    return _native_bfloat16(device)  # the decorator above does not take a cached function


@functools.cache
def _native_bfloat16(device: str) -> bool:
    return device != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def work_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype to iterate in: bfloat16 where hardware multiplies in it, else float32; float64 for float64."""
    if x.dtype == torch.float64:
        return torch.float64
    return torch.bfloat16 if _multiplies_bfloat16(x.device.type) else torch.float32


def schedule(coefficients: Coefficients, steps: int) -> list[Triple]:
    """Return the (a, b, c) of every step, for a set by name or one triple for all; a set's last goes on for ever."""
    if not isinstance(coefficients, str):
        a, b, c = coefficients
        return [(a, b, c)] * steps
    known = SETS[coefficients]
    triples = [known[min(i, len(known) - 1)] for i in range(steps)]
    if coefficients == "polar_express":
        s = SAFETY
        triples = [(a / s, b / s**3, c / s**5) for a, b, c in triples[:-1]] + triples[-1:]
    return triples


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: Coefficients = QUINTIC,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    *,
    form: Form = "auto",
    detached: bool = False,
    factor: float = 1.0,
) -> Tensor:
    r"""Iterate $X \leftarrow aX + b(XX^\top)X + c(XX^\top)^2X$ from $X / \lVert X\rVert_F$ (NL eq. 43-44).

    Args:
        x: `[..., m, n]`; each matrix on its own. The iteration runs on the short side.
        steps: how many.
        coefficients: `(a, b, c)`, or the name of a set: `"quintic"`, `"cubic"`, `"polar_express"`.
        eps: least norm divided by. Default 0: numbers of any size, all 0 but zeros, are brought to length 1.
        dtype: in which to iterate. Default: `work_dtype(x)`.
        form: `"standard"`, as above; `"gram"`: all steps are polynomials of $G = XX^\top$, so they are multiplied up as
            matrices of the short side and applied to X once. `"auto"`: the one of fewer FLOPs (float64: standard).
        detached: no autograd and no `vmap`: products that are symmetric are then made as such, on the CPU.
        factor: of the result.

    Returns:
        In the dtype of the iteration.
    """
    if dtype is None:
        dtype = work_dtype(x)
    if x.ndim > 2 and dtype == torch.bfloat16 and min(x.shape[-2:]) < TINY:
        each_ = partial(newton_schulz, steps=steps, coefficients=coefficients, eps=eps, dtype=dtype, form=form)
        return torch.stack([each_(each, factor=factor) for each in x.flatten(0, -3)]).reshape(x.shape)
    tall = x.shape[-2] > x.shape[-1]
    if not eps:  # in one pass if no one has to see what is between
        size, eps = largest(x, (-2, -1)), torch.finfo(x.dtype).tiny
        x = torch.div(x, size, out=torch.empty_like(x, dtype=dtype)) if detached else x / size
    x = x.to(dtype)
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=eps)
    x = x.mT if tall else x
    shape, x = x.shape, x if x.ndim == 2 else x.flatten(0, -3)
    short, long = x.shape[-2:]
    by_strips = detached and form != "standard" and x.ndim == 2 and short >= STRIPS * STRIP and x.device.type == "cpu"
    square = _by_strips if by_strips else _product
    if form == "auto":
        form = "gram" if dtype != torch.float64 and long > WIDE * short else "standard"
    triples = schedule(coefficients, steps)
    if not triples:
        x = x * factor
    else:
        triples[-1] = tuple(factor * number for number in triples[-1])  # type: ignore[assignment]
        x = (_gram if form == "gram" else _standard)(x, triples, square)
    x = x.reshape(shape)
    return x.mT if tall else x


def _standard(x: Tensor, triples: list[Triple], square: Product) -> Tensor:
    for a, b, c in triples:
        gram = square(x, x.mT)
        if c:
            gram, b = square(gram, gram, gram, b, c), 1.0
        x = _product(gram, x, x, a, b)
    return x


def _gram(x: Tensor, triples: list[Triple], square: Product) -> Tensor:
    gram: Tensor = square(x, x.mT)
    power, error = None, 1.0
    most = GROWTH * torch.finfo(torch.bfloat16).eps / torch.finfo(x.dtype).eps
    for i, (a, b, c) in enumerate(triples):
        step = square(gram, gram, gram, b, c) if c else gram * b
        step.diagonal(dim1=-2, dim2=-1).add_(a)
        # these are polynomials of one matrix: they commute, and all products are symmetric
        power = step if power is None else square(step, power)
        if i + 1 == len(triples):
            return power @ x
        error *= a * a
        if error > most:
            x = power @ x
            gram, power, error = square(x, x.mT), None, LARGEST
        else:
            gram = square(square(step, gram), step)
    return x


def _product(left: Tensor, right: Tensor, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Return left @ right, or beta · add + alpha · left @ right."""
    if add is None:
        return left @ right
    return (torch.addmm if left.ndim == 2 else torch.baddbmm)(add, left, right, beta=beta, alpha=alpha)


def _by_strips(left: Tensor, right: Tensor, add: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Do as `_product` where that is symmetric: the lower triangle, strip by strip, and its mirror image."""
    m = len(left)
    if left.numel() < WORK:
        return _product(left, right, add, beta, alpha)
    out, high = left.new_empty(m, m), -(-m // STRIPS)
    for top in range(0, m, high):
        end = min(top + high, m)
        strip, rows, columns = out[top:end, :end], left[top:end], right[:, :end]
        if add is None:
            torch.mm(rows, columns, out=strip)
        else:
            torch.addmm(add[top:end, :end], rows, columns, beta=beta, alpha=alpha, out=strip)
        out[:top, top:end] = out[top:end, :top].mT
    return out
