r"""What a model gains by learning while it reads, and how much of it is left after it has read on.

Two lines of reading are compared: in one all memories are written (`learn=True`), in the other the mixers' alone
(`learn="mixer"`), so that what differs is what the continua of MLPs have learned. (`learn=False` is no line of reading:
no token would see those before it but through the convolutions.)

Several documents are read side by side, each by a stream of its own. Each stream reads its document from a new state,
and then the same new text as the others. On the way a clone of its state is shown its own document and, for control,
the next stream's, which it has never seen. So every document is read by two streams that have read as much, and of
which one knew it:

$$\mathrm{gain} = \mathrm{bits}(\text{document} \mid \text{another was read}) -
  \mathrm{bits}(\text{document} \mid \text{it was read})$$

How hard a document is, and what there is to learn from any text of its kind, is in both terms. Clones read with
`learn="mixer"`, so that what is measured is what was kept, not how fast it can be learned again.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nestopt.core.associative import AssociativeMemory
from nestopt.core.level import Level
from nestopt.core.memories import Window
from nestopt.core.tree import State, leaves
from nestopt.evidence.measures import Line, Look, Mean
from nestopt.evidence.reading import score
from nestopt.evidence.report import ForgettingReport
from nestopt.models import HopeLM
from nestopt.nn import clone
from nestopt.nn.hope import HopeBlock, Learn
from nestopt.train.errors import extra

with extra("train"):
    from tqdm import tqdm

TIMES = (0, 1, 10, 100)
"""How much new text is read before each measurement, in documents."""


def forgetting(
    model: HopeLM,
    documents: Tensor,
    new: Tensor,
    *,
    times: Sequence[int] = TIMES,
    piece: int = 128,
    bins: int = 16,
    progress: bool = False,
) -> ForgettingReport:
    """Measure what `model` gains by learning while it reads, and what is left of it after new text.

    Args:
        model: a language model of which a continuum learns in context, and whose state does not grow.
        documents: `[n, size]` tokens, n >= 2 and size >= 2: as many documents, all different.
        new: `[m]` tokens of other text, of which max(times) · size are read.
        times: how much new text is read before each measurement, in documents: rising whole numbers.
        piece: tokens of each document per call. It changes speed and memory only.
        bins: parts of a document over which the loss is averaged for its curve, at most size - 1.
        progress: whether to show a bar.

    Raises:
        ValueError: for a model that does not learn in context or would never stop growing; for documents, new text,
            times or a number that are not as said; for tokens that the model does not know.
    """
    times = tuple(times)
    _check_model(model)
    _check_texts(documents, new, times, bins)
    device = next(model.parameters()).device
    documents, new = documents.to(device), new.to(device)
    n, size = documents.shape
    edges = torch.linspace(0, size - 1, min(bins, size - 1) + 1).round().long().tolist()
    training = model.training
    model.eval()
    # each line: two looks, the new text, and two documents for each measurement
    work = 2 * n * size * (2 + times[-1] + 2 * len(times))
    with tqdm(total=work, unit="B", unit_scale=True, disable=not progress, leave=False) as bar:
        lines = [_Reader(model, learn, piece, edges, bar.update).line(documents, new, times) for learn in _LINES]
    model.train(training)
    # token i + 1 is the one that score i is of
    positions = tuple((first + last - 1) / 2 + 1 for first, last in itertools.pairwise(edges))
    return ForgettingReport(n, size, times, positions, *lines)


_LINES: tuple[Learn, Learn] = (True, "mixer")


@dataclasses.dataclass(frozen=True)
class _Reader:
    """One line of reading."""

    model: HopeLM
    learn: Learn
    piece: int
    edges: list[int]
    tick: Callable[[int], object]

    def line(self, documents: Tensor, new: Tensor, times: Sequence[int]) -> Line:
        n, size = documents.shape
        first, state = self._score(documents, None, self.learn)
        second, _ = self._score(documents, clone(state), self.learn)
        seen, unseen, gain = [], [], []
        bits, seconds, before = 0.0, 0.0, 0
        for now in times:
            if now > before:
                text = new[before * size : now * size].expand(n, -1)
                begun = time.perf_counter()
                found, state = self._score(text, state, self.learn)
                seconds += time.perf_counter() - begun
                bits += float(found.mean()) * (now - before) / times[-1]
                before = now
            own, other = self._kept(documents, state)
            seen.append(Mean.of(own))
            unseen.append(Mean.of(other))
            gain.append(Mean.of(other - own))
        return Line(
            self._look(first),
            self._look(second),
            Mean.of(first.mean(1) - second.mean(1)),
            tuple(seen),
            tuple(unseen),
            tuple(gain),
            bits,
            n * times[-1] * size / seconds,
        )

    def _kept(self, documents: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Return bits per token `[n]` of each document, by the stream that has read it and by one that has not."""
        own, _ = self._score(documents, clone(state), "mixer")
        other, _ = self._score(documents.roll(-1, 0), clone(state), "mixer")
        return own.mean(1), other.mean(1).roll(1, 0)

    def _score(self, tokens: Tensor, state: State | None, learn: Learn) -> tuple[Tensor, State]:
        bits, state = score(self.model, tokens, state, learn=learn, piece=self.piece, tick=self.tick)
        return bits.cpu(), state

    def _look(self, bits: Tensor) -> Look:
        parts = [bits[:, first:last].mean(1) for first, last in itertools.pairwise(self.edges)]
        return Look(Mean.of(bits.mean(1)), tuple(map(Mean.of, parts)))


def documents_in(text: Tensor, size: int, count: int = 8, times: int = TIMES[-1]) -> tuple[Tensor, Tensor]:
    """Return documents and new text from all over a text, for `forgetting`; none of them overlap.

    The text is cut into `count` sections. A section's first bytes are a document, and its last are new text.

    Args:
        text: `[N]` tokens.
        size: of each document.
        count: of documents.
        times: how much new text, in documents.

    Returns:
        `[count, size]` and `[times * size]`.

    Raises:
        ValueError: for a text that is too short, with what it takes.
    """
    if min(size, count, times) < 1:
        raise ValueError(f"documents_in: size={size}, count={count} and times={times} must be 1 or more each")
    share = -(-times * size // count)
    if (needed := count * (size + share)) > len(text):
        raise ValueError(
            f"documents_in: {count} documents of {size:,} bytes and {times:,} times as much new text take "
            f"{needed:,} bytes; the text has {len(text):,}"
        )
    sections = text[: len(text) // count * count].view(count, -1)
    return sections[:, :size], sections[:, sections.shape[1] - share :].flatten()[: times * size]


# -- what can't be measured --------------------------------------------------------------------------------------------


def _check_model(model: HopeLM) -> None:
    start = model.init_state(1)
    if not any(name.startswith("block_") and dict(leaves(part["mlp"])) for name, part in start.items()):
        raise ValueError(
            "forgetting: no continuum of this model learns while it reads, so there is nothing to forget; train one "
            "with model.mlp={level: cms, periods: [16, 64], learn: context, teach: loss}"
        )
    for i, block in enumerate(model.blocks):
        assert isinstance(block, HopeBlock)
        level = block.mixer.level
        if _unbounded(level):
            raise ValueError(
                f"forgetting: the mixer of block {i}, {level.label}, keeps every token, and would grow with all that "
                "is read; train with model.mixer={level: window_attention, memory: {memory: window, size: 128}}"
            )


def _unbounded(level: Level) -> bool:
    if isinstance(level, AssociativeMemory) and isinstance(level.memory, Window):
        return level.memory.size is None
    return any(_unbounded(part) for _, part in level.parts() if isinstance(part, Level))


def _check_texts(documents: Tensor, new: Tensor, times: tuple[int, ...], bins: int) -> None:
    if documents.ndim != 2 or min(documents.shape) < 2:
        raise ValueError(
            f"forgetting: documents have the shape {list(documents.shape)}; give [documents, tokens], two or more of "
            "each"
        )
    if not times or list(times) != sorted(set(times)) or times[0] < 0 or times[-1] < 1:
        raise ValueError(f"forgetting: times={times} is not allowed; give rising whole numbers, the last 1 or more")
    if bins < 1:
        raise ValueError(f"forgetting: bins={bins} is not allowed; give a whole number, 1 or more")
    needed = times[-1] * documents.shape[1]
    if new.ndim != 1 or len(new) < needed:
        raise ValueError(
            f"forgetting: new has the shape {list(new.shape)}; give [tokens], {needed:,} or more: {times[-1]:,} times "
            f"{documents.shape[1]:,}"
        )
