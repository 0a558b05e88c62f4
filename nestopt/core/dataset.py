"""Where training text comes from, as a part that plugins can add to."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt

from nestopt.core.part import Part


class Text(Protocol):
    """Bytes to train on and bytes held out."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> npt.NDArray[np.uint8]: ...
    @property
    def held_out(self) -> npt.NDArray[np.uint8]: ...


class Dataset(Part):
    """A source of text: `load()` gives its training and held-out bytes."""

    kind: ClassVar[str] = "dataset"

    @abstractmethod
    def load(self) -> Text: ...
