r"""A language model's own next-token loss as the teach signal of its continuum memories (NL eq. 71).

With h_t the residual stream after the last block and $\ell_t$ the loss of the next token, $\delta_t = \partial\ell_t/
\partial h_t$ is handed to every block's continuum as the error at its output: what later blocks would make of a change
is taken for the identity, which the residual stream is to first order. In the last block δ is the exact gradient.

A position's loss is known when the next token comes. So the gradient of position t is added, and what it completes is
written, before token t + 1 is read: the state carries one position that is not yet observed. Where a task gives targets
of its own, those of a position are told once it is read, and none is carried.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from nestopt.core.device import numbers_in, remember
from nestopt.core.precision import matmul
from nestopt.core.tree import State
from nestopt.levels.continuum.clock import Phases, between_writes
from nestopt.models import next_token


class Continuum(Protocol):
    """What learns at the moments of its clocks: a `CMS`, or an MLP of a trained model."""

    def until_write(self, phases: Phases) -> int:
        """Return how many tokens there are up to and with its next write."""
        ...

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
        """Learn from tokens that were read with the weights in `state`, given the error at what was answered."""
        ...


class Read(NamedTuple):
    """What the rows of a batch have read, as the host knows it.

    Attributes:
        phases: the different numbers of tokens, with the one that is carried.
        carried: whether every row has one.
        targets: of each token that is to be read, where the loss is not that of the next one.
    """

    phases: Phases
    carried: bool
    targets: Tensor | None = None

    @staticmethod
    def of(step: Tensor, carried: State, targets: Tensor | None = None) -> Read:
        """Return that of rows whose continua have learned from `step` tokens `[B]`, with what is `carried`."""
        live = carried["live"]
        if not live.shape[1]:
            return Read(numbers_in(step), False, targets)
        count = numbers_in(live)
        if len(count) == 1:
            return Read([phase + count[0] for phase in numbers_in(step)], count[0] == 1, targets)
        return Read(numbers_in(step + live.sum(1)), False, targets)


TAUGHT = "taught"
"""Key of a model's state: the position whose next token has not come."""


def nothing_carried(count: int, batch: int, dim: int, like: Tensor) -> State:
    """Return what is carried before the first token: no position, of `count` continua."""
    none = like.new_zeros(batch, 0, dim)
    live = torch.zeros(batch, 0, dtype=torch.bool, device=like.device)
    return {"inputs": {f"block_{i}": none for i in range(count)}, "hidden": none, "live": live}


def teach_signal(hidden: Tensor, targets: Tensor, norm: nn.RMSNorm, head: nn.Linear) -> Tensor:
    r"""Return $\partial\ell_t/\partial h_t$ `[B, n, dim]` of the loss $\ell_t$ of `targets`, in closed form.

    The logits are `head(norm(h))`; the targets, as those of `next_token.summed_loss`, are next tokens, or a task's own.
    All is torch operations that can be differentiated again.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    h, weight, scale = hidden.to(dtype), head.weight.to(dtype), norm.weight.to(dtype)
    eps = torch.finfo(hidden.dtype).eps if norm.eps is None else norm.eps
    r = (h.square().mean(-1, keepdim=True) + eps).rsqrt()
    wrong = next_token.wrong(matmul(h * r * scale, weight.mT), targets)
    g = matmul(wrong, weight) * scale
    return r * (g - h * r.square() * (g * h).mean(-1, keepdim=True))


class LossTeaching:
    """A call of a model whose continua learn from its own loss: in which parts it reads, and what each teaches.

    The model drives. It begins with the position that was carried over, if there is one; then reads part by part, each
    up to the next write of any continuum, and hands over what it read::

        teaching = LossTeaching(tokens, state, continua, mask, read)
        if teaching.waiting:
            teaching.observe_carried(signal(*teaching.waiting))
        for part in teaching.parts():
            hidden, inputs = …              # all blocks on tokens[:, part], with the states in teaching.state
            known = teaching.took(hidden, inputs)
            if known:
                teaching.observe(signal(*known))
        hidden, state = teaching.end()

    Args:
        tokens: `[B, T]`, padding at the end of rows only.
        state: of the whole model, with what is carried under `TAUGHT`; block i's continuum has `state["block_i"][key]`.
        continua: those of the blocks, in order; None where a block has none that is taught.
        mask: `[B, T]`, True for tokens.
        read: what the rows have read before, and the targets of what they read now.
        key: of a continuum's state in that of its block.
        ahead: tokens of the model's call that are not in this one, but come next.

    Attributes:
        state: of the blocks, as they are to read the next part.
        waiting: residual stream and next tokens of the positions that were carried over; None where there are none.
    """

    def __init__(
        self,
        tokens: Tensor,
        state: State,
        continua: Sequence[Continuum | None],
        mask: Tensor | None,
        read: Read,
        key: str,
        ahead: int = 0,
    ) -> None:
        self.state = {name: part for name, part in state.items() if name != TAUGHT}
        self._tokens, self._key, self._ahead, self._mask, self._read = tokens, key, ahead, mask, read
        self._continua = {f"block_{i}": one for i, one in enumerate(continua) if one is not None}
        # rows that are at an end go on no more, so the first token of a call is there or the row has none
        self._live = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        self._carried, self._found = state[TAUGHT], list[Tensor]()
        self._part, self._phases, self._inputs = slice(0, 0), read.phases, dict[str, Tensor]()
        self.waiting: tuple[Tensor, Tensor] | None = None
        if self._carried["hidden"].shape[1]:
            self._came = self._carried["live"] & self._live[:, :1]
            self.waiting = self._carried["hidden"], torch.where(self._came, tokens[:, :1], 0)

    def observe_carried(self, delta: Tensor) -> None:
        """Teach the continua the error of the positions that were `waiting` for their next token."""
        some = None if self._mask is None and self._read.carried else self._came
        before = [phase - 1 for phase in self._phases]
        self._observe(self._carried["inputs"], delta, some, before, self._tokens.shape[1] - 1)
        self._carried = {**self._carried, "live": self._carried["live"] & ~self._came}

    def parts(self) -> Iterator[slice]:
        """Yield the parts that the model is to read one after the other."""
        for part, phases in between_writes(self._tokens.shape[1], self._phases, self._continua.values()):
            self._part, self._phases = part, phases
            yield part

    def took(self, hidden: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Take what was read of the present part: the residual stream and each continuum's input, `[B, n, dim]`.

        Returns:
            The stream and the next tokens of the positions whose next token is in this call; None if there are none.
        """
        first, last, length = self._part.start, self._part.stop, self._tokens.shape[1]
        self._found.append(hidden)
        self._inputs = {f"block_{i}": x for i, x in enumerate(inputs)}
        if self._read.targets is not None:
            self._after, told = self._live[:, first:last], self._read.targets[:, first:last]
            self._counted = next_token.counted(told)
            return hidden, told.clamp_min(0)
        live, after = self._live[:, first:last], self._live[:, first + 1 : last + 1]
        self._carried = _carried(self._carried, self._inputs, hidden, live, after, last == length)
        known = min(last, length - 1) - first
        if not known:
            return None
        self._after = after[:, :known]
        return hidden[:, :known], torch.where(self._after, self._tokens[:, first + 1 : first + 1 + known], 0)

    def observe(self, delta: Tensor) -> None:
        """Teach the continua the error of what `took` gave back."""
        known = delta.shape[1]
        if self._read.targets is not None:
            delta = torch.where(self._counted[..., None], delta, 0)
        told = {name: x[:, :known] for name, x in self._inputs.items()}
        some = None if self._mask is None else self._after
        self._observe(told, delta, some, self._phases, self._tokens.shape[1] - 1 - self._part.start - known)

    def end(self) -> tuple[Tensor, State]:
        """Return the residual stream of all tokens `[B, T, dim]`, and the state of the model."""
        carried = self._carried
        if self._mask is None and self._read.targets is None:
            carried = {**carried, "live": remember(carried["live"], [1])}
        return torch.cat(self._found, dim=1), {**self.state, TAUGHT: carried}

    def _observe(
        self, inputs: Mapping[str, Tensor], delta: Tensor, live: Tensor | None, phases: Phases, ahead: int
    ) -> None:
        for name, continuum in self._continua.items():
            block = self.state[name]
            own = continuum.observe(
                inputs[name], delta, block[self._key], live, phases=phases, ahead=ahead + self._ahead
            )
            self.state[name] = {**block, self._key: own}


def _carried(
    before: State, inputs: Mapping[str, Tensor], hidden: Tensor, live: Tensor, after: Tensor, ends: bool
) -> State:
    """Return the last position of each row, if the token after it is not in this call; else what was carried before.

    Args:
        before: what was carried into this segment.
        inputs, hidden: of the segment, `[B, n, dim]`.
        live: `[B, n]`, its tokens.
        after: `[B, n]` or, at the end of the call, `[B, n - 1]`: whether the next place holds a token.
        ends: whether the call is over with this segment.
    """
    if ends:
        after = torch.cat([after, torch.zeros_like(live[:, :1])], dim=1)
    alone = live & ~after  # at most one in a row, for padding stands at the end
    place, has = alone.int().argmax(1), alone.any(1, keepdim=True)

    def choose(new: Tensor, old: Tensor) -> Tensor:
        picked = new.gather(1, place[:, None, None].expand(-1, 1, new.shape[-1]))
        return torch.where(has[..., None], picked, old if old.shape[1] else torch.zeros_like(picked))

    old = before["live"] if before["live"].shape[1] else torch.zeros_like(has)
    return {
        "inputs": {key: choose(x, before["inputs"][key]) for key, x in inputs.items()},
        "hidden": choose(hidden, before["hidden"]),
        "live": torch.where(has, True, old),
    }
