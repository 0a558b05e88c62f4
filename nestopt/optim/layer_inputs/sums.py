"""Running sums over the rows that one weight was multiplied with, and the means that a level is told."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping

import torch
from torch import Tensor

from nestopt.core.inputs import InputRequest, LayerInputs
from nestopt.optim.layer_inputs.rows import Rows
from nestopt.optim.views import Split

Totals = dict[str, Tensor]
"""Sums over rows by name, and their number `n`."""

KEPT = "inputs_sum."
"""What the state keys begin with under which a group with a period keeps totals beside its gradients' sum."""


class Sums:
    """What `wants` asks for, summed over rows in `dtype`.

    Attributes:
        groups: of the layer: 1 but for grouped convolutions.
        transposed: whether the layer's weight is `[in, out]`; sums are `[out, in]`, totals as the weight.
        n: rows.
        sums: what was added, by name.
        rows: those that are kept as they are while they are few.
    """

    groups: int = 1
    transposed: bool = False

    def __init__(self, wants: InputRequest, dtype: torch.dtype) -> None:
        self.wants, self.dtype = wants, dtype
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.n = 0
        self.sums: dict[str, Tensor] = {}
        self.rows: list[Tensor] = []

    def add(self, rows: Rows, y: Tensor, bias: Tensor | None = None) -> None:
        """Add the rows of one use, of which the layer made `y` (laid out as `Rows.outputs`), a `bias` included."""
        if not rows.n:
            return
        squares, inverse = rows.squares(self.dtype), None
        if self.wants.normalize:
            seen = squares > 0
            inverse = torch.where(seen, squares, 1).reciprocal() * seen
            squares = seen.to(self.dtype)
        if self.wants.wxx:
            self._add("wxx", self._wxx(rows, y, bias, inverse))
            self._add("mean_square", squares.sum([dim for dim in range(squares.ndim) if dim != 1]))
        if self.wants.gram:
            matrix = rows.matrix().to(self.dtype, copy=True)
            if inverse is not None:
                matrix.mul_(inverse.sqrt().movedim(1, 0).reshape(rows.groups, rows.n, 1))
            self._remember(matrix)
        self.n += rows.n

    def add_grad(self, rows: Rows, errors: Tensor) -> None:
        """Add Σ e_i x_iᵀ of the rows' errors (laid out as `Rows.outputs`); their number is counted by `add`."""
        self._add("grad", _product(rows, errors, self.dtype))

    def merge(self, other: Sums, keep: bool) -> None:
        """Add the sums of `other`, which are copied if it is to `keep` them, and may be taken over if not."""
        kept = other.rows
        if "gram" in other.sums:
            kept, self.rows = [*kept, *self.rows], []
        for key, value in other.sums.items():
            self._add(key, value.clone() if keep and key not in self.sums else value)
        for matrix in kept:
            self._remember(matrix)
        self.n += other.n

    def clear_where(self, cleared: Tensor) -> None:
        """Set all sums to 0 if `cleared` says so, without asking the host."""
        for value in (*self.sums.values(), *self.rows):
            value.masked_fill_(cleared, 0)

    def totals(self, device: torch.device) -> Totals:
        """Return the sums; they are written over as more rows are added."""
        found = {**self.sums, "n": torch.full((), self.n, dtype=torch.int64, device=device)}
        if self.transposed:
            found |= {key: found[key].mT for key in ("wxx", "grad") if key in found}
        return found | {"rows": torch.cat(self.rows, dim=1)} if self.rows else found

    def totals_of_all(self, shape: torch.Size, device: torch.device, reduce: Callable[[Tensor], object]) -> Totals:
        """Return the sums of all processes, for a weight of this shape; `reduce` makes a tensor the sum over them."""
        found, here = {}, _by_columns(self.totals(device))
        side = shape[0] if self.transposed else shape[1:].numel()
        for key, (size, dtype) in layout_of_totals(self.wants, shape, self.dtype, self.groups, side).items():
            # zeros where no row came by here
            found[key] = torch.zeros(size, dtype=dtype, device=device)
            if key in here:
                found[key].copy_(here[key])
            reduce(found[key])
        return found

    def _wxx(self, rows: Rows, y: Tensor, bias: Tensor | None, inverse: Tensor | None) -> Tensor:
        """Return Σ (y_i - b) x_iᵀ, of normalised rows where there is an `inverse` of their squared lengths."""
        if inverse is not None:
            if bias is not None:
                y = y - bias.reshape(-1, *(1,) * (y.ndim - 2)).to(y.dtype)
            return _product(rows, rows.scaled(y, inverse).to(y.dtype), self.dtype)
        product = _product(rows, y, self.dtype)
        if bias is None:
            return product
        # Y is not copied to subtract b from it
        by_group = product.reshape(rows.groups, -1, product[0].numel())
        total = rows.total(self.dtype).reshape(rows.groups, 1, -1)
        by_group.baddbmm_(bias.to(self.dtype).reshape(rows.groups, -1, 1), total, alpha=-1)
        return by_group.reshape(product.shape)

    def _remember(self, matrix: Tensor) -> None:
        """Keep rows as they are while they are fewer than columns, then their Gram matrix."""
        if "gram" not in self.sums:
            self.rows.append(matrix)
            if sum(some.shape[1] for some in self.rows) < matrix.shape[2]:
                return
            matrix, self.rows = torch.cat(self.rows, dim=1), []
        self._add("gram", matrix.mT @ matrix)

    def _add(self, key: str, value: Tensor) -> None:
        if key in self.sums:
            self.sums[key].add_(value)
        else:
            self.sums[key] = value


def _product(rows: Rows, e: Tensor, dtype: torch.dtype) -> Tensor:
    """Return Σ e_i x_iᵀ in `dtype`, multiplied in the dtype of `e`, as the layer's own gradient is."""
    if e.dtype is not torch.float16:
        return rows.product(e).to(dtype)
    # a sum over many rows would pass float16's largest number
    scale = 2.0 ** -(rows.n.bit_length() // 2)
    return rows.product(e * scale, scale).to(dtype) / scale**2


def layout_of_totals(
    wants: InputRequest, shape: torch.Size, dtype: torch.dtype, groups: int, side: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and dtype of each total of a weight of this shape, as several processes or steps add them up.

    Args:
        groups: of the layer.
        side: how many inputs each has.
    """
    sizes: dict[str, tuple[int, ...]] = {}
    if wants.wxx:
        sizes |= {"wxx": shape, "mean_square": (groups,)}
    if wants.gram:
        sizes["gram"] = (groups, side, side)
    if wants.grad is not None:
        sizes["grad"] = shape
    return {"n": ((), torch.int64)} | {key: (size, dtype) for key, size in sizes.items()}


def keep(state: MutableMapping[str, Tensor], totals: Totals) -> None:
    """Add totals to those that a state keeps."""
    for key, value in _by_columns(totals).items():
        state[KEPT + key] = state[KEPT + key] + value if KEPT + key in state else value.clone()


def kept(state: MutableMapping[str, Tensor]) -> Totals | None:
    """Take what `keep` added up out of a state; None if there was nothing."""
    return {key.removeprefix(KEPT): state.pop(key) for key in list(state) if key.startswith(KEPT)} or None


def means(totals: Mapping[str, Tensor] | None, grad: Tensor, view: Split | None = None) -> LayerInputs | None:
    """Return what a level is told of a weight with this gradient, as the view shows it; where there were no rows, that
    it had nothing but the gradient.
    """
    if totals is None:
        return None
    n, shape = totals["n"].clamp(min=1), grad.shape
    found = {key: value / n for key, value in totals.items() if key not in ("n", "rows")}
    if "mean_square" in found:
        square = found["mean_square"]
        of_outputs = square.repeat_interleave(shape[0] // len(square)).reshape(-1, *(1,) * (len(shape) - 1))
        found["mean_square"] = of_outputs if len(square) > 1 else square.reshape(())
    if "grad" in found:
        found["grad"] = torch.where(totals["n"] > 0, found["grad"], grad.to(found["grad"].dtype))
    if view is not None:
        found |= {key: view.cut(found[key]) for key in ("wxx", "grad") if key in found}
    if "rows" in totals:
        found["rows"] = totals["rows"] / n.to(totals["rows"].dtype).sqrt()
    for key in ("gram", "rows"):
        if key in found and len(found[key]) == 1:
            found[key] = found[key][0]
    return LayerInputs(**found)


def _by_columns(totals: Totals) -> Totals:
    """Return totals with the Gram matrix of the rows in their place, which is as large whatever their number."""
    if "rows" not in totals:
        return totals
    rest = {key: value for key, value in totals.items() if key != "rows"}
    return rest | {"gram": totals["rows"].mT @ totals["rows"]}
