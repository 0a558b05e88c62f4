"""A continuum in context, one sequence and token by token, from the equations; inner gradients are torch.func's."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import vjp

from nestopt.core.signal import Signal
from nestopt.nn import CMS

EPS = 1e-4

Weights = dict[str, Tensor]


class Twin:
    """One sequence.

    Args:
        module: whose parameters, level and clocks are meant.
        length: tokens of the call, for `through="truncated"`.
    """

    def __init__(self, module: CMS, length: int) -> None:
        self.module, self.level, self.length = module, module.level, length
        self.names = list(module.level.chain())
        self.periods = dict(module.level.chain())
        self.home: dict[str, Weights] = {
            name: {k: self.cut(w) for k, w in block.named_parameters() if k.startswith("W")}
            for name, block in module.levels.items()
        }
        self.weights = {name: dict(w) for name, w in self.home.items()}
        self.seen = 0
        self.own = {name: self.fresh(name) for name in self.names}
        pairs = list(zip(self.names, self.names[1:], strict=False)) if self.level.variant == "nested" else []
        self.surprises: dict[str, list[float]] = {name: [] for name in self.names}
        self.below = {slow: (fast, dict(self.home[fast]), self.fresh(fast)) for fast, slow in pairs}

    def cut(self, x: Tensor) -> Tensor:
        return x.detach() if self.level.through == "stop" else x

    def fresh(self, name: str) -> dict[str, object]:
        """Nothing summed, and a learner that has seen nothing."""
        home = self.home[name]
        return {
            "sum": {k: torch.zeros_like(w) for k, w in home.items()},
            "energy": torch.zeros((), dtype=torch.float64),
            "learner": {k: self.level.learner.init(w.detach()) for k, w in home.items()},
        }

    # -- what it answers -----------------------------------------------------------------------------------------------

    def memory(self, weights: Weights, x: Tensor) -> Tensor:
        k = F.rms_norm(x, x.shape)
        return weights["W1"] @ F.silu(weights["W2"] @ k)

    def share(self, name: str) -> Tensor:
        return self.module.levels[name].share

    def answer(self, weights: dict[str, Weights], x: Tensor) -> Tensor:
        if self.level.variant == "independent":
            return x + sum(self.share(name) * self.memory(weights[name], x) for name in self.names)
        for name in self.names:
            x = x + self.memory(weights[name], x)
        return x

    def read(self, x: Tensor) -> Tensor:
        return self.answer(self.weights, x)

    # -- what it learns ------------------------------------------------------------------------------------------------

    def observe(self, x: Tensor, delta: Tensor | None) -> None:
        self.seen += 1
        found = self.by_loss(x, delta) if delta is not None else self.locally(x)
        at = x
        for name in self.names:
            energy = self.energy(name, at)
            if self.level.variant != "independent":
                at = at + self.memory(self.weights[name], at)
            elif delta is not None:  # the answer moves by c times what the read does
                energy = self.share(name) ** 2 * energy
            if not self.surprising(name, found[name][1]):
                continue
            self.add(self.own[name], found[name][0], energy)
            for fast, _, own in self.below.values():
                if fast == name:
                    self.add(own, found[name][0], energy)
        for name in self.names:  # from the fastest on: what a slower one puts back comes last
            if self.seen % self.periods[name]:
                continue
            self.weights[name] = self.step(name, self.weights[name], self.home[name], self.own[name])
            self.clear(self.own[name])
            if name in self.below:
                fast, start, own = self.below[name]
                start = self.step(name, start, self.home[fast], own)
                self.clear(own)
                self.below[name] = (fast, start, own)
                self.weights[fast], self.own[fast] = dict(start), self.fresh(fast)

    def surprising(self, name: str, error: Tensor) -> bool:
        """Whether a token with this error teaches the level."""
        before, own = self.surprises[name], float(error.detach().pow(2).mean())
        self.surprises[name] = [*before, own]
        return not before or own >= self.level.surprise * sum(before) / len(before)

    def by_loss(self, x: Tensor, delta: Tensor) -> dict[str, tuple[Weights, Tensor]]:
        """Each level's gradients, and its error."""
        _, pull = vjp(lambda weights: self.answer(weights, x), self.weights)
        gradients, errors, at = pull(delta)[0], {}, x
        for name in self.names:
            y = self.memory(self.weights[name], at)
            _, after = vjp(lambda y, at=at, name=name: self.answer_after(name, at, y), y)
            errors[name] = after(delta)[0]
            if self.level.variant != "independent":
                at = at + y
        return {name: (gradients[name], errors[name]) for name in self.names}

    def answer_after(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        """What the continuum answers where this level is shown x and answers y."""
        if self.level.variant == "independent":
            return self.share(name) * y
        x = x + y
        for later in self.names[self.names.index(name) + 1 :]:
            x = x + self.memory(self.weights[later], x)
        return x

    def locally(self, x: Tensor) -> dict[str, tuple[Weights, Tensor]]:
        found, first, at = {}, F.rms_norm(x, x.shape), x
        for name in self.names:
            y, pull = vjp(lambda weights, at=at: self.memory(weights, at), self.weights[name])
            error = y - self.module.levels[name].target @ first
            found[name] = pull(error)[0], error
            if self.level.variant != "independent":
                at = at + y
        return found

    def energy(self, name: str, x: Tensor) -> Tensor:
        w, k = self.weights[name], F.rms_norm(x, x.shape)
        z = w["W2"] @ k
        slope = z.sigmoid() * (1 + z * (1 - z.sigmoid()))
        return F.silu(z).square().sum() + k.square().sum() * (w["W1"] * slope).square().sum()

    def add(self, own: dict, gradient: Weights, energy: Tensor) -> None:  # type: ignore[type-arg]
        own["sum"] = {k: own["sum"][k] + g for k, g in gradient.items()}
        own["energy"] = own["energy"] + energy

    def clear(self, own: dict) -> None:  # type: ignore[type-arg]
        own["sum"] = {k: torch.zeros_like(g) for k, g in own["sum"].items()}
        own["energy"] = torch.zeros((), dtype=torch.float64)

    def step(self, clock: str, weights: Weights, home: Weights, own: dict) -> Weights:  # type: ignore[type-arg]
        """One write, by the rate and at the time of the level `clock`."""
        count, rate = self.seen // self.periods[clock], self.cut(self.module.levels[clock].rate.exp())
        writes = (self.length - 1) // self.periods[clock]  # that a token reads
        constant = self.level.through in ("first_order", "stop") or (
            self.level.through == "truncated" and count <= writes - self.level.last
        )
        new = {}
        for k, w in weights.items():
            g = own["sum"][k] / (EPS + own["energy"]) if self.level.is_normalized else own["sum"][k]
            step, own["learner"][k] = self.level.learner.step(g, own["learner"][k], Signal(step=count, param=w))
            new[k] = home[k] + self.level.keep * (w - home[k]) - rate * (step.detach() if constant else step)
        return new


def run(
    module: CMS, x: Tensor, signal: Callable[[int, int, Tensor], Tensor] | None = None
) -> tuple[Tensor, list[Twin]]:
    """x `[B, T, D]` to y `[B, T, D]`, and each sequence as it is then. `signal`: delta of row, token and answer."""
    rows, twins = [], []
    for b, row in enumerate(x):
        twin, found = Twin(module, len(row)), []
        for t, token in enumerate(row):
            found.append(twin.read(token))
            twin.observe(token, None if signal is None else signal(b, t, found[-1]))
        rows.append(torch.stack(found))
        twins.append(twin)
    return torch.stack(rows), twins
