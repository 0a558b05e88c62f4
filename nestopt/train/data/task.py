"""Tasks: examples that are made as a model trains, with targets of their own, in the place of text."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.core.part import Part
from nestopt.models.next_token import NOT_COUNTED, counted, next_tokens
from nestopt.train.data.source import HeldOut, TaskBatch
from nestopt.train.errors import CheckpointError, CorpusError, whole_number


class Examples(NamedTuple):
    """Examples of a task.

    Attributes:
        tokens: `[n, T]` int64.
        targets: classes `[n, T]`; or `[n, T, vocab]`, 1 for each that is right and 0 for the others; -100 is not
            counted. None: the next token is.
        mask: `[n, T]`, True for tokens, False for padding; None where there is none.
    """

    tokens: Tensor
    targets: Tensor | None = None
    mask: Tensor | None = None

    def told(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return what is read, with a target for each token of it, and its mask."""
        if self.targets is not None:
            return self.tokens, self.targets, self.mask
        mask = None if self.mask is None else self.mask[:, :-1]
        return self.tokens[:, :-1], next_tokens(self.tokens, self.mask, None), mask


class Task(Part):
    """Examples that are made: `draw` gives as many as are asked for. Its lengths are its own, not `data.window`."""

    kind: ClassVar[str] = "task"
    tests: ClassVar[tuple[str, ...]] = ()
    """What it is tested on beside examples like those of training, such as longer ones: what `draw` takes as `part`."""
    whole: ClassVar[bool] = False
    """Whether an example scores 1 only if all of it is right; else it scores the share that is."""

    @property
    @abstractmethod
    def vocab(self) -> int:
        """One more than the largest token and target."""

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        """Return `count` examples, all chance in them from `generator`, as in training or as in one of `tests`."""

    def score(self, logits: Tensor, examples: Examples) -> Tensor:
        """Return the score of each example, 0 to 1: `[n]`. Of several that can be right, each must be told apart.

        Args:
            logits: `[n, T, V]`, of the tokens that are read, V the model's vocabulary.
            examples: of `draw`.
        """
        _, targets, mask = examples.told()
        one = targets.ndim == 2
        right = logits.argmax(-1) == targets if one else ((logits[..., : self.vocab] > 0) == (targets == 1)).all(-1)
        counts = counted(targets) if mask is None else counted(targets) & mask
        share = (right & counts).sum(1) / counts.sum(1)
        return (share == 1).double() if self.whole else share.double()


class Made:
    """A `Source` of a task's examples: a step's are made from its number.

    Args:
        task: whose they are.
        batch: examples in a step, over all processes.
        seed: of the draws.
        vocab: of the model, at least that of the task; None is the task's.
        rank, world: this process's number and the number of processes.
    """

    def __init__(
        self, task: Task, *, batch: int, seed: int, vocab: int | None = None, rank: int = 0, world: int = 1
    ) -> None:
        self.task, self.name, self.vocab = task, task.label, task.vocab
        self._wider = 0 if vocab is None else vocab - task.vocab
        self._batch, self._seed, self._rank, self._world, self._step = batch, seed, rank, world, 0

    def batch(self) -> TaskBatch:
        drawn = self._drawn(self._batch, self._seed, self._step)
        self._step += 1
        rows = self._batch // self._world
        own = slice(self._rank * rows, (self._rank + 1) * rows)
        tokens, answers, mask = drawn
        return TaskBatch(tokens[own], answers[own], None if mask is None else mask[own])

    def held_out(self, most: int) -> HeldOut:
        return self._made("held out", most)

    def beside(self, tested: int, most: int) -> HeldOut:
        return self._made("beside", most)

    def _made(self, what: str, most: int) -> HeldOut:
        long = self._drawn(1, what)[0].shape[1]
        tokens, answers, mask = self._drawn(max(2, most // long), what)
        return HeldOut(tokens.contiguous(), None, tokens.numel(), answers, mask)  # processes compare its digest

    def _drawn(self, count: int, *what: object) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens, answers, mask = self.task.draw(count, generator_of(*what)).told()
        return tokens, F.pad(answers, (0, self._wider)) if answers.ndim == 3 else answers, mask

    def encode(self, text: str) -> NoReturn:
        """Raise CorpusError: there is no text."""
        raise CorpusError(f"{self.name}: a task has no text")

    def decode(self, tokens: Sequence[int]) -> str:
        return " ".join(map(str, tokens))

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "task": repr(self.task)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where a state is. Raises CheckpointError if it is of another task."""
        if state.get("task") != repr(self.task):
            raise CheckpointError(f"the run is on the task {state.get('task')}, not {self.task!r}; give that one")
        self._step = whole_number(state["step"], "step")

    def close(self) -> None:
        pass


def generator_of(*what: object) -> torch.Generator:
    """Return a generator whose seed is made of what is given: the same for the same numbers and words."""
    return torch.Generator().manual_seed(zlib.crc32(repr(what).encode()))


def classes(tokens: Tensor, asked: Tensor, targets: Tensor) -> Examples:
    """Return examples whose `targets` `[n, T]` count where they are `asked` for."""
    return Examples(tokens, torch.where(asked, targets, NOT_COUNTED))
