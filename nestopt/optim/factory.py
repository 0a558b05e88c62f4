"""`nestopt.optimizer`: from a model and a spec to an optimizer, with every parameter where it belongs."""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from nestopt.config import Config, load
from nestopt.config.errors import ConfigError
from nestopt.config.load import names_file
from nestopt.config.schema import GroupConfig, OptimizerConfig
from nestopt.core.level import Level
from nestopt.core.part import nearest
from nestopt.optim.optimizer import Nested
from nestopt.optim.roles import Role, roles, unnamed

log = logging.getLogger("nestopt")

Chooser = Callable[[str, Tensor], bool]
Route = Literal["auto", "hidden_matrices", "all"] | Chooser


def optimizer(
    model_or_params: nn.Module | Iterable[Any],
    spec: Any = "adamw",
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    rest: Any = None,
    *,
    groups: Sequence[Mapping[str, Any] | GroupConfig] | None = None,
    route: Route | None = None,
    strict: bool | None = None,
    maximize: bool = False,
) -> Nested:
    """An optimizer that runs `spec` on a model.

    A stack that needs matrices (muon) gets the hidden matrices: not embeddings, the output layer, norms, biases,
    depthwise convolutions, or tensors of more dimensions; those go to `rest`. Any other stack gets everything. Tied
    weights count once. `print(optimizer.explain())` shows the outcome and why.

    Args:
        model_or_params: a model (best: roles are read off its modules), parameters, or named parameters.
        spec: a level, its name, a mapping, a list (a chain), a config section, or the path of a YAML file.
        lr: of the stack. Default: the file's, or 1e-3.
        weight_decay: decoupled. Default: the file's, or 0.
        rest: the level for the others, or `{"stack": …, "lr": …, "weight_decay": …}` where they differ from the
            stack's. Default: the file's, or "adamw".
        groups: exceptions, each `{"match": regex of names, "stack": …, "lr": …, "weight_decay": …, "period": …}` with
            only what differs; the first that matches counts. Without a `stack`, it is routed as the others are.
        route: `"auto"` (as above), `"hidden_matrices"` (only those to the stack), `"all"`, or a function of
            (name, tensor) that says whether the stack gets it.
        strict: raise if the stack gets no parameter (else it is logged as a warning). Default: the file's, or False.
        maximize: ascend.

    Raises:
        ConfigError: a spec that can't be built, or a group that matches nothing.
        ValueError: nothing to optimize; `strict` and nothing for the stack.
    """
    settings = _settings(spec, lr, weight_decay, rest, groups, route, strict)
    named = _named(model_or_params)
    if not named:
        raise ValueError("nothing to optimize: no parameter requires a gradient")
    known = roles(model_or_params) if isinstance(model_or_params, nn.Module) else unnamed(iter(named.items()))
    chosen = route if callable(route) else None
    rate = lr if isinstance(lr, Tensor) else settings.lr
    places = {name: _place(name, param, known[name], settings, chosen) for name, param in named.items()}
    _check(settings, places.values(), named)
    made: dict[tuple[int, int, int], dict[str, Any]] = {}
    for name, place in places.items():
        group = made.setdefault(
            place.order,
            {
                "params": [],
                "why": [],
                "stack": place.stack,
                "lr": rate if place.lr is None else place.lr,
                "weight_decay": settings.weight_decay if place.weight_decay is None else place.weight_decay,
                "period": place.period,
                "maximize": maximize,
            },
        )
        group["params"].append((name, named[name]))
        group["why"].append(place.why)
    in_order = [made[order] for order in sorted(made)]
    return Nested(in_order, settings.stack, rate, settings.weight_decay, maximize=maximize)


def _settings(
    spec: Any, lr: Any, weight_decay: Any, rest: Any, groups: Any, route: Any, strict: Any
) -> OptimizerConfig:
    """All that was given, as one config section; arguments go before what a file says."""
    if names_file(spec):
        spec = load(spec)
    if isinstance(spec, Config):
        spec = spec.optimizer
    if isinstance(spec, Mapping) and "level" not in spec:
        spec = OptimizerConfig(**spec)
    if isinstance(spec, OptimizerConfig):
        given = {name: getattr(spec, name) for name in OptimizerConfig.model_fields}
    else:
        given = {"stack": spec, "lr": 1e-3, "rest": "adamw", "strict": False}
    extra = {"weight_decay": weight_decay, "rest": rest, "groups": groups, "strict": strict}
    given |= {key: value for key, value in extra.items() if value is not None}
    if isinstance(route, str):
        given["route"] = route
    if lr is not None and not isinstance(lr, Tensor):
        given["lr"] = lr
    return OptimizerConfig(**given)


def _named(source: nn.Module | Iterable[Any]) -> dict[str, Tensor]:
    """The parameters to optimize by name, tied ones once."""
    if isinstance(source, nn.Module):
        return {name: param for name, param in source.named_parameters() if param.requires_grad}
    if isinstance(source, Tensor):
        raise TypeError("one tensor is no list of parameters; give [tensor]")
    named: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for i, item in enumerate(source):
        if isinstance(item, Mapping):
            raise TypeError(
                "parameter groups are for nestopt.optim.Nested; here give a model, or parameters and groups=[…]"
            )
        name, param = item if isinstance(item, tuple) else (f"parameter {i}", item)
        if not param.requires_grad or param in seen:
            continue
        if name in named:
            raise ValueError(f"two parameters are called {name!r}; names must differ")
        seen.add(param)
        named[name] = param
    return named


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a parameter goes: to the stack, to the rest, or to a group's own stack. None: as the optimizer says."""

    kind: int
    stack: Level
    lr: float | None
    weight_decay: float | None
    period: int
    why: str
    exception: int = 0
    """The number of the group it matches, from 1."""

    @property
    def order(self) -> tuple[int, int, int]:
        """Of its parameter group among the others: those of the exceptions come last."""
        return self.exception, self.kind, self.period


_STACK, _REST, _OWN = 0, 1, 2


def _place(name: str, param: Tensor, role: Role, settings: OptimizerConfig, chosen: Chooser | None) -> _Place:
    place = _routed(name, param, role, settings, chosen)
    for number, group in enumerate(settings.groups, start=1):
        if not re.search(group.match, name):
            continue
        why = f"matches {group.match!r}"
        if group.stack is not None:
            place = _Place(_OWN, group.stack, None, None, role.period, why)
        else:
            place = dataclasses.replace(place, why=f"{why}; {place.why}")
        own = {key: getattr(group, key) for key in ("lr", "weight_decay", "period")}
        given = {key: value for key, value in own.items() if value is not None}
        return dataclasses.replace(place, exception=number, **given)
    return place


def _routed(name: str, param: Tensor, role: Role, settings: OptimizerConfig, chosen: Chooser | None) -> _Place:
    if chosen is not None:
        takes, why = bool(chosen(name, param)), "as the route function says"
    elif settings.route == "all":
        takes, why = True, "route: all"
    elif settings.route == "auto" and "matrix" not in settings.stack.needs:
        takes, why = True, f"{settings.stack.label} takes any parameter"
    else:
        takes, why = role.hidden, role.why
    why += f"; its module has period {role.period}" if role.period > 1 else ""
    if takes:
        return _Place(_STACK, settings.stack, None, None, role.period, why)
    return _Place(_REST, settings.rest.stack, settings.rest.lr, settings.rest.weight_decay, role.period, why)


def _check(settings: OptimizerConfig, places: Iterable[_Place], named: Mapping[str, Tensor]) -> None:
    used, stack_used = {place.exception for place in places}, any(place.kind == _STACK for place in places)
    for i, group in enumerate(settings.groups):
        if i + 1 in used:
            continue
        if any(re.search(group.match, name) for name in named):
            problem = f"all parameters that {group.match!r} matches belong to groups before it; put it before them"
        else:
            hint = nearest(group.match, named) or f" Names look like {next(iter(named))!r}."
            problem = f"{group.match!r} matches no parameter that requires a gradient.{hint}"
        raise ConfigError(problem, f"groups[{i}].match", group.match)
    if not stack_used:
        only = ", as it takes hidden matrices only" if "matrix" in settings.stack.needs else ""
        text = f"{settings.stack.label} gets none of the {len(named)} parameters{only}"
        if settings.strict:
            raise ValueError(f"{text}; give another stack, a model whose roles can be seen, route= or groups=")
        log.warning("%s: print(optimizer.explain()) shows where they are", text)
