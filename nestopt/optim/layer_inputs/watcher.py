"""Watching what layers are shown, for levels that want it (`dgd`): sums over rows, taken by forward hooks."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nestopt.core.device import by_contract, no_autocast
from nestopt.core.inputs import InputRequest, request_of
from nestopt.core.level import Level
from nestopt.optim.layer_inputs.known import Arrived, Known
from nestopt.optim.layer_inputs.rows import is_transposed, multiplies
from nestopt.optim.layer_inputs.sums import Sums, Totals
from nestopt.optim.layer_inputs.uses import Few, Many, Scale, Use, WithSurprise, few


class Seen(Protocol):
    """Whoever knows what parameters were multiplied with."""

    def totals(self, param: Tensor) -> Totals | None:
        """Return the sums over what the layers of a parameter were shown for its gradient; None if nothing."""

    def name(self, param: Tensor) -> str | None:
        """Return what a parameter is called; None if nobody looks for it."""


class Watcher:
    r"""Sums what the layers of a model are shown, for each parameter whose level wants it.

    Watched are the weights of `nn.Linear`, `nn.Conv1d`, `2d` and `3d`, and transformers' `Conv1D` (subclasses too, but
    for those with a `forward` of their own). Sums share the life of the parameter's `.grad`: a use of the layer counts
    when, and as often as, a backward pass comes through its output and adds to that gradient; they are added up as long
    as it is, and gone when it is set to None or zero, or another tensor is put in its place. So gradient accumulation
    and tied weights sum over uses, `autograd.grad` to a layer's inputs adds nothing, recomputation under activation
    checkpointing does not count again, and a forward pass in evaluation or under `no_grad` costs nothing and leaves
    nothing.

    $W X^\top X = Y^\top X$ is taken from the layer's own output as it passes: one more product of the weight's size per
    use, in the dtype that the layer ran in (autocast's), summed in float32 or wider. Between forward and backward a use
    holds no more than the weight's size, and no activation. The output itself is not touched, so that what follows may
    work in place.

    Where a group of processes is up, a step takes the sums of all of them, as it does the gradients: all must step
    together, with the same layers. `torch.compile` breaks its graph at each watched layer; watch before the first call
    of a compiled model, which otherwise runs on without the hooks. A layer used through `torch.nn.functional` with its
    weight is not seen.

    The model knows the watcher by weak references: it does not keep it alive, and a copied, pickled or saved model is
    not watched. A copy of a watcher watches nothing.

    Args:
        model: whose layers to watch; None for none.
        levels: the level of each parameter. Vectors, and parameters whose level wants no inputs, are left out.
        loss_scale: what the mean loss was multiplied with before `backward`, a number or a function that gives it:
            GradScaler's `get_scale`, or 1/k with k micro-batches. Only levels whose `wants` depend on it (a nonlinear
            `ggd`) use it. Default: 1, with float16 layers refused, whose loss is always scaled.
        group: the processes whose gradients are averaged. Default: those of a DistributedDataParallel that is given as
            the model, else all.

    Attributes:
        elsewhere: whether an engine keeps gradients elsewhere than in `.grad`: sums then last until they are taken or
            forgotten.

    Raises:
        ValueError: levels of one stack want different sums, or one of them stands on a clock.
    """

    elsewhere: bool = False

    def __init__(
        self,
        model: nn.Module | None,
        levels: Mapping[Tensor, Level],
        *,
        loss_scale: Scale | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.loss_scale = loss_scale
        if group is None and isinstance(model, nn.parallel.DistributedDataParallel):
            group = model.process_group
        self._group, self._alike = group, False
        self._known: dict[Tensor, Known] = {}
        self._of_module: weakref.WeakKeyDictionary[nn.Module, Known] = weakref.WeakKeyDictionary()
        self._passes: dict[int, dict[Known, Arrived]] = {}
        self._names: dict[Tensor, str] = {}
        self._model = None if model is None else weakref.ref(model)
        self._handles: list[RemovableHandle] = []
        self._remove = weakref.finalize(self, _remove, self._handles)
        self.add(levels)

    def add(self, levels: Mapping[Tensor, Level]) -> None:
        """Watch the layers of more parameters."""
        # a parameter that DeepSpeed has cut up is empty, and says what it was
        asked = {
            param: request_of(level)
            for param, level in levels.items()
            if len(getattr(param, "ds_shape", param.shape)) > 1
        }
        new = {param: Known(param, wants) for param, wants in asked.items() if wants is not None}
        self._known |= new
        model = None if self._model is None else self._model()
        if model is None:
            return
        self._names = {param: name for name, param in model.named_parameters()}
        hook = _Hook(self)
        for module in model.modules():
            if multiplies(module) and (weight := module._parameters.get("weight")) in new:
                assert weight is not None
                known = new[weight]
                known.sums.groups, known.sums.transposed = int(getattr(module, "groups", 1)), is_transposed(module)
                if hasattr(weight, "to_local"):  # a DTensor: FSDP2 puts the whole weight in its place for a while
                    self._of_module[module] = known
                # before other hooks, which may change the output
                self._handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))

    def ask(self, levels: Mapping[Tensor, Level]) -> None:
        """Sum from now on what these levels of the parameters want, where it is something else."""
        for param, level in levels.items():
            known, wants = self._known.get(param), request_of(level)
            if known is not None and wants is not None and wants != known.sums.wants:
                known.clear()
                known.sums.wants = wants

    def totals(self, param: Tensor) -> Totals | None:
        """Return the sums that belong to the gradient of `param`, over all processes; None if there are none."""
        return self.totals_of(param, param.shape, self._processes())

    def totals_of(self, param: Tensor, shape: torch.Size, comm: Any) -> Totals | None:
        """Do as `totals` for a parameter of this true shape, over the processes of `comm` (None: this one).

        All processes must ask for the same parameter. Rows are counted where they were seen, so that means are over all
        rows, however they were shared.
        """
        known = self._known.get(param)
        if known is None:
            return None
        now = _present_pass()
        if now < 0:
            self._passes.clear()  # of passes that broke off
        elif (arrived := self._passes.get(now, {}).pop(known, None)) is not None:
            known.settle(arrived)
        if not self.elsewhere:
            known.use()
        found: Totals | None = None
        if comm is not None and dist.get_world_size(comm) > 1:
            found = known.sums.totals_of_all(shape, param.device, lambda tensor: dist.all_reduce(tensor, group=comm))
        elif known.sums.n:
            found = known.sums.totals(param.device)
        if self.elsewhere:
            known.clear()
        return found

    def name(self, param: Tensor) -> str | None:
        """Return what a parameter that wants inputs is called; None for another."""
        other = f"a parameter of shape {list(param.shape)} that is not the model's"
        return self._names.get(param, other) if param in self._known else None

    def _processes(self) -> dist.ProcessGroup | None:
        """Return the group to add sums up over; at the first step raise RuntimeError if its processes are not alike."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(self._group) < 2:
            return None
        group = self._group or dist.group.WORLD
        if not self._alike:
            mine = [(self._names.get(param), tuple(param.shape)) for param in self._known]
            found: list[Any] = [None] * dist.get_world_size(group)
            dist.all_gather_object(found, mine, group=group)
            for rank, other in enumerate(found):
                if other != mine:
                    raise RuntimeError(
                        f"process {rank} watches the inputs of {len(other)} layers that are not the {len(mine)} of "
                        "this process, and they would be added up; give watch(model, group=…) the processes that share "
                        "its gradients"
                    )
            self._alike = True
        return group

    def forget(self) -> None:
        """Forget what was summed, as its gradients are cleared."""
        self._passes.clear()
        for known in self._known.values():
            known.clear()

    def sums_of(self, known: Known) -> Sums:
        """Return where the rows of the present backward pass are added up."""
        if self.elsewhere:
            return known.sums
        now = _present_pass()
        if now not in self._passes:
            self._passes[now] = {}
            for each in self._known.values():
                if each.gradient is not None and each.gradient[0]() is not each.param.grad:
                    each.clear()
            # at the end of all that is queued: DistributedDataParallel writes what it has reduced into the gradients
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(partial(self._end, now)))
        if known not in self._passes[now]:
            self._passes[now][known] = Arrived(known)
        return self._passes[now][known].sums

    def _end(self, graph_pass: int) -> None:
        with torch.no_grad():
            for known, arrived in self._passes.pop(graph_pass, {}).items():
                known.settle(arrived)

    def remove(self) -> None:
        """Take the hooks off the model. What was summed until now can still be taken."""
        self._remove()

    def __reduce__(self) -> tuple[Any, ...]:
        return Watcher, (None, {})

    def see(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        weight = module._parameters.get("weight")
        known = self._known.get(weight) if weight is not None else None
        if known is None:
            known = self._of_module.get(module)
        if weight is None or known is None or not (weight.requires_grad and y.requires_grad):
            return
        wants, add_to = known.sums.wants, partial(self.sums_of, known)
        again = _recomputing()
        with no_autocast(y.device):
            if wants.grad is not None:
                self._check_scale(wants, module, weight, y)
                use: Use = WithSurprise(add_to, module, x, y.dtype, self.loss_scale)
            elif few(x, y, weight):
                use = Few(add_to, module, x, y)
            elif again:
                return
            else:
                use = Many(add_to, module, x, y, Sums(wants, known.sums.dtype))
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


def levels_of(optimizer: Any) -> dict[Tensor, Level]:
    """Return the level of each parameter of a `Nested`."""
    return {param: optimizer.level(group) for group in optimizer.param_groups for param in group["params"]}


# -- what torch knows of the pass it is in -----------------------------------------------------------------------------


def _present_pass() -> int:
    """Return the number of the backward pass that this thread is in; -1 outside."""
    return torch._C._current_graph_task_id()


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


def shown(totals: Totals | None) -> bool:
    """Return whether there were rows in any process; waits for the device where there are several."""
    if totals is None or not (dist.is_available() and dist.is_initialized()):
        return totals is not None
    with by_contract("agree"):
        return bool(totals["n"])


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
