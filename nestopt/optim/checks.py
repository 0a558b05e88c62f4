"""What an optimizer can't run: refused by name, before anything has changed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.core.inputs import INPUTS, request_of
from nestopt.core.level import Level
from nestopt.core.part import FINITE
from nestopt.core.schedule import is_scheduled
from nestopt.optim.metrics import finite
from nestopt.optim.views import Split, in_pieces

log = logging.getLogger("nestopt")


def names(group: dict[str, Any], index: int) -> list[str]:
    """Return the names of the parameters of group `index`; their places where none were given, or others are there."""
    given, count = group.get("param_names"), len(group["params"])
    return given if given and len(given) == count else [f"group {index}, parameter {i}" for i in range(count)]


def check_ordered(params: object) -> None:
    """Raise TypeError for parameters in a set, whose order is another in each process and each run."""
    if isinstance(params, set | frozenset):
        raise TypeError(
            f"parameters are in a {type(params).__name__}, which has no order that a checkpoint could rely on; "
            "give a list of them"
        )


def named_as(groups: Sequence[dict[str, Any]], group: dict[str, Any], model: nn.Module | None) -> dict[str, Any]:
    """Return `group`, its parameters named if those of `groups` are: as `model` calls them, or by their places."""
    params = group["params"]
    params = [params] if isinstance(params, Tensor) else list(params)
    named = "param_names" in group or not any("param_names" in other for other in groups)
    if named or not all(isinstance(param, Tensor) for param in params):
        return {**group, "params": params}
    known = {param: name for name, param in model.named_parameters()} if model is not None else {}
    by_place = names({"params": params}, len(groups))
    return {
        **group,
        "params": [(known.get(param, place), param) for param, place in zip(params, by_place, strict=True)],
    }


def check_group(group: dict[str, Any]) -> None:
    """Raise ValueError for settings of a group that are out of range."""
    for key, value in group.items():
        if is_scheduled(value):
            raise TypeError(
                f"{key}={value!r} is not allowed in a parameter group: torch's schedulers change those; a stack's "
                "numbers may be schedules, as in nestopt.optimizer(model, momentum(beta=Schedule(...)))"
            )
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"lr has {lr.numel()} elements; a tensor learning rate must have 1")
    looked_at = not isinstance(lr, Tensor) or lr.device.type == "cpu"  # what is on an accelerator is not waited for
    if looked_at and not lr >= 0:
        raise ValueError(f"lr={lr!r} is not allowed; give a number, 0 or more")
    if not group["weight_decay"] >= 0:
        raise ValueError(f"weight_decay={group['weight_decay']!r} is not allowed; give a number, 0 or more")
    period = group.get("period", 1)
    if isinstance(period, bool) or not isinstance(period, int) or period < 1:
        raise ValueError(f"period={period!r} is not allowed; give a whole number of steps, 1 or more")


def check_parameters(group: dict[str, Any], index: int, level: Level, *, takes_complex: bool) -> None:
    """Raise ValueError for a parameter that comes twice, or that the level can't take."""
    needs_matrices, seen, view = "matrix" in level.needs, set(), group.get("view")
    if view is not None and not isinstance(view, Split):
        raise TypeError(f"view={view!r} is not a view; give nestopt.optim.Split(parts, dim)")
    if view is not None and view.stacked and INPUTS in level.needs:
        raise ValueError(f"{level.label} takes layer inputs, which are not split; leave out view={view!r}")
    for name, param in zip(names(group, index), group["params"], strict=True):
        if param in seen:
            raise ValueError(f"{name} is in the group twice; a tied weight is one parameter: give it once")
        seen.add(param)
        if not (param.is_floating_point() or (param.is_complex() and takes_complex and level.is_elementwise)):
            also = "; nestopt.optim.SGD, Adam and AdamW take complex ones, as torch's do" if param.is_complex() else ""
            raise ValueError(f"{name} is {param.dtype}; levels take real floating-point parameters{also}")
        if view is not None and not view.fits(param):
            raise ValueError(f"{name} has shape {tuple(param.shape)}, which is no matrix of {view.parts} equal parts")
        if needs_matrices and param.ndim < 2:
            raise ValueError(
                f"{level.label} takes matrices, and {name} has shape {tuple(param.shape)}; give such parameters "
                "another stack, or let nestopt.optimizer(model, ...) send them to `rest`"
            )


def check_inputs(group: dict[str, Any], level: Level, *, capturable: bool) -> None:
    """Raise ValueError for a level that asks for layer inputs where it can't have them, or not in time."""
    wants = request_of(level)
    if wants is None:
        return
    if capturable:
        raise ValueError(f"{level.label} takes layer inputs, which capturable=True does not hand on; leave it out")
    if wants.grad is not None and group["maximize"]:
        raise ValueError(
            f"{level.label} makes its steps of what the backward pass brings, which maximize=True does not turn; "
            "negate the loss instead"
        )


def raise_nonfinite(groups: Sequence[dict[str, Any]], grads: Sequence[Sequence[Tensor | None]]) -> None:
    """Raise RuntimeError naming the gradients that are not finite."""
    bad = [
        name
        for index, (group, own) in enumerate(zip(groups, grads, strict=True))
        for name, grad in zip(names(group, index), own, strict=True)
        if grad is not None and not grad.isfinite().all()
    ]
    more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
    raise RuntimeError(f"gradients with an infinity or a NaN: {', '.join(bad[:5])}{more}; nothing has been changed")


def check_finite(
    groups: Sequence[dict[str, Any]], levels: Sequence[Level], grads: Sequence[Sequence[Tensor | None]]
) -> None:
    """Raise RuntimeError for gradients that break a level which says so; those on an accelerator are not waited for."""
    asked = [
        [grad if FINITE in level.needs and _is_at_hand(grad) else None for grad in own]
        for level, own in zip(levels, grads, strict=True)
    ]
    if not finite(asked):
        raise_nonfinite(groups, asked)


def _is_at_hand(grad: Tensor | None) -> bool:
    """Return whether the host can look at a gradient without waiting for a device or other processes."""
    return grad is not None and grad.device.type == "cpu" and not in_pieces(grad)


def check_whole(group: dict[str, Any], index: int, level: Level, grads: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError for a parameter in pieces that the level must see whole."""
    if level.is_elementwise:
        return
    for name, param, grad in zip(names(group, index), group["params"], grads, strict=True):
        if grad is not None and in_pieces(param):
            raise RuntimeError(
                f"{name} lies over several processes (a DTensor), and {level.label} must see it whole: step with "
                "nestopt.optim.shard(optimizer, mesh), or let nestopt train do so"
            )


def check_gradients(group: dict[str, Any], index: int, grads: Sequence[Tensor | None]) -> None:
    """Raise RuntimeError for a gradient of group `index` that no level takes."""
    for i, (param, grad) in enumerate(zip(group["params"], grads, strict=True)):
        if grad is None:
            continue
        if grad.layout is not torch.strided:
            raise RuntimeError(
                f"{names(group, index)[i]} has a sparse gradient, which levels do not take; "
                "use sparse=False in its embedding"
            )
        if grad.shape != param.shape:
            raise RuntimeError(
                f"{names(group, index)[i]} has shape {tuple(param.shape)}, its gradient {tuple(grad.shape)}; "
                "compute the gradient anew after a parameter has changed its shape"
            )


def warn_unseen(level: Level, names: Sequence[str]) -> None:
    """Say of which parameters a level that asks for layer inputs has none."""
    log.warning(
        "%s has not seen the inputs of %s: there it does without; optimizer.watch(model) shows it those of linear and "
        "convolution layers",
        level.label,
        ", ".join(names),
    )
