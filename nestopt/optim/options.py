"""How an optimizer takes its steps."""

from __future__ import annotations

import dataclasses
from typing import Literal, get_args

from nestopt.core.part import nearest

OnNonfinite = Literal["ignore", "skip", "raise"]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How an optimizer takes its steps; see the arguments of `Nested`."""

    on_nonfinite: OnNonfinite = "ignore"
    capturable: bool = False
    compile: bool = False
    metrics: bool = False

    def __post_init__(self) -> None:
        if self.on_nonfinite not in (allowed := get_args(OnNonfinite)):
            hint = nearest(str(self.on_nonfinite), allowed)
            raise ValueError(f"on_nonfinite={self.on_nonfinite!r} is not allowed; give one of {list(allowed)}.{hint}")
        if self.capturable and (self.compile or self.metrics or self.on_nonfinite != "ignore"):
            raise ValueError("capturable=True looks at no value; leave out compile, metrics and on_nonfinite")


OPTIONS = tuple(field.name for field in dataclasses.fields(StepOptions))
