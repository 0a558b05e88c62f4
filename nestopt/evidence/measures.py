"""What a forgetting report is made of: means over documents, of each reading of them."""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean over documents.

    Attributes:
        mean: the mean.
        error: its standard error, s / √n with s the sample standard deviation.
    """

    mean: float
    error: float

    @classmethod
    def of(cls, values: Tensor) -> Mean:
        """Return the mean of one number per document `[n]`, n >= 2."""
        values = values.double()
        return cls(float(values.mean()), float(values.std() / math.sqrt(len(values))))

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.error:.3f}"


@dataclasses.dataclass(frozen=True)
class Look:
    """One reading of the documents, in bits per byte.

    Attributes:
        whole: of all of each document.
        curve: over the position in it, one for each of the report's positions.
    """

    whole: Mean
    curve: tuple[Mean, ...]


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of reading: each document, then new text; in bits per byte.

    Attributes:
        first: reading each document from a new state.
        second: reading it again, right after.
        again: what the second look gains, first - second, document by document.
        seen: of the document that was read, after each amount of new text.
        unseen: of the same documents, by a line that has read another one in its place.
        gain: unseen - seen, document by document: what is still known of a document that was read.
        new: of the new text.
        speed: tokens of it per second, all documents' lines together.
    """

    first: Look
    second: Look
    again: Mean
    seen: tuple[Mean, ...]
    unseen: tuple[Mean, ...]
    gain: tuple[Mean, ...]
    new: float
    speed: float
