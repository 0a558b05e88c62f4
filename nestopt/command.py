"""What a command of `nestopt` is."""

from __future__ import annotations

import argparse
from abc import ABC, abstractmethod
from typing import ClassVar


class Command(ABC):
    """What `nestopt NAME` does; NAME is what it is registered under."""

    help: ClassVar[str] = ""
    """A line that says what it is for."""

    examples: ClassVar[str] = ""
    """Lines for the end of its help, each indented by two spaces."""

    def arguments(self, parser: argparse.ArgumentParser) -> None:  # noqa: B027  # most take none
        """Add the arguments that it takes."""

    @abstractmethod
    def run(self, args: argparse.Namespace) -> int:
        """Do it. Returns the exit status; a ConfigError raised is said in a line, and the status is 2."""
