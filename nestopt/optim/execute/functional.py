"""Levels on gradients as a pure function, to differentiate through: learned rates, starts and optimizers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nestopt.config.spec import build
from nestopt.core.clock import advance
from nestopt.core.gates import bind
from nestopt.core.signal import Signal
from nestopt.core.tree import State
from nestopt.core.weights import after_update
from nestopt.optim.execute.update import update
from nestopt.optim.views import begin, matrix_view, work_dtype


def functional_step(
    stack: Any,
    params: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    state: State | None = None,
    *,
    lr: float | Tensor = 1e-3,
    weight_decay: float | Tensor = 0.0,
) -> tuple[dict[str, Tensor], State]:
    r"""Take one step of `Nested` as a pure function: autograd passes through all of it, and nothing changes in place.

    $$W \leftarrow (1 - \mathrm{lr}\cdot\lambda)\,W - \mathrm{lr}\cdot u, \qquad u = \mathrm{stack}(g)$$

    For meta-learning: with `grads` from `torch.autograd.grad(loss, params, create_graph=True)`, the parameters after
    some steps depend on the first ones, on `lr` and `weight_decay`, and on every number of the levels that is given as
    a tensor (`momentum(beta)`), and a loss of them has gradients by all of these. Use them with
    `torch.func.functional_call`.

    Args:
        stack: the level, or a spec of one.
        params: by name.
        grads: by the same names; a parameter without one stays as it is.
        state: what the step before returned; None at the start.
        lr: step size, a number or a tensor without dimensions.
        weight_decay: decoupled, λ above.

    Returns:
        `(params, state)`, both new. The state holds `"step"`, a number, and `"levels"`, by name the state of the level.

    Raises:
        KeyError: a gradient of an unknown parameter.
        ValueError: a complex parameter.

    >>> import torch
    >>> from nestopt.levels import momentum
    >>> beta, w = torch.tensor(0.9, requires_grad=True), {"w": torch.tensor([2.0])}
    >>> state = None
    >>> for _ in range(2):
    ...     w, state = functional_step(momentum(beta), w, {"w": 2 * w["w"]}, state, lr=0.1)
    >>> w["w"].sum().backward()  # w = 2 - 0.4 - 0.1 (0.9 · 4 + 3.2)
    >>> round(float(beta.grad), 4)  # -lr · 4
    -0.4
    """
    if unknown := grads.keys() - params.keys():
        raise KeyError(f"gradients of unknown parameters: {sorted(unknown)}; params has {sorted(params)}")
    if of_complex := [name for name in grads if params[name].is_complex()]:
        raise ValueError(f"{', '.join(of_complex)}: give torch.view_as_real of complex parameters and gradients")
    step = 1 if state is None else state["step"] + 1
    level = bind(build("level", stack, "stack"), step=step)
    levels = {} if state is None else state["levels"]
    new_params, new_levels = dict(params), dict(levels)
    for name, grad in grads.items():
        param = params[name].to(work_dtype(params[name]))
        tree = levels[name] if name in levels else begin(level, param if level.of_weights else param.detach())
        seen = matrix_view(grad.to(param.dtype), level)
        direction, new_levels[name] = advance(level, seen, tree, Signal(step, matrix_view(param, level), lr))
        moved = update(param, direction.reshape(param.shape), lr, weight_decay)
        if level.of_weights:
            signal = Signal(step, matrix_view(moved, level), lr)
            seen, new_levels[name] = after_update(level, matrix_view(moved, level), new_levels[name], signal)
            moved = seen.reshape(param.shape)
        new_params[name] = moved.to(params[name].dtype)
    return new_params, {"step": step, "levels": new_levels}
