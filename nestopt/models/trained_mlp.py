"""The MLP of a trained model's layer as a level of a continuum: its weights are where every sequence starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestopt.core.device import holds_only
from nestopt.core.memories import Memory, Theta
from nestopt.core.precision import EveryProduct, Precision, current, matmul, products_in
from nestopt.core.tree import State
from nestopt.levels.continuum.clock import Clocks, Phases, TokenCounts
from nestopt.levels.continuum.memory import each_row, is_shared, linearize, read
from nestopt.levels.continuum.scan import LevelGradient, squares

LEVEL = "mlp"
"""The name of the only level of each layer's clocks."""


class _Weights(nn.Module):
    """Several modules one after another, as one whose weights can be given."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return x


class TrainedMlp:
    """A trained MLP as a memory."""

    def __init__(self, parts: Sequence[nn.Module]) -> None:
        from transformers.pytorch_utils import Conv1D

        self.module = _Weights(parts)
        named = self.module.named_modules()
        self.linear = {f"{name}.weight": m for name, m in named if isinstance(m, nn.Linear | Conv1D)}

    def start(self) -> Theta:
        return dict(self.module.named_parameters())

    def read(self, theta: Theta, k: Tensor) -> Tensor:
        with nullcontext() if current() == "float32" else EveryProduct():
            return functional_call(self.module, {name: w.to(k.dtype) for name, w in theta.items()}, (k,))

    def layers(self, theta: Theta, k: Tensor) -> None:
        return None

    def inputs(self, theta: Theta, k: Tensor) -> Theta:
        """Return what each of its linear layers is shown when k `[n, D]` is read, `[n, in]` by the weight's name."""
        found: Theta = {}

        def took(name: str) -> Callable[..., None]:
            return lambda module, args: found.__setitem__(name, args[0])

        with ExitStack() as hooks:
            for name, layer in self.linear.items():
                handle = layer.register_forward_pre_hook(took(name))
                hooks.callback(handle.remove)
            self.read(theta, k)
        return found


class Layer:
    r"""One layer's MLP as a level: a `Continuum` of `nestopt.models.loss_signal`.

    With a `damping` c, the gradient $G = E^\top A$ of a linear layer that was shown A `[n, in]`, and whose outputs have
    the errors E `[n, out]`, is divided along the directions of its inputs by what they share:

    $$G\,\Big(I + \frac{A^\top A}{c\,a}\Big)^{-1} = G - G A^\top\,(c\,a\,I + A A^\top)^{-1} A, \qquad
      a = \tfrac1n \textstyle\sum_t \lVert a_t\rVert^2$$

    A direction that all tokens have in common is then written about c times, and not n times; the layer's outputs at
    these tokens move by at most $\mathrm{rate}\cdot c\,a\,\lVert E\rVert$, however many they are and however alike.

    Attributes:
        memory: the MLP.
        rate: its logarithm.
        clocks: when it writes.
        target: V of the local objective; None is taught by the model's loss.
        precision: of the products that the MLP is read and taught by.
        damping: c; None for plain gradients.
    """

    def __init__(
        self,
        memory: TrainedMlp,
        rate: Tensor,
        clocks: Clocks,
        target: Tensor | None,
        precision: Precision,
        damping: float | None = None,
    ) -> None:
        self.memory, self.rate, self.clocks, self.target = memory, rate, clocks, target
        self.damping = damping
        self.precision: Precision = precision

    def starts(self) -> dict[str, Theta]:
        """Return the trained weights, at the precision of a state."""
        found = self.memory.start().items()
        return {LEVEL: {name: w.to(torch.promote_types(w.dtype, torch.float32)) for name, w in found}}

    def init_state(self, batch: int) -> State:
        """Return the state of sequences that have read nothing: the trained weights, which are not copied."""
        return self.clocks.begin(self.starts(), batch)

    def until_write(self, phases: Phases) -> int:
        """Return how many tokens there are up to and with the next write."""
        return self.clocks.until(phases)

    def weights(self, state: Mapping[str, Any]) -> Theta | None:
        """Return those of each sequence; None where they are still the trained ones."""
        found: Theta = state["levels"][LEVEL]["weights"]
        return None if all(is_shared(w) for w in found.values()) and holds_only(state["step"], 0) else found

    def observe(
        self,
        x: Tensor,
        delta: Tensor | None,
        state: State,
        live: Tensor | None = None,
        *,
        phases: Phases,
        ahead: int = 0,
    ) -> State:
        """Learn from x `[B, n, D]`, which was answered with the weights in `state`; write where the period is over."""
        seen = TokenCounts(x.shape[1], None if live is None else live.sum(1), phases, ahead)
        return self.learn(self.gradient(x, delta, state, live, seen)[0], state, seen)

    def gradient(
        self, x: Tensor, delta: Tensor | None, state: State, live: Tensor | None, seen: TokenCounts
    ) -> tuple[LevelGradient, Tensor]:
        """Return what x teaches, summed over tokens, and what a step on it is foreseen to take off the loss, `[B]`."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        constant = self.clocks.constant(seen, self.clocks.chain[LEVEL])
        graph = torch.set_grad_enabled(torch.is_grad_enabled() and not constant)
        with graph, products_in(self.precision):
            x, weights = x.to(dtype), state["levels"][LEVEL]["weights"]
            at = linearize(cast(Memory, self.memory), weights, x)
            if self.target is None:
                assert delta is not None
                error = delta.to(dtype)
            else:
                error = at.y - matmul(x, self.target.to(dtype).mT)
            if live is not None:
                error = torch.where(live[..., None], error, 0)
            surprise = squares(error).sum(1)
            if taught := self.clocks.taught(state):
                live = taught[0].only(error, live)
                error = torch.where(live[..., None], error, 0)
            plain = at.gradient(error)
            shown = plain if self.damping is None else self._damped(plain, weights, x, live, self.damping)
        products = [(g.detach() * plain[name].detach()).flatten(1).sum(1) for name, g in shown.items()]
        foreseen = self.rate.detach().exp() * torch.stack(products).sum(0)
        return LevelGradient(shown, torch.zeros_like(surprise), surprise), foreseen

    def _damped(self, plain: Theta, weights: Theta, x: Tensor, live: Tensor | None, damping: float) -> Theta:
        """Return the gradients `[B, ...]` of linear layers as the class says, others as they are."""
        found = dict(plain)
        for name, a in each_row(self.memory.inputs, weights, x).items():
            a = a if live is None else torch.where(live[..., None], a, 0)
            squares = a.square().sum(-1)
            count = squares.shape[1] if live is None else live.sum(1).clamp_min(1)
            scale = (damping * squares.sum(1) / count).clamp_min(torch.finfo(a.dtype).tiny)
            gram = matmul(a, a.mT) + scale[:, None, None] * torch.eye(a.shape[1], dtype=a.dtype, device=a.device)
            linear = isinstance(self.memory.linear[name], nn.Linear)
            g = plain[name] if linear else plain[name].mT  # a Conv1D has its weight the other way round
            g = g - matmul(torch.linalg.solve_ex(gram, matmul(a, g.mT)).result.mT, a)
            found[name] = g if linear else g.mT
        return found

    def learn(self, gradient: LevelGradient, state: State, seen: TokenCounts) -> State:
        """Add it to the period's; write where that is over."""
        return self.clocks.after(state, {LEVEL: gradient}, seen, self.starts(), {LEVEL: self.rate.exp()[0]})


def patch(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Run `forward` in the place of the module's own."""
    module.__dict__["forward"] = forward


@contextmanager
def reading(
    layer: Layer,
    parts: Sequence[nn.Module],
    weights: Theta | None,
    took: Callable[[Tensor], None],
    gave: Callable[[Tensor], None] | None = None,
) -> Iterator[None]:
    """While this lasts, a layer's MLP, which is `parts`, has the `weights` given, or its own where these are None.

    Args:
        layer: the level that it is.
        parts: as of `nestopt.models.families.Family.mlp`.
        weights: of each sequence.
        took, gave: are told its input and its output, of which a gradient can then be asked.
    """
    first, *rest = parts

    def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        took(x)
        if weights is None:
            return cast(Tensor, type(first).forward(first, x, *args, **kwargs))
        with _unpatched(layer.memory.module), products_in(layer.precision):
            return read(cast(Memory, layer.memory), weights, x)

    def watched(forward: Callable[..., Tensor], gave: Callable[[Tensor], None]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            y = forward(*args, **kwargs)
            gave(y if y.requires_grad else y.requires_grad_())
            return y

        return run

    runs: list[Callable[..., Tensor]] = [run]
    for part in rest:  # with weights that are given, the first has done their work
        runs.append(partial(type(part).forward, part) if weights is None else lambda x, *args, **kwargs: x)
    if gave is not None:
        runs[-1] = watched(runs[-1], gave)
    try:
        for part, forward in zip(parts, runs, strict=True):
            patch(part, forward)
        yield
    finally:
        for part in parts:
            part.__dict__.pop("forward", None)


@contextmanager
def _unpatched(module: nn.Module) -> Iterator[None]:
    """Within this, the parts of `module` are themselves."""
    kept = {part: part.__dict__.pop("forward") for part in module.modules() if "forward" in part.__dict__}
    try:
        yield
    finally:
        for part, forward in kept.items():
            patch(part, forward)
