"""Watching what layers are shown, for levels that want it (`dgd`): sums over rows, taken by forward hooks."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx
from torch.utils.hooks import RemovableHandle

from nestopt.core.device import no_autocast
from nestopt.core.inputs import InputRequest, LayerInputs, request_of
from nestopt.core.level import Level
from nestopt.optim.layer_inputs.rows import multiplies, rows_of
from nestopt.optim.layer_inputs.sums import Sums
from nestopt.optim.views import work_dtype

Scale = float | Callable[[], float]
"""What the loss was multiplied with: a number, or what gives it."""


class Seen(Protocol):
    """Whoever knows what parameters were multiplied with."""

    def take(self, param: Tensor) -> LayerInputs | None:
        """Return what a parameter was multiplied with since the last take; None if nothing."""

    def unseen(self) -> list[str]:
        """Return the names of parameters of which it never knew."""


class Watcher:
    r"""Sums what the layers of a model are shown, for each parameter whose level wants it.

    Watched are the weights of `nn.Linear` and `nn.Conv1d`, `2d` and `3d` (their subclasses too, unless these have a
    `forward` of their own). A use of the layer counts when, and as often as, a backward pass comes through its output:
    gradient accumulation and tied weights sum over uses, recomputation under activation checkpointing does not count
    again, and a forward pass in evaluation or under `no_grad` costs nothing and leaves nothing.

    $W X^\top X = Y^\top X$ is taken from the layer's own output as it passes: one more product of the weight's size per
    use, in the dtype that the layer ran in (autocast's), summed in float32 or wider. Between forward and backward a use
    holds no more than the weight's size, and no activation. The output itself is not touched, so that what follows may
    work in place.

    Sums are of this process: under data parallelism each has seen its own inputs, and nobody averages them.
    `torch.compile` breaks its graph at each watched layer; watch before the first call of a compiled model, which
    otherwise runs on without the hooks (`unseen` then names its layers). A layer used through `torch.nn.functional`
    with its weight is not seen.

    The model knows the watcher by weak references: it does not keep it alive, and a copied, pickled or saved model is
    not watched. A copy of a watcher watches nothing.

    Args:
        model: whose layers to watch; None for none.
        levels: the level of each parameter. Vectors, and parameters whose level wants no inputs, are left out.
        loss_scale: what the mean loss was multiplied with before `backward`, a number or a function that gives it:
            GradScaler's `get_scale`, or 1/k with k micro-batches. Only levels whose `wants` depend on it (a nonlinear
            `ggd`) use it. Default: 1, with float16 layers refused, whose loss is always scaled.

    Raises:
        ValueError: levels of one stack want different sums, or one of them stands on a clock.
    """

    def __init__(
        self,
        model: nn.Module | None,
        levels: Mapping[Tensor, Level],
        *,
        loss_scale: Scale | None = None,
    ) -> None:
        self.loss_scale = loss_scale
        # a parameter that DeepSpeed has cut up is empty, and says what it was
        asked = {
            param: request_of(level)
            for param, level in levels.items()
            if len(getattr(param, "ds_shape", param.shape)) > 1
        }
        self._sums = {param: Sums(wants, work_dtype(param)) for param, wants in asked.items() if wants is not None}
        self._of_module: weakref.WeakKeyDictionary[nn.Module, Sums] = weakref.WeakKeyDictionary()
        self._names: dict[Tensor, str] = {}
        if model is not None:
            self._names = {param: name for name, param in model.named_parameters()}
        hook, handles = _Hook(self), []
        for module in model.modules() if model is not None else ():
            if multiplies(module) and module._parameters.get("weight") in self._sums:
                weight = module._parameters["weight"]
                assert weight is not None
                sums = self._sums[weight]
                sums.groups = int(getattr(module, "groups", 1))
                if hasattr(weight, "to_local"):  # a DTensor: FSDP2 puts the whole weight in its place for a while
                    self._of_module[module] = sums
                # before other hooks, which may change the output
                handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._remove = weakref.finalize(self, _remove, handles)

    def take(self, param: Tensor) -> LayerInputs | None:
        """Return what `param` was multiplied with since the last take, and start anew; None if nothing."""
        sums = self._sums.get(param)
        return None if sums is None else sums.take(param.shape)

    def take_total(self, param: Tensor, shape: torch.Size, comm: Any) -> LayerInputs | None:
        """Return what a parameter of this true shape was multiplied with in all processes of `comm`, and start anew.

        All processes must ask for the same parameter. Rows are counted where they were seen, so that means are over all
        rows, however they were shared.
        """
        sums = self._sums.get(param)
        if sums is None:
            return None
        if comm is not None and dist.get_world_size(comm) > 1:
            sums.total(shape, param.device, lambda tensor: dist.all_reduce(tensor, group=comm))
        return sums.take(shape)

    def unseen(self) -> list[str]:
        """Return the names of parameters that want inputs and have a gradient now, but none was ever seen."""
        return [
            self._names.get(param, f"a parameter of shape {list(param.shape)} that is not the model's")
            for param, sums in self._sums.items()
            if param.grad is not None and not sums.ever
        ]

    def remove(self) -> None:
        """Take the hooks off the model. What was summed until now can still be taken."""
        self._remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watcher, (None, {})

    def see(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = module._parameters.get("weight")
        sums = self._sums.get(weight) if weight is not None else None
        if sums is None:
            sums = self._of_module.get(module)
        if weight is None or sums is None or not (weight.requires_grad and y.requires_grad):
            return
        wants = sums.wants
        again = _recomputing()
        with no_autocast(y.device):
            if wants.grad is not None:
                self._check_scale(wants, module, weight, y)
                use: _Use = _WithSurprise(sums, module, x, y.dtype, self.loss_scale)
            elif _few(x, y, weight):
                use = _Few(sums, module, x, y)
            elif again:
                return
            else:
                use = _Many(sums, module, x, y)
        if not again:
            # on the tensor and not its node: layers that change it in place come after the hook
            y.register_hook(use)

    def _check_scale(self, wants: InputRequest, module: nn.Module, weight: Tensor, y: Tensor) -> None:
        if y.dtype is torch.float16 and self.loss_scale is None and not wants.scale_free:
            raise RuntimeError(
                f"{type(module).__name__} {self._names.get(weight)!r} runs in float16, whose losses are "
                "scaled, and its level's objective is not linear in the loss: give loss_scale, such as "
                "GradScaler's get_scale (or 1.0 if the loss is not scaled)"
            )


# -- one use of a layer, between its forward and its backward ----------------------------------------------------------


class _Use(ABC):
    """Called with the gradient of the layer's output, once for each backward pass; then the use counts."""

    def __init__(self, sums: Sums, module: nn.Module) -> None:
        self.sums, self.module = sums, module

    def __call__(self, grad: Tensor) -> None:
        keep = _graph_is_kept()
        with torch.no_grad(), no_autocast(grad.device):
            self.count(grad, keep)
        if not keep:
            self.__dict__.clear()  # the graph may live on for long, as the user's loss

    @abstractmethod
    def count(self, grad: Tensor, keep: bool) -> None:
        """Add the use to the sums; what it holds is copied if it is to `keep` it."""


class _Many(_Use):
    """Holds the products, of the weight's size, and no rows."""

    def __init__(self, sums: Sums, module: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(sums, module)
        self.own = Sums(sums.wants, sums.dtype)
        with torch.no_grad():
            rows = rows_of(module, x)
            self.own.add(rows, rows.outputs(y.detach()), _bias(module))

    def count(self, grad: Tensor, keep: bool) -> None:
        self.sums.merge(self.own, keep)


class _Few(_Use):
    """Holds the rows, where they are smaller than the weight: a cell of a recurrent network has many uses."""

    def __init__(self, sums: Sums, module: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(sums, module)
        self.kept = _keep(x.detach(), y.detach().clone())  # y may be changed in place

    def count(self, grad: Tensor, keep: bool) -> None:
        x, y = _saved(self.kept)
        rows = rows_of(self.module, x)
        self.sums.add(rows, rows.outputs(y), _bias(self.module))


class _WithSurprise(_Use):
    """Holds the inputs, as the layer itself does; its output is made once more."""

    def __init__(self, sums: Sums, module: nn.Module, x: Tensor, dtype: torch.dtype, scale: Scale | None) -> None:
        super().__init__(sums, module)
        self.kept, self.dtype, self.scale = _keep(x.detach()), dtype, scale

    def count(self, grad: Tensor, keep: bool) -> None:
        (x,), sums, errors_of = _saved(self.kept), self.sums, self.sums.wants.grad
        rows = rows_of(self.module, x)
        if errors_of is None or not rows.n:
            return
        scale = 1.0 if self.scale is None else self.scale() if callable(self.scale) else self.scale
        weight: Tensor = self.module.weight.detach()  # type: ignore[operator]
        y = rows.read(weight, self.dtype)
        sums.add(rows, y)
        surprise = grad.to(sums.dtype) * (rows.n / scale)
        errors = errors_of(y.to(sums.dtype).movedim(1, -1), rows.outputs(surprise).movedim(1, -1))
        sums.add_grad(rows, errors.movedim(-1, 1).to(self.dtype))


def _bias(module: nn.Module) -> Tensor | None:
    bias = module._parameters.get("bias")
    return None if bias is None else bias.detach()


def _few(x: Tensor, y: Tensor, weight: Tensor) -> bool:
    return x.numel() + y.numel() < weight.numel()


class _Keep(torch.autograd.Function):
    """Saves tensors as autograd does: activation checkpointing drops them and finds them again."""

    @staticmethod
    def forward(ctx: FunctionCtx, anchor: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return torch.empty(0)


def _keep(*tensors: Tensor) -> Tensor:
    """Save `tensors` for as long as what is returned is held; in torch 2.11 its node alone does not hold them."""
    with torch.enable_grad():
        return cast(Tensor, _Keep.apply(torch.empty(0, requires_grad=True), *tensors))


def _saved(kept: Tensor) -> tuple[Tensor, ...]:
    """Return what was given to `_keep`; recomputed where it was dropped."""
    return cast(Any, kept.grad_fn).saved_tensors


# -- what torch knows of the pass it is in -----------------------------------------------------------------------------


def _graph_is_kept() -> bool:
    """Return whether the graph of the present backward pass may be used again (`retain_graph`)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def _recomputing() -> bool:
    """Return whether non-reentrant checkpointing is recomputing: no backward pass will come through what is run now,
    since it goes through the graph of the first run.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    name = torch.utils.checkpoint._recomputation_hook.__name__
    return hooks is not None and name in getattr(hooks[0], "__qualname__", "")


# -- the hook on the model ---------------------------------------------------------------------------------------------


class _Hook:
    """A forward hook that knows its watcher weakly, and none once it is copied or pickled with the model."""

    def __init__(self, watcher: Watcher | None) -> None:
        self.watcher = (lambda: None) if watcher is None else weakref.ref(watcher)
        # compilers leave the hook as it is: what it counts in is theirs to break, not to trace
        self.see = _see if watcher is None else torch.compiler.disable(_see)

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
        if torch.is_grad_enabled():
            self.see(self, module, args, kwargs, y)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, (None,)


def _see(hook: _Hook, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any) -> None:
    watcher = hook.watcher()
    x = args[0] if args else kwargs.get("input")
    if watcher is not None and isinstance(x, Tensor) and isinstance(y, Tensor):
        watcher.see(module, x, y)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
