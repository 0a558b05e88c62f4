"""Where each parameter goes: to the stack, to the rest, or to the stack of an exception; and with which settings."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor

from nestopt.config.errors import ConfigError
from nestopt.config.schema import GroupConfig, OptimizerConfig
from nestopt.core.inputs import INPUTS
from nestopt.core.level import Level
from nestopt.core.part import nearest
from nestopt.optim.routing.roles import Role

log = logging.getLogger("nestopt")

Chooser = Callable[[str, Tensor], bool]

STACK, REST, OWN = 0, 1, 2
WHOLE = (1, 0, False)
"""The view of a parameter as the one matrix that it is."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Attributes:
    kind: whether it goes to the stack, to the rest, or to a group's own stack.
    stack: that level.
    lr, weight_decay: None is as the optimizer says.
    period: steps between two changes of the parameter.
    why: in words.
    exception: the number of the group it matches, from 1; 0 is none.
    view: of how many matrices it consists, along which dimension, and whether it is `[in, out]`.
    scale: what the learning rate is multiplied with, as its layer says.
    """

    kind: int
    stack: Level
    lr: float | None
    weight_decay: float | None
    period: int
    why: str
    exception: int = 0
    view: tuple[int, int, bool] = WHOLE
    scale: float = 1.0


def place(
    name: str, param: Tensor, role: Role, settings: OptimizerConfig, chosen: Chooser | None, layer: int, top: int
) -> Place:
    """Say where one parameter goes, which is in layer `layer` of 0 … `top`."""
    found = _routed(name, param, role, settings, chosen)
    own_view = own_rate = own_decay = None
    for number, group in enumerate(settings.groups, start=1):
        if re.search(group.match, name):
            found, own_view, own_rate = _excepted(found, group, number, role), group.view, group.lr
            own_decay = group.weight_decay
            break
    # one number is no weight whose size a decay keeps small: it would draw it to 0, and a rate's logarithm is one
    if param.numel() == 1 and own_decay is None and (settings.weight_decay or settings.rest.weight_decay):
        found = dataclasses.replace(found, weight_decay=0.0)
    view = WHOLE
    if own_view is not None and _seen_as_matrix(found.stack, param):
        view = own_view.split, own_view.dim, own_view.transposed
    elif own_view is None and not found.stack.needs.isdisjoint(("matrix", "shape")):
        # what a layer was shown is not split; kernels are shown as they are to levels that don't ask for matrices
        parts, turned = role.parts, role.transposed and (param.ndim == 2 or "matrix" in found.stack.needs)
        view = (1, 0, turned) if INPUTS in found.stack.needs or parts == 1 else (parts, role.dim, turned)
    if view[0] > 1 or view[2]:
        seen = f"seen as {view[0]} matrices" + ", transposed" * view[2] if view[0] > 1 else "seen transposed"
        found = dataclasses.replace(found, view=view, why=f"{found.why}; {seen}")
    scale = settings.layer_decay ** (top - layer)
    if scale != 1 and own_rate is None:
        why = f"{found.why}; layer {layer} of 0…{top}, lr × {scale:.3g}"
        found = dataclasses.replace(found, scale=scale, why=why)
    return found


def _seen_as_matrix(level: Level, param: Tensor) -> bool:
    """Return whether `level` does with the entries of `param` anything but one by one."""
    return param.ndim > 1 and not level.is_elementwise


def _excepted(found: Place, group: GroupConfig, number: int, role: Role) -> Place:
    why = f"matches {group.match!r}"
    if group.stack is not None:
        found = Place(OWN, group.stack, None, None, role.period, why)
    else:
        found = dataclasses.replace(found, why=f"{why}; {found.why}")
    own = {key: getattr(group, key) for key in ("lr", "weight_decay", "period")}
    given = {key: value for key, value in own.items() if value is not None}
    return dataclasses.replace(found, exception=number, **given)


def _routed(name: str, param: Tensor, role: Role, settings: OptimizerConfig, chosen: Chooser | None) -> Place:
    needs = settings.stack.needs
    if chosen is not None:
        takes, why = bool(chosen(name, param)), "as the route function says"
    elif settings.route == "all":
        takes, why = True, "route: all"
    elif settings.route == "auto" and INPUTS in needs:
        takes = role.layer and (role.hidden or "matrix" not in needs)
        unseen = role.hidden and not role.layer
        why = f"{role.why}, of no layer whose inputs are seen" if unseen else role.why
        if takes and not role.hidden:
            why += f", and {settings.stack.label} takes the weights of all layers"
    elif settings.route == "auto" and "matrix" not in needs:
        takes, why = True, f"{settings.stack.label} takes any parameter"
    else:
        takes, why = role.hidden, role.why
    why += f"; its module has period {role.period}" if role.period > 1 else ""
    if takes:
        return Place(STACK, settings.stack, None, None, role.period, why)
    return Place(REST, settings.rest.stack, settings.rest.lr, settings.rest.weight_decay, role.period, why)


def check(settings: OptimizerConfig, places: Mapping[str, Place], named: Mapping[str, Tensor]) -> None:
    """Raise for a group that changes nothing, a view that does not divide, and (in strict mode) an idle stack."""
    for i, group in enumerate(settings.groups):
        mine = [name for name, found in places.items() if found.exception == i + 1]
        if not mine:
            raise _unmatched(group, i, named)
        if group.view is not None:
            _check_view(group, f"groups[{i}].view", {name: (places[name], named[name]) for name in mine})
    trained = [name for name, param in named.items() if param.requires_grad]
    if any(places[name].kind == STACK for name in trained):
        return
    text = f"{settings.stack.label} gets none of the {len(trained)} parameters{_only(settings.stack.needs)}"
    if settings.strict:
        raise ValueError(f"{text}; give another stack, a model whose roles can be seen, route= or groups=")
    log.warning("%s: print(optimizer.explain()) shows where they are", text)


def _only(needs: Iterable[str]) -> str:
    if INPUTS in needs:
        return ", as it takes the weights of layers only"
    return ", as it takes hidden matrices only" if "matrix" in needs else ""


def _unmatched(group: GroupConfig, i: int, named: Mapping[str, Tensor]) -> ConfigError:
    if any(re.search(group.match, name) for name in named):
        problem = f"all parameters that {group.match!r} matches belong to groups before it; put it before them"
    else:
        hint = nearest(group.match, named) or f" Names look like {next(iter(named))!r}."
        problem = f"{group.match!r} matches no parameter that can be trained.{hint}"
    return ConfigError(problem, f"groups[{i}].match", group.match)


def _check_view(group: GroupConfig, path: str, mine: Mapping[str, tuple[Place, Tensor]]) -> None:
    assert group.view is not None
    split, dim = group.view.split, group.view.dim
    shown = {name: param for name, (found, param) in mine.items() if _seen_as_matrix(found.stack, param)}
    if not shown:
        labels = ", ".join(sorted({found.stack.label for found, _ in mine.values()}))
        problem = f"changes nothing: what {group.match!r} matches goes to {labels}, which works entry by entry there"
        raise ConfigError(problem, path, group.view)
    for name, param in shown.items():
        shape = "×".join(map(str, param.shape))
        if param.ndim > 2 and split > 1:
            raise ConfigError(f"only matrices can be split, and {name} is {shape}", path, group.view)
        if param.shape[dim] % split:
            problem = f"{split} does not divide dimension {dim} of {name}, which is {shape}"
            raise ConfigError(problem, f"{path}.split", split)
