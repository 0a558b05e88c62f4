"""`nestopt.optimizer`: from a model and a spec to an optimizer, with every parameter where it belongs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nestopt.config import Config, ConfigError, load
from nestopt.config.load import names_file
from nestopt.config.schema import GroupConfig, OptimizerConfig
from nestopt.core.inputs import INPUTS
from nestopt.core.part import nearest
from nestopt.core.weights import wrapped
from nestopt.optim.checks import check_ordered
from nestopt.optim.optimizer import Nested
from nestopt.optim.options import OPTIONS
from nestopt.optim.routing.layers import layers
from nestopt.optim.routing.place import REST, WHOLE, Chooser, Place, check, place
from nestopt.optim.routing.roles import roles, unnamed
from nestopt.optim.views import Split

Route = Literal["auto", "hidden_matrices", "all"] | Chooser
LayerOf = Callable[[str], int]

RATE = 1e-3
"""The learning rate where none is given."""


def optimizer(
    model_or_params: nn.Module | Iterable[Any],
    spec: Any = "adamw",
    lr: float | Tensor | None = None,
    weight_decay: float | None = None,
    rest: Any = None,
    *,
    groups: Sequence[Mapping[str, Any] | GroupConfig] | None = None,
    route: Route | None = None,
    layer_decay: float | None = None,
    layer_of: LayerOf | None = None,
    strict: bool | None = None,
    maximize: bool = False,
    **options: Any,
) -> Nested:
    r"""Make an optimizer that runs `spec` on a model.

    A stack that needs matrices (muon) gets the hidden matrices: not embeddings, the output layer, norms, biases,
    depthwise convolutions, or tensors of more dimensions; those go to `rest`, with the levels of weights that stand
    around the stack (a Lookahead) around it, too. One that needs the inputs of layers
    (dgd) gets the weights of linear and convolution layers, the output layer's too, and the optimizer watches the
    model. Any other stack gets everything. Tied weights count once. What is frozen now has its place too, costs
    nothing, and trains from when it is unfrozen. `print(optimizer.explain())` shows the outcome and why.

    Args:
        model_or_params: a model (best: roles are read off its modules), parameters, or named parameters.
        spec: a level, its name, a mapping, a list (a chain), a config section, or the path of a YAML file.
        lr: of the stack, and of `rest` where the rates of both are comparable (`Level.rates_as`: `adam` and
            `muon(scale="match_rms_adamw")`, say). Default: the file's, or 1e-3.
        weight_decay: decoupled. Default: the file's, or 0.
        rest: the level for the others, or `{"stack": …, "lr": …, "weight_decay": …}`. Default: the file's, or "adamw";
            its lr 1e-3, unless its rates are comparable to the stack's; its weight decay that of the stack.
        groups: exceptions, each `{"match": regex of names, "stack": …, "lr": …, "weight_decay": …, "period": …,
            "view": …}` with only what differs; the first that matches counts. Without a `stack`, it is routed as the
            others are. `"view": {"split": 3}` shows levels of matrices three matrices, one above the other (a fused
            QKV projection; that of `nn.MultiheadAttention` is known), and with `"dim": 1` side by side.
        route: `"auto"` (as above), `"hidden_matrices"` (only those to the stack), `"all"`, or a function of
            (name, tensor) that says whether the stack gets it.
        layer_decay: in (0, 1], the factor between the learning rates of a layer and of the next one: the output layer,
            or whatever comes last, has the whole rate, embeddings the lowest. How layers are found is said in
            `nestopt.optim.routing.layers`; a group's own `lr` is as given, and a tensor `lr` is copied for each layer.
            Default: the file's, or 1.
        layer_of: the number of a parameter's layer, 0 or more, by its name, where it can't be found or is not right.
        strict: raise if the stack gets no parameter (else it is logged as a warning). Default: the file's, or False.
        maximize: ascend.
        options: `on_nonfinite`, `capturable`, `compile` and `metrics`, as of `nestopt.optim.Nested`.

    Raises:
        ConfigError: a spec that can't be built, a group that matches nothing, a view that does not fit.
        ValueError: nothing to optimize; `strict` and nothing for the stack; layers that can't be told.
        TypeError: an argument that there is not.
    """
    for name in options.keys() - set(OPTIONS):
        hint = nearest(name, [*inspect.signature(optimizer).parameters, *OPTIONS])
        raise TypeError(f"nestopt.optimizer has no argument {name!r}.{hint}")
    settings = _settings(
        spec,
        {
            "lr": None if isinstance(lr, Tensor) else lr,
            "weight_decay": weight_decay,
            "rest": rest,
            "groups": groups,
            "route": route if isinstance(route, str) else None,
            "layer_decay": layer_decay,
            "strict": strict,
        },
    )
    named = _named(model_or_params)
    if not any(param.requires_grad for param in named.values()):
        raise ValueError("nothing to optimize: no parameter requires a gradient")
    model = model_or_params if isinstance(model_or_params, nn.Module) else None
    known = roles(model) if model is not None else unnamed(iter(named.items()))
    chosen = route if callable(route) else None
    depths = dict.fromkeys(named, 0)
    if settings.layer_decay != 1:
        depths = _depths(model, named, layer_of)
    elif layer_of is not None:
        raise ValueError("layer_of is given without a layer_decay below 1, which alone asks for layers")
    top = max(depths.values())
    rate = lr if isinstance(lr, Tensor) else settings.lr
    with _said_of(spec):
        places = {
            name: place(name, param, known[name], settings, chosen, depths[name], top) for name, param in named.items()
        }
        check(settings, places, named)
        built = Nested(
            _groups(places, named, rate, _rest_rate(settings, rate), settings.weight_decay, maximize),
            settings.stack,
            rate,
            settings.weight_decay,
            maximize=maximize,
            **options,
        )
    if model is not None:
        built.of_model(model)
    if model is not None and any(INPUTS in built.level(group).needs for group in built.param_groups):
        built.watch(model)
    return built


@contextmanager
def _said_of(spec: object) -> Iterator[None]:
    """Raise what is wrong as a ConfigError at its key, where it is a configuration that was given."""
    try:
        yield
    except ValueError as error:
        if not isinstance(spec, Config):
            raise
        found = error if isinstance(error, ConfigError) else ConfigError(str(error), "stack", spec.optimizer.stack)
        raise found.under("optimizer") from error


def _groups(
    places: Mapping[str, Place],
    named: Mapping[str, Tensor],
    rate: float | Tensor,
    rest: float | Tensor,
    weight_decay: float,
    maximize: bool,
) -> list[dict[str, Any]]:
    made: dict[tuple[Any, ...], dict[str, Any]] = {}
    for name, found in places.items():
        decay = weight_decay if found.weight_decay is None else found.weight_decay
        order = found.exception, found.kind, found.period, found.view, found.scale, -decay  # exceptions come last
        if order not in made:
            own = found.lr if found.lr is not None else rest if found.kind == REST else rate
            made[order] = {
                "params": [],
                "why": [],
                "stack": found.stack,
                "lr": own if found.scale == 1 else own * found.scale,
                "weight_decay": decay,
                "period": found.period,
                "maximize": maximize,
            }
            if found.view != WHOLE:
                made[order]["view"] = Split(*found.view)
        made[order]["params"].append((name, named[name]))
        made[order]["why"].append(found.why)
    return [made[order] for order in sorted(made)]


def _rest_rate(settings: OptimizerConfig, rate: float | Tensor) -> float | Tensor:
    """Return the learning rate of the rest, where none is given: the stack's says nothing of another kind of level."""
    if settings.rest.stack.rates_as == settings.stack.rates_as:
        return rate
    return torch.full_like(rate, RATE) if isinstance(rate, Tensor) else RATE


def _depths(model: nn.Module | None, named: Mapping[str, Tensor], layer_of: LayerOf | None) -> dict[str, int]:
    """Return the layer of each parameter; frozen ones count too, so that freezing changes no other's rate."""
    if layer_of is None:
        if model is None:
            raise ValueError("layer_decay needs a model, or layer_of: a function from names to the numbers of layers")
        return layers(model)
    found = {}
    for name in dict(model.named_parameters()) if model is not None else named:
        found[name] = number = layer_of(name)
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"layer_of({name!r}) gave {number!r}; give a whole number, 0 or more")
    return found


def _settings(spec: Any, given: Mapping[str, Any]) -> OptimizerConfig:
    """Return all that was given (is not None) as one config section; arguments go before what a file says."""
    if names_file(spec):
        spec = load(spec)
    if isinstance(spec, Config):
        spec = spec.optimizer
    if isinstance(spec, Mapping) and "level" not in spec:
        spec = OptimizerConfig(**spec)
    if isinstance(spec, OptimizerConfig):
        base = {name: getattr(spec, name) for name in OptimizerConfig.model_fields}
    else:
        base = {"stack": spec, "lr": RATE, "rest": "adamw", "strict": False}
    made = OptimizerConfig(**base | {key: value for key, value in given.items() if value is not None})
    if made.stack.of_weights and not made.rest.stack.of_weights:  # which stand around all of a model
        around_rest = wrapped(made.stack, made.rest.stack)
        if "matrix" in around_rest.needs - made.rest.stack.needs:
            problem = f"the levels of weights of {made.stack.label} take matrices; give a nest of weights for the rest"
            raise ConfigError.refuse("rest.stack", made.rest.stack.label, problem)
        made = made.model_copy(update={"rest": made.rest.model_copy(update={"stack": around_rest})})
    return made


def _named(source: nn.Module | Iterable[Any]) -> dict[str, Tensor]:
    """Return the parameters to optimize by name, tied ones once, frozen ones too if they can ever be trained."""
    if isinstance(source, nn.Module):
        return {name: param for name, param in source.named_parameters() if _trains(param)}
    if isinstance(source, Tensor):
        raise TypeError("one tensor is no list of parameters; give [tensor]")
    check_ordered(source)
    named: dict[str, Tensor] = {}
    seen: set[Tensor] = set()
    for i, item in enumerate(source):
        if isinstance(item, Mapping):
            raise TypeError(
                "parameter groups are for nestopt.optim.Nested; here give a model, or parameters and groups=[…]"
            )
        name, param = item if isinstance(item, tuple) else (f"parameter {i}", item)
        if not _trains(param) or param in seen:
            continue
        if name in named:
            raise ValueError(f"two parameters are called {name!r}; names must differ")
        seen.add(param)
        named[name] = param
    return named


def _trains(param: Tensor) -> bool:
    """Return whether a parameter is trained, or will be once it is unfrozen: quantized ones never are."""
    return param.requires_grad or param.is_floating_point()
