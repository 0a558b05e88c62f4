"""The normalised steps of a memory of weights, for any rule: one of all layers together, and the layerwise one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.func import grad as gradient_of

from nestopt.core.device import number_like
from nestopt.core.gates import bind, with_values
from nestopt.core.inputs import LayerInputs, MemoryInputs
from nestopt.core.level import Level
from nestopt.core.memories import Memory, Theta
from nestopt.core.objectives import Dot, Objective
from nestopt.core.part import FieldError, Number
from nestopt.core.precision import matmul
from nestopt.core.retentions import Retention
from nestopt.core.signal import Signal
from nestopt.core.tree import State, tree_map

FLOOR = 0.1
"""ε: of ‖k‖², beside a layer's own inputs, so that a token whose hidden layer is dead is not stepped on without end."""

INNER = 0.25
"""β: the share of all inner layers. At 1 they drift over 16,384 tokens of noise, at a quarter they do not."""

LEAST = 1e-6
"""Of what is divided by: a key of zeros writes nothing."""


Shown = Callable[[str, Tensor], LayerInputs]
"""What a weight of a memory, by name and as it is now, was shown."""


class Written(Protocol):
    """What the normalised steps know of an `AssociativeMemory`, which is a part."""

    memory: Memory
    objective: Objective
    rule: Level
    retention: Retention
    lr: Number
    step_size: Number
    chunk: int
    read: Literal["after", "before", "chunk"]
    write: Literal["token", "chunk"]
    normalized: bool | Literal["layerwise"]
    bound: float

    @property
    def label(self) -> str: ...
    @property
    def delta_decay(self) -> Number | None: ...
    def written(self, state: State, surprise: Theta, signal: Signal, shown: Shown | None) -> State: ...


def joint_rates(
    level: Written, theta: Theta, k: Tensor, lr: Tensor, damping: Tensor, delta: Tensor | None = None
) -> Tensor:
    """Return the normalised step sizes `[n]` of pairs with keys `[n, D_k]`, given lr, α · damping and δ, `[n]`
    each.

    Of two tokens with a delta decay each, the greater one counts for both. See `nestopt.levels.deep.step_size` for
    what is computed and why it does not diverge.
    """
    layers = level.memory.layers(theta, k)
    assert layers is not None
    near: list[Tensor] = [matmul(a, a.mT).abs() for a, _ in layers.values()]
    felt = [g * j[:, None] * j[None, :] for g, (_, j) in zip(near, layers.values(), strict=True)]
    close = torch.stack(felt).sum(0)
    if delta is not None:
        close = close + torch.maximum(delta[:, None], delta) * torch.stack(near).amax(0)
    root = torch.diagonal(close).clamp_min(torch.finfo(k.dtype).tiny).sqrt()
    # of token s (row) in the whole step, by the token t (column) it is felt at
    shares = root[:, None] * close / root
    if level.read == "chunk" or level.write == "chunk":
        n = shares.sum(-1)
    else:
        n = shares.tril().sum(-1) * sum(1 / i for i in range(1, level.chunk + 1))
    return level.bound * lr * damping / (1e-4 + n)


# -- layer by layer, token by token: `nestopt.levels.deep.layerwise` has the equations ---------------------------------


def states_after(
    level: Written,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    live: Tensor,
    state: State,
    signal: Signal,
) -> list[State]:
    """Return the states after each token of a chunk: keys and values `[C, D]`, gates and `live` `[C]`."""
    part: Any = level
    tokens = [
        (
            bind(part, {path: gate[t] for path, gate in gates.items()}),
            k[t : t + 1],
            v[t : t + 1],
            dataclasses.replace(signal, step=(signal.step + live[: t + 1].sum()).clamp_min(1)),
        )
        for t in range(len(k))
    ]
    first: Theta = state["memory"]
    outer = level.memory.outermost
    assert outer is not None
    shadow, inner = {name: {outer: part[outer]} for name, part in state.items()}, []
    for (now, key, value, own), alive in zip(tokens, live, strict=True):
        wrote, rates, wrong = _outer(now, outer, {**first, **shadow["memory"]}, key, value)
        inner.append(_inner(now, outer, first, key, wrong) if len(first) > 1 else ({}, {}))
        shadow = _where(alive, _moved(now, wrote, rates, shadow, own), shadow)
    states = []
    for (now, key, value, own), alive, (grads, found) in zip(tokens, live, inner, strict=True):
        wrote, rates, _ = _outer(now, outer, state["memory"], key, value)
        state = _where(alive, _moved(now, {**wrote, **grads}, {**rates, **found}, state, own), state)
        states.append(state)
    return states


Rates = dict[str, tuple[Tensor, Tensor]]
"""By weight its input `[1, in]`, and the rate `[1]` that it is written with."""


def _outer(level: Written, name: str, theta: Theta, k: Tensor, v: Tensor) -> tuple[Theta, Rates, Tensor]:
    """Return the write of the outermost weight, and ∂ℓ/∂y where it does not take that off."""
    layers = level.memory.layers(theta, k)
    assert layers is not None
    (a, j), delta, h = layers[name], _delta(level, k), _strength(level, k)
    square, felt = a.square().sum(-1), j.square()
    rate = h / (_floor(k) + (felt + delta) / (1 + delta) * square)
    found = gradient_of(lambda w: level.objective.loss(level.memory, {**theta, name: w}, k, v))(theta[name])
    wrong = torch.zeros_like(v)
    if len(theta) > 1:
        wrong = gradient_of(lambda y: level.objective(y, v))(level.memory.read(theta, k))
    taken = number_like(level.step_size, k) * rate * (felt * (type(level.objective) is not Dot) + delta) * square
    return {name: rate * found}, {name: (a, rate)}, (1 - taken)[:, None] * wrong


def _inner(level: Written, outer: str, first: Theta, k: Tensor, wrong: Tensor) -> tuple[Theta, Rates]:
    """Return the write of the other weights, of what the outermost left."""
    layers = level.memory.layers(first, k)
    assert layers is not None
    found = gradient_of(lambda theta: (level.memory.read(theta, k) * wrong).sum())(first)
    delta, h, rates = _delta(level, k), _strength(level, k), {}
    for name, (a, j) in layers.items():
        if name != outer:
            least = _floor(k) + (j.square() + delta) * a.square().sum(-1)
            rates[name] = a, INNER / (len(first) - 1) * h / least
    return {name: rate * found[name] for name, (_, rate) in rates.items()}, rates


def _delta(level: Written, k: Tensor) -> Tensor:
    return number_like(0.0 if level.delta_decay is None else level.delta_decay, k)


def _strength(level: Written, k: Tensor) -> Tensor:
    """h `[1]`."""
    keep = number_like(getattr(level.retention, "keep", 1.0), k)
    return (number_like(level.lr, k) * keep * level.bound / (1 + _delta(level, k))).expand(1)


def _floor(k: Tensor) -> Tensor:
    return LEAST + FLOOR * k.square().sum(-1)


def _moved(level: Written, surprise: Theta, rates: Rates, state: State, signal: Signal) -> State:
    """Return the state after a token's write: the rule's direction as an average, the delta decay as it is."""
    gain = number_like(level.rule.steady_gain, next(iter(rates.values()))[1]).clamp_min(1e-30)

    def shown(name: str, param: Tensor) -> LayerInputs:
        a, rate = rates[name]
        share = rate / gain
        return MemoryInputs(
            wxx=matmul((share[:, None] * matmul(a, param.mT)).mT, a),
            mean_square=a.new_zeros(()),
            rows=share.sqrt()[:, None] * a,
        )

    part: Any = level
    scaled = with_values(part, {"step_size": level.step_size * gain})  # type: ignore[operator]
    return scaled.written(state, surprise, signal, shown if level.delta_decay is not None else None)


def _where(alive: Tensor, new: State, old: State) -> State:
    return tree_map(lambda new, old: torch.where(alive, new, old), new, old)


def check_layerwise(level: Written) -> None:
    """Raise FieldError where `level` can't be written layer by layer."""
    problem = ""
    if level.memory.outermost is None:
        problem = f"is not allowed: the memory {level.memory.label} has no outermost weight; give matrix or mlp"
    elif type(level.objective).loss is not Objective.loss and not level.memory.linear:
        problem = f"is not allowed with objective={level.objective.label}, which is not one of the read alone"
    if problem:
        raise FieldError(level.label, "normalized", level.normalized, problem)
