"""Statistics of a layer's inputs: the keys under which its weight matrix, a memory, is asked to remember."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

from torch import Tensor

from nestopt.core.part import FieldError, Part

INPUTS = "inputs"
"""What a level puts among its `requires` in order to be given `signal.inputs`."""


@dataclasses.dataclass(frozen=True)
class LayerInputs:
    r"""Hold sums over the inputs $x_1 \dots x_n$ that a weight `W [out, in]` was multiplied with for its gradient.

    All are means over the n rows, in the dtype in which levels work. A row is one token, or one patch of a
    convolution, whose kernel `[out, in/groups, ...]` is `[out, in]` per group.

    Attributes:
        wxx: $W X^\top X / n$, in the shape of W; None only where no level asked for it.
        mean_square: $\mathrm{mean}\lVert x\rVert^2$, broadcastable against W: one number, or for a grouped convolution
            one per output, `[out, 1, ...]`.
        gram: $X^\top X / n$ `[in, in]` (of a grouped convolution `[groups, in, in]`), or None where it was not asked
            for or `rows` is smaller.
        rows: $X / \sqrt n$ `[n, in]` (`[groups, n, in]`), where there were fewer rows than columns and it was asked
            for.
        grad: $\mathrm{mean}\, \nabla_y \ell(W x_i, v_i)\, x_i^\top$ in the shape of W, for a level with an
            objective of its own (`ggd`).
    """

    wxx: Tensor | None = None
    mean_square: Tensor | None = None
    gram: Tensor | None = None
    rows: Tensor | None = None
    grad: Tensor | None = None


class MemoryInputs(LayerInputs):
    """What a weight of a memory was shown, whose objective has values of its own: a layer's are made of the loss."""


@dataclasses.dataclass(frozen=True)
class InputRequest:
    r"""Say which sums over a layer's inputs a level asks for: its `wants`, if it requires `"inputs"`.

    Attributes:
        wxx: fill `wxx` and `mean_square`.
        normalize: take x/‖x‖ for x in all but `grad` (rows of zeros stay zeros).
        gram: fill `gram` or `rows`, whichever is smaller.
        grad: gives $\nabla_y \ell(y_i, v_i)$ from the outputs $y_i = W x_i$ and $n\,\partial L/\partial y_i$, both
            `[..., out]`, one row each; the field `grad` is then filled.
        scale_free: whether `grad` gives the same for a loss multiplied by a constant.
    """

    wxx: bool = True
    normalize: bool = False
    gram: bool = False
    grad: Callable[[Tensor, Tensor], Tensor] | None = None
    scale_free: bool = False


def request_of(level: Part) -> InputRequest | None:
    """Return what `level` and all parts within it ask for, together; None if none of them uses a layer's inputs.

    Raises:
        FieldError: one that does stands within a level with a period, which sums gradients but not inputs.
        ValueError: two of them ask for different things under one name.
    """
    found = list(_asking(level))
    if not found:
        return None
    sums = [wants for _, wants in found if wants.wxx or wants.gram]
    own = [wants for _, wants in found if wants.grad is not None]
    if len({wants.normalize for wants in sums}) > 1 or len(own) > 1:
        key = "an objective of their own" if len(own) > 1 else "inputs with and without normalize_inputs"
        labels = " and ".join(part.label for part, _ in found)
        raise ValueError(f"{labels} in one stack ask for {key}, and a layer's inputs are summed once; use one of them")
    return InputRequest(
        wxx=any(wants.wxx for wants in sums),
        normalize=any(wants.normalize for wants in sums),
        gram=any(wants.gram for wants in sums),
        grad=own[0].grad if own else None,
        scale_free=own[0].scale_free if own else False,
    )


def _asking(part: Part) -> Iterator[tuple[Part, InputRequest]]:
    if INPUTS in part.requires:
        wants: InputRequest | None = getattr(part, "wants", InputRequest())
        if wants is not None:
            yield part, wants
    below = [found for _, inner in part.parts() for found in _asking(inner)]
    period = getattr(part, "period", 1)
    if below and period > 1:
        label = below[0][0].label
        problem = (
            f"is not allowed around {label}: a clock sums gradients, not inputs; give the parameter group the period"
        )
        raise FieldError(part.label, "period", period, problem)
    yield from below
