"""Running sums over the rows that one weight was multiplied with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nestopt.core.device import by_contract
from nestopt.core.inputs import InputRequest, LayerInputs
from nestopt.optim.layer_inputs.rows import Rows


class Sums:
    """What `wants` asks for, summed over rows in `dtype`, until `take` makes means of it.

    Attributes:
        groups: of the layer: 1 but for grouped convolutions.
        n: rows since the last take.
        sums: what was added, by name.
        rows: those that are kept as they are while they are few.
        ever: whether there were rows at all since this was made.
    """

    groups: int = 1

    def __init__(self, wants: InputRequest, dtype: torch.dtype) -> None:
        self.wants, self.dtype, self.ever = wants, dtype, False
        self._clear()

    def _clear(self) -> None:
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
        self.n, self.ever = self.n + rows.n, True

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
        self.n, self.ever = self.n + other.n, self.ever or other.ever

    def total(self, shape: torch.Size, device: torch.device, reduce: Callable[[Tensor], object]) -> None:
        """Add the sums of other processes, for a weight of this shape; `reduce` makes a tensor the sum over them."""
        if self.rows:  # as many rows as each process has, which differs: their products are as large everywhere
            matrix, self.rows = torch.cat(self.rows, dim=1), []
            self._add("gram", matrix.mT @ matrix)
        side = shape[1:].numel()
        sizes: dict[str, tuple[int, ...]] = {}
        if self.wants.wxx:
            sizes |= {"wxx": shape, "mean_square": (self.groups,)}
        if self.wants.gram:
            sizes["gram"] = (self.groups, side, side)
        if self.wants.grad is not None:
            sizes["grad"] = shape
        for key, size in sizes.items():
            if key not in self.sums:  # no row came by here
                self.sums[key] = torch.zeros(size, dtype=self.dtype, device=device)
            reduce(self.sums[key])
        count = torch.full((), self.n, dtype=torch.int64, device=device)
        reduce(count)
        with by_contract("agree"):
            self.n = int(count)
        self.ever = self.ever or self.n > 0

    def take(self, shape: torch.Size) -> LayerInputs | None:
        """Return the means for a weight of this shape, and start anew; None if there were no rows."""
        if not self.n:
            return None
        means = {key: value.div_(self.n) for key, value in self.sums.items()}
        if "mean_square" in means:
            square = means["mean_square"]
            if len(square) > 1:
                square = square.repeat_interleave(shape[0] // len(square))
            means["mean_square"] = (
                square.reshape(-1, *(1,) * (len(shape) - 1)) if len(square) > 1 else square.reshape(())
            )
        if self.rows:
            means["rows"] = torch.cat(self.rows, dim=1).div_(self.n**0.5)
        for key in ("gram", "rows"):
            if key in means and len(means[key]) == 1:
                means[key] = means[key][0]
        self._clear()
        return LayerInputs(**means)

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
