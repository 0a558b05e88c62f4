r"""Consolidation: what a fast level has learned goes to the slower one beside it, and the fast one begins anew.

NL motivates it (section 1) and gives no equation. For each pair of neighbours, from the slowest on, the slow level
learns to answer alone what both answered, for replayed inputs x:

$$\min_{W_s^+} \sum_x \big\lVert B_s(B_f(x; W_{f,0}); W_s^+) - B_s(B_f(x; W_f); W_s)\big\rVert^2,
  \qquad B(x; W) = x + M(\mathrm{rms\_norm}(x); W)$$

with $W_{f,0}$ where the fast level starts; and then $W_f \leftarrow W_{f,0}$. The slow side goes first, so that there
is room where knowledge comes to: of three levels the middle one's goes to the slowest, and the fastest one's to the
middle.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from nestopt.core.memories import Mlp, Theta
from nestopt.core.token_state import fitted, shapes_of
from nestopt.core.tree import State, tree_map
from nestopt.levels.continuum.memory import linearize, read
from nestopt.levels.continuum.scan import normed
from nestopt.nn.cms import CMS
from nestopt.nn.replay import Replay
from nestopt.optim import Adam


@dataclasses.dataclass(frozen=True)
class Pair:
    """One level whose knowledge went to the next slower one.

    Attributes:
        fast, slow: their names.
        before, after: root mean square of what is then answered otherwise, for each sequence `[B]`, in units of what
            the levels add to their input: if the fast level were only put back, and with the slow one as it is now.
    """

    fast: str
    slow: str
    before: Tensor
    after: Tensor


@dataclasses.dataclass(frozen=True)
class Consolidation:
    """What a consolidation did.

    Attributes:
        pairs: in the order in which they were taken.
        inputs: that were replayed, of each sequence.
    """

    pairs: tuple[Pair, ...]
    inputs: int

    def table(self) -> str:
        """Return it as text, means over sequences."""
        rows = [("fast", "slow", "lost without", "lost with")]
        rows += [(p.fast, p.slow, f"{float(p.before.mean()):.2%}", f"{float(p.after.mean()):.2%}") for p in self.pairs]
        return "\n".join(f"{a:<12}{b:<12}{c:>14}{d:>14}" for a, b, c, d in rows)


def consolidate(
    cms: CMS,
    state: Mapping[str, Any],
    replay: Tensor | Replay,
    *,
    steps: int = 200,
    lr: float = 0.003,
    ridge: float = 1e-4,
) -> tuple[State, Consolidation]:
    """Move what the faster levels of `cms` know to the slower ones, sequence by sequence, and put the faster ones back.

    A slow level's outermost weights are first solved for by ridge regression, where its memory is an `Mlp`; then all of
    them take steps of Adam. Of all that was tried on the way each sequence keeps what answered best.

    Args:
        cms: learns in context and has two levels or more.
        state: of it, of any batch.
        replay: inputs of `cms`, `[B, n, dim]`, such as those it has read.
        steps: of Adam for each pair, 0 or more.
        lr: of Adam.
        ridge: of the regression, in units of the mean square of a hidden unit.

    Returns:
        The state, in which the fastest level is where it starts, the others have what was known by the next faster one
        (the slowest also its own), and nothing is summed in all but the slowest; and what was lost.

    Raises:
        ValueError: for a continuum that is static or has one level only, a state of another layer, or inputs of another
            batch or width, or none.
    """
    state, x = _checked(cms, state, replay)
    names = list(cms.level.chain())
    if len(names) < 2:
        raise ValueError(
            f"consolidate: periods={cms.level.periods} is one level, and there is no slower one to consolidate into; "
            "give two or more"
        )
    levels = {name: dict(own) for name, own in state["levels"].items()}
    done: list[Pair] = []
    with torch.enable_grad():
        for fast, slow in reversed(list(itertools.pairwise(names))):
            found = _pair(cms, levels, x, fast, slow)
            before = found.error(found.weights)
            best = _Best(found.weights, before)
            if type(memory := found.memory) is Mlp and not memory.norm:
                best.offer(solved := found.solved(ridge), found.error(solved))
            best = _descended(found, best, steps, lr)
            done.append(Pair(fast, slow, before, best.error))
            levels[slow]["weights"] = best.weights
            levels[fast] = _put_back(cms, levels, fast, slow)
    return {**state, "levels": levels}, Consolidation(tuple(done), x.shape[1])


def _checked(cms: CMS, state: Mapping[str, Any], replay: Tensor | Replay) -> tuple[State, Tensor]:
    if not cms.learns:
        raise ValueError(
            'consolidate: this continuum is static, and no sequence teaches it; give learn="context" and a rate above 0'
        )
    x = replay.vectors() if isinstance(replay, Replay) else replay
    batch = len(state["step"])
    if x.ndim != 3 or x.shape[1] == 0 or (x.shape[0], x.shape[2]) != (batch, cms.dim):
        raise ValueError(f"consolidate: replay has the shape {list(x.shape)}; it must be [{batch}, n >= 1, {cms.dim}]")
    found = fitted(state, shapes_of(cms.init_state(1)), batch, "consolidate")
    dtype = next(iter(next(iter(found["levels"].values()))["weights"].values())).dtype
    return tree_map(Tensor.detach, found), x.detach().to(dtype)


# -- one pair ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Task:
    """A slow level that is to answer alone.

    Attributes:
        memory: its own.
        weights: as they are, `[B, ...]`.
        inputs: what it is shown when the fast level is back at its start, `[B, n, D]`, normed.
        targets: what it should then answer, `[B, n, D]`.
        unit: root mean square of what both levels add, `[B]`.
    """

    memory: Any
    weights: Theta
    inputs: Tensor
    targets: Tensor
    unit: Tensor

    def residual(self, theta: Theta) -> Tensor:
        return self.targets - read(self.memory, theta, self.inputs)

    @torch.no_grad()
    def error(self, theta: Theta) -> Tensor:
        return _rms(self.residual(theta)) / self.unit

    @torch.no_grad()
    def solved(self, ridge: float) -> Theta:
        """Solve for the outermost weights that answer best, all others as they are."""
        hidden = linearize(self.memory, self.weights, self.inputs).at.inputs[0]  # type: ignore[attr-defined]  # of an Mlp
        gram = hidden.mT @ hidden
        size = gram.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        change = _solved(gram + ridge * size * eye, hidden.mT @ self.residual(self.weights))
        return {**self.weights, "W1": self.weights["W1"] + change.mT}


def _solved(system: Tensor, right: Tensor) -> Tensor:
    """Solve positive definite systems without waiting for the device, as `torch.linalg.solve` does."""
    factor, _ = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve(right, factor)


def _rms(x: Tensor) -> Tensor:
    return x.square().mean((-2, -1)).sqrt()


@torch.no_grad()
def _pair(cms: CMS, levels: Mapping[str, State], x: Tensor, fast: str, slow: str) -> _Task:
    blocks = dict(cms.levels.items())
    memory: Any = blocks[fast].memory
    at, start = levels[fast]["weights"], _start(cms, levels, fast, slow)
    now: Theta = levels[slow]["weights"]
    now = {name: weight.clone() for name, weight in now.items()}
    if cms.level.variant == "independent":
        shares = [blocks[name].share for name in (fast, slow)]
        shown = normed(x)
        moved = shares[0] * (read(memory, at, shown) - read(memory, start, shown))  # type: ignore[operator]
        answer = read(memory, now, shown)
        return _Task(memory, now, shown, answer + moved / shares[1], _rms(moved + shares[1] * answer) / shares[1].abs())  # type: ignore[operator]
    for name in cms.levels:
        if name == fast:
            break
        x = x + read(memory, levels[name]["weights"], normed(x))
    both = x + read(memory, at, normed(x))
    both = both + read(memory, now, normed(both))
    alone = x + read(memory, start, normed(x))
    return _Task(memory, now, normed(alone), both - alone, _rms(both - x))


def _start(cms: CMS, levels: Mapping[str, State], fast: str, slow: str) -> Theta:
    """Return where the fast level starts."""
    if "below" in levels[slow]:
        return levels[slow]["below"]["weights"]
    start = cms.init_state(1)["levels"][fast]["weights"]
    return tree_map(Tensor.detach, start)


def _put_back(cms: CMS, levels: Mapping[str, State], fast: str, slow: str) -> State:
    """Return the fast level as it is before its first token; how often it has written stays."""
    own = levels[fast]
    batch = len(own["energy"])
    fresh = tree_map(Tensor.detach, cms.init_state(batch)["levels"][fast])
    fresh["weights"] = tree_map(lambda w: w.expand(batch, *w.shape[1:]), _start(cms, levels, fast, slow))
    return {**fresh, **{key: own[key] for key in ("writes", "surprise_so_far", "below") if key in own}}


@dataclasses.dataclass
class _Best:
    """The best weights so far, and their error, for each sequence."""

    weights: Theta
    error: Tensor

    def offer(self, weights: Theta, error: Tensor) -> None:
        better = error < self.error  # and so never what is not finite

        def choose(new: Tensor, old: Tensor) -> Tensor:
            return torch.where(better.reshape(-1, *(1,) * (new.ndim - 1)), new.detach(), old)

        self.weights = {name: choose(weights[name], old) for name, old in self.weights.items()}
        self.error = torch.where(better, error, self.error)


def _descended(task: _Task, best: _Best, steps: int, lr: float) -> _Best:
    """After steps of Adam from the best weights."""
    weights = {name: weight.clone().requires_grad_() for name, weight in best.weights.items()}
    optimizer = Adam(list(weights.values()), lr=lr)
    for step in range(1, steps + 1):
        # each sequence's in its own unit, so that none counts for more than another
        (task.residual(weights).square().mean((-2, -1)) / task.unit.square()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % _LOOK == 0 or step == steps:
            best.offer(weights, task.error(weights))
    return best


_LOOK = 10
"""Steps between looks at how good the weights are."""


def check_into(into: str) -> None:
    """Raise ValueError unless a consolidation goes into the `"state"` or the `"parameters"`."""
    if into not in ("state", "parameters"):
        raise ValueError(f'HopeLM.consolidate: into={into!r} is not allowed; give "state" or "parameters"')


def consolidate_all(
    continua: Mapping[str, CMS],
    states: Mapping[str, State],
    inputs: Sequence[Tensor],
    *,
    into: Literal["state", "parameters"],
    steps: int,
    lr: float,
) -> tuple[dict[str, State], dict[str, Consolidation]]:
    """Consolidate several continua, each with the inputs `[B, n, dim]` that it had: see `HopeLM.consolidate`.

    Returns:
        The states afterwards of those that learn, and what was lost by those with two levels or more.
    """
    learning = {name for name, cms in continua.items() if cms.learns}
    several = {name for name in learning if len(continua[name].levels) > 1}
    if not (several if into == "state" else learning):
        wanted = "two levels or more" if learning else 'learn="context"'
        raise ValueError(f"HopeLM.consolidate: no continuum of this model has {wanted}; give its mlp that")
    after: dict[str, State] = {}
    found: dict[str, Consolidation] = {}
    for (name, cms), x in zip(continua.items(), inputs, strict=True):
        if name not in learning:
            continue
        after[name] = states[name]
        if name in several:
            after[name], found[name] = consolidate(cms, after[name], x, steps=steps, lr=lr)
        if into == "parameters":
            after[name] = cms.kept_for_good(after[name])
    return after, found
