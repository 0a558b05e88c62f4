"""How a parameter is shown to a level: in which dtype, and as which matrix or matrices."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.clock import advance, advance_, start
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, store, tree_map


def work_dtype(param: Tensor) -> torch.dtype:
    """Return the dtype in which levels keep their state: float32 or wider; complex for a complex parameter."""
    return torch.float32 if param.dtype in (torch.float16, torch.bfloat16) else param.dtype


def in_pieces(tensor: Tensor) -> bool:
    """Return whether a tensor lies over several processes: a DTensor, as `fully_shard` makes them."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return what levels are shown of a tensor: what this process has of it, if it lies as `like` over several.

    All of one that is not in pieces; of a complex one the real and imaginary parts, as a view of one dimension more.
    """
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    if not in_pieces(tensor):
        return tensor
    if like is not None and in_pieces(like) and tensor.placements != like.placements:  # type: ignore[attr-defined]
        tensor = tensor.redistribute(placements=like.placements)  # type: ignore[attr-defined]
    return tensor.to_local()  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Split:
    """A parameter that is several matrices side by side (a fused query, key and value, or the heads of a layer), or
    lies the other way round than that of `nn.Linear`.

    Levels that look at whole matrices are shown each by itself, `[out, in]`. Give one as `"view"` of a parameter group.

    Args:
        parts: how many.
        dim: along which of the parameter's dimensions they lie: 0 for outputs (`qkv.weight` is `Split(3)`), 1 for
            inputs.
        transposed: whether the parameter is `[in, out]`, as those of transformers' `Conv1D` are (of which `c_attn` is
            `Split(3, 1, True)`), or `[in, out, ...]`, as a transposed convolution's. Default False.

    Raises:
        ValueError: a number out of range.
    """

    parts: int
    dim: int = 0
    transposed: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.parts, bool) or not isinstance(self.parts, int) or self.parts < 1:
            raise ValueError(f"parts={self.parts!r} is not allowed; give a whole number of matrices, 1 or more")
        if self.dim not in (0, 1):
            raise ValueError(f"dim={self.dim!r} is not allowed; give 0 (outputs) or 1 (inputs)")

    @property
    def stacked(self) -> bool:
        """Return whether levels are shown a stack of matrices, and not one."""
        return self.parts > 1

    def fits(self, param: Tensor) -> bool:
        """Return whether `param` is a matrix of so many equal parts."""
        return param.ndim > 1 and (not self.stacked or (param.ndim == 2 and param.shape[self.dim] % self.parts == 0))

    def cut(self, param: Tensor) -> Tensor:
        """Cut a parameter into `[parts, out, in]`, the divided dimension that much shorter; one is `[out, in]`."""
        matrix = param.flatten(1)
        seen = torch.stack(matrix.chunk(self.parts, self.dim)) if self.stacked else matrix
        return seen.mT if self.transposed else seen

    def join(self, seen: Tensor) -> Tensor:
        """Join what `cut` took apart, as a matrix."""
        matrix = seen.mT if self.transposed else seen
        return torch.cat(matrix.unbind(), self.dim) if self.stacked else matrix


def matrix_view(tensor: Tensor, level: Level, view: Split | None = None) -> Tensor:
    """Return `tensor` as `level` takes it: cut by `view`; a convolution as `[out, in·kh·kw]` if it needs matrices."""
    if view is not None:
        return view.cut(tensor)
    return tensor.flatten(1) if tensor.ndim > 2 and "matrix" in level.needs else tensor


def back(direction: Tensor, param: Tensor, view: Split | None) -> Tensor:
    """Return a direction for what `matrix_view` showed in the shape of the parameter."""
    return (view.join(direction) if view is not None else direction).reshape(param.shape)


def begin(level: Level, param: Tensor, view: Split | None = None) -> State:
    """Return the state that `level` starts with on `param`: of the parts of a view, each its own, stacked."""
    seen = matrix_view(param, level, view)
    if view is None or not view.stacked:
        return start(level, seen)
    return tree_map(lambda *each: torch.stack(each), *(start(level, part) for part in seen))


def layout(level: Level, param: Tensor, view: Split | None = None) -> State:
    """Do as `begin` without numbers: tensors on the meta device."""
    return begin(level, torch.empty(param.shape, device="meta", dtype=work_dtype(param)), view)


def advance_stack(level: Level, grads: Tensor, states: State, signal: Signal) -> tuple[Tensor, State]:
    """Do as `advance` for a stack `[n, *shape]` of tensors. Raises RuntimeError if `level` does what `vmap` can't."""
    if level.is_batched:
        return advance(level, grads, states, signal)

    def alone(grad: Tensor, state: State, param: Tensor) -> tuple[Tensor, State]:
        return advance(level, grad, state, dataclasses.replace(signal, param=param))

    assert signal.param is not None  # an optimizer always has one
    return vmap(alone)(grads, states, signal.param)


def advance_stack_(level: Level, grads: Tensor, states: State, signal: Signal) -> Tensor:
    """Do as `advance_stack` in place. When it raises, nothing has changed."""
    if level.is_batched:
        return advance_(level, grads, states, signal)
    directions, new = advance_stack(level, grads, states, signal)
    return store(states, new, directions)
