"""What levels of weights do after an optimizer's step, and the weights to evaluate with in the place of the trained."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map
from nestopt.core.weights import OfWeights, around, at
from nestopt.optim.execute.update import TRAINED, Executor, Slot, placed
from nestopt.optim.views import back, in_pieces, layout, local, matrix_view, work_dtype

Group = dict[str, Any]


def check_levels(levels: Sequence[Level], *, capturable: bool) -> None:
    """Raise ValueError where levels of weights average over processes in some groups, and in others don't; or for one
    in a step without a host.
    """
    if capturable and levels[-1].of_weights:
        raise ValueError(f"{levels[-1].label} moves weights by a count on the host; leave out capturable=True")
    across = [any(level.across_processes for _, level in around(own)) for own in levels]
    if any(across) and not all(across):
        i = across.index(False)
        raise ValueError(
            f"param_groups[{i}].stack: {levels[i].label} keeps its weights to one process, and the stack of group "
            f"{across.index(True)} averages its over all (across_processes=True), so that models would drift apart; "
            "give it a nest of weights with across_processes=True, too"
        )


def after_step(
    level: Level, group: Group, executors: Sequence[Executor], lr: float | Tensor, comm: dist.ProcessGroup | None
) -> None:
    """Let the levels of weights of one group act, after its executors have updated the parameters."""
    period = group.get("period", 1)
    due = [(own, int(own.count) // period) for own in executors if int(own.count) % period == 0]
    for path, own in reversed(list(around(level))) if due else ():
        cells = [
            (cell, step)
            for executor, step in due
            if own.acts(step)
            for slot in executor.slots
            for cell in _cells(level, slot, path)
        ]
        weights = [cell.weights for cell, _ in cells]
        if own.across_processes and cells and dist.is_available() and dist.is_initialized():
            weights = _mean(own, weights, [cell.state for cell, _ in cells], comm)
        bound = {step: bind(own, step=step) for step in {step for _, step in cells}}
        for (cell, step), shown in zip(cells, weights, strict=True):
            cell.put(bound[step], shown, Signal(step, shown, lr))


class _Cell:
    """One tensor, as the level sees it: a parameter, or one of the matrices that it consists of."""

    def __init__(self, slot: Slot, weights: Tensor, state: State, part: int | None) -> None:
        self.slot, self.weights, self.state, self.part = slot, weights, state, part

    def put(self, level: OfWeights, shown: Tensor, signal: Signal) -> None:
        new = level.after_update_(shown, self.state, signal)
        if new is self.weights:
            return
        param, view = local(self.slot.param), self.slot.view
        if self.part is None:
            param.copy_(back(new, param, view))
        else:
            seen = matrix_view(param, level, view)
            seen[self.part] = new
            param.copy_(back(seen, param, view))


def _cells(level: Level, slot: Slot, path: tuple[str, ...]) -> Iterator[_Cell]:
    param, view = local(slot.param), slot.view
    if not param.numel():
        return
    tree = tree_map(local, slot.tree) if in_pieces(slot.param) else slot.tree
    seen, state = matrix_view(param.to(work_dtype(param)), level, view), at(tree, path)
    if view is None or not view.stacked:
        yield _Cell(slot, seen, state, None)
        return
    for part in range(view.parts):
        yield _Cell(slot, seen[part], tree_map(lambda leaf, i=part: leaf[i], state), part)


def _mean(
    level: OfWeights, weights: Sequence[Tensor], states: Sequence[State], comm: dist.ProcessGroup | None
) -> list[Tensor]:
    """Return the means of `weights` over the processes: one exchange of a few numbers, and one of all weights a dtype.

    Raises:
        RuntimeError: the processes have other tensors, or slow weights that differ; in all of them.
    """
    _check_agree(level, weights, states, comm)
    world, found = dist.get_world_size(comm), list(weights)
    for dtype in dict.fromkeys(tensor.dtype for tensor in weights):
        own = [i for i, tensor in enumerate(weights) if tensor.dtype == dtype]
        flat = torch.cat([weights[i].reshape(-1) for i in own])
        dist.all_reduce(flat, group=comm)
        flat /= world
        for i, mean in zip(own, flat.split([weights[i].numel() for i in own]), strict=True):
            found[i] = mean.view(weights[i].shape)
    return found


def _check_agree(
    level: OfWeights, weights: Sequence[Tensor], states: Sequence[State], comm: dist.ProcessGroup | None
) -> None:
    bits = torch.zeros((), dtype=torch.int64, device=weights[0].device)
    for state in states:
        slow = state["slow"].contiguous()
        bits = bits * 31 + slow.view(torch.int64 if slow.dtype == torch.float64 else torch.int32).sum()
    numbers = torch.stack([torch.full_like(bits, sum(w.numel() for w in weights)), bits % (1 << 31)])
    ends = torch.cat([numbers, -numbers])
    dist.all_reduce(ends, op=dist.ReduceOp.MAX, group=comm)
    (count, bits_), (least, least_bits) = ends[:2].tolist(), (-ends[2:]).tolist()
    if count != least:
        raise RuntimeError(
            f"{level.label}: processes come to the average of their weights with {least} to {count} numbers; with "
            "across_processes=True every parameter must have a gradient in as many steps of each process"
        )
    if bits_ != least_bits:
        raise RuntimeError(
            f"{level.label}: the processes have other slow weights; with across_processes=True they must begin with "
            "the same model, and load the same checkpoint"
        )


# -- which weights a model has -----------------------------------------------------------------------------------------


class Weighted:
    """What an optimizer does about levels of weights, besides its steps."""

    param_groups: list[Group]
    state: Any
    level: Callable[[Group], Level]
    _comm: dist.ProcessGroup | None = None
    _evaluates: bool
    _model: weakref.ref[nn.Module] | None

    def average_over(self, group: dist.ProcessGroup) -> None:
        """Let levels of weights with `across_processes=True` average over these processes; by default over all."""
        self._comm = group

    @torch.no_grad()
    def eval(self) -> None:
        """Put the weights to evaluate with (averages, slow weights) into the parameters; others stay as they are.

        Steps are refused until `train` puts those back that are trained, bit for bit; meanwhile they are kept in
        `state`, and saved with it.
        """
        for group in self.param_groups:
            level = bind(self.level(group))
            if not level.of_weights:
                continue
            (_, first), *_ = around(level)
            view = None if level.is_elementwise else group.get("view")
            for param in group["params"]:
                state = self.state.get(param, {})
                if not state or TRAINED in state:
                    continue
                own, tree = local(param), placed(layout(level, param, view), state)
                tree = tree_map(local, tree) if in_pieces(param) else tree
                seen = matrix_view(own.to(work_dtype(own)), level, view)
                state[TRAINED] = param.detach().clone()
                own.copy_(back(first.evaluated(seen, tree), own, view))
        self._evaluates = evaluates(self.state)
        show_anew(self._model() if self._model is not None else None)

    @torch.no_grad()
    def train(self, mode: bool = True) -> None:
        """Put the weights that are trained back into the parameters, after `eval`; with `mode=False` do as `eval`."""
        if not mode:
            self.eval()
            return
        for group in self.param_groups:
            for param in group["params"]:
                if (trained := self.state.get(param, {}).pop(TRAINED, None)) is not None:
                    param.copy_(trained)
        self._evaluates = False
        show_anew(self._model() if self._model is not None else None)


def show_anew(model: nn.Module | None) -> None:
    """Let FSDP2 put the weights of a model together anew: some it may still have as they were."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # which whoever cuts a model up has imported
    for part in model.modules() if model is not None and fsdp is not None else ():
        if isinstance(part, fsdp.FSDPModule):
            part.reshard()


def evaluates(states: Mapping[Tensor, Mapping[str, Any]]) -> bool:
    """Return whether parameters hold the weights to evaluate with."""
    return any(TRAINED in state for state in states.values())
