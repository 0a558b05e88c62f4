"""What a training loop asks of its data: batches that it can go on with exactly, on any number of processes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from nestopt.models.next_token import counted


class Batch(NamedTuple):
    """What a process trains on in a step.

    Attributes:
        tokens: `[rows, window + 1]` int64, on the CPU: `window` inputs, and each one's next token.
        starts: `[rows, window + 1]` bool, True at the first token of a document; None where the text has none.
    """

    tokens: Tensor
    starts: Tensor | None

    @property
    def targets(self) -> int:
        """How many tokens are to be guessed: all but the first of each row, and of each document."""
        inner = self.tokens[:, 1:]
        return inner.numel() - (0 if self.starts is None else int(self.starts[:, 1:].sum()))


class TaskBatch(NamedTuple):
    """What a process trains on in a step of a task.

    Attributes:
        tokens: `[rows, T]` int64, on the CPU.
        answers: a target for each of them, as for `HopeLM.loss`.
        mask: `[rows, T]`, False at padding; None where there is none.
    """

    tokens: Tensor
    answers: Tensor
    mask: Tensor | None

    @property
    def targets(self) -> int:
        """How many are to be guessed."""
        return counted_answers(self.answers, self.mask)


class HeldOut(NamedTuple):
    """Text that is not trained on, the same in every process.

    Attributes:
        tokens: `[n]` integers, on the CPU.
        starts: `[n]` bool, True at the first token of a document; None where the text has none.
        bytes: of the text as UTF-8.
        answers, mask: of a task, whose tokens are `[n, T]`, as of a `TaskBatch`.
    """

    tokens: Tensor
    starts: Tensor | None
    bytes: int
    answers: Tensor | None = None
    mask: Tensor | None = None

    @property
    def bytes_per_token(self) -> float:
        """By which nats per token become bits per byte: `nats / ln 2 / bytes_per_token`; 1 of a task's answers."""
        return 1.0 if self.answers is not None else self.bytes / len(self.tokens)


def counted_answers(answers: Tensor, mask: Tensor | None) -> int:
    """Return how many answers count, of which none is at padding."""
    return int((counted(answers) if mask is None else counted(answers) & mask).sum())


class Source(Protocol):
    """The data of a run, as one process sees it.

    The batch of a step is one for all processes, `data.batch` rows; the process `rank` of `world` has the rows from
    `rank · batch / world` on. The rows of a step, and so all that is trained on, do not depend on `world`.
    """

    @property
    def name(self) -> str: ...
    @property
    def vocab(self) -> int:
        """One more than the largest token."""
        ...

    def batch(self) -> Batch | TaskBatch:
        """Return the next step's."""
        ...

    def held_out(self, most: int) -> HeldOut:
        """Return held-out text of at most so many bytes."""
        ...

    def beside(self, tested: int, most: int) -> HeldOut:
        """Return at most so many bytes of held-out text that `held_out(tested)` has not, to choose settings by."""
        ...

    def encode(self, text: str) -> Sequence[int]:
        """Return text as tokens, such as a prompt: what begins a document before it, and nothing behind it."""
        ...

    def decode(self, tokens: Sequence[int]) -> str: ...

    def state_dict(self) -> dict[str, Any]:
        """Return where this process's rows are after the batches given out: nested dicts of numbers and text."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state: this process's own, or one that `merged` made of the states of all, of any number."""
        ...

    def close(self) -> None:
        """End the processes that it started."""
        ...


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the states of all processes' sources as one, which any number of processes can go on from.

    Raises:
        ValueError: for none, or for states of different data or steps.
    """
    if not states:
        raise ValueError("merged: states is empty; give that of each process")
    rows: dict[str, Any] = {}
    first = {key: value for key, value in states[0].items() if key != "rows"}
    for i, state in enumerate(states):
        other = {key: value for key, value in state.items() if key != "rows"}
        if other != first:
            raise ValueError(f"merged: states[{i}] is {other} and states[0] {first}; give states of one run and step")
        rows |= state.get("rows", {})
    return {**first, **({"rows": rows} if "rows" in states[0] else {})}
