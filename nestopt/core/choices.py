"""Which choices of an associative memory's fields go together."""

from __future__ import annotations

import dataclasses
from typing import Any

from nestopt.core.memories import Memory
from nestopt.core.normalized import check_layerwise
from nestopt.core.part import FieldError
from nestopt.core.retentions import Retention

UNUSED_BY_APPENDING = ("objective", "rule", "retention", "lr", "step_size", "chunk", "write", "fade")
"""Fields that a memory which appends its pairs does not use, and which must be at their defaults."""


def check_choices(level: Any, base: type) -> None:
    """Raise FieldError where fields of an `AssociativeMemory`, which is `base`, do not go together."""

    def refuse(key: str, problem: str) -> None:
        raise FieldError(level.label, key, getattr(level, key), problem)

    if level.fade == "before" and level.chunk > 1:
        refuse("fade", "is not allowed with chunk above 1: a chunk's gradients are of the memory it began with")
    if type(level.retention).write is not Retention.write:
        if level.fade == "before":
            refuse("retention", "is not allowed with fade='before': it acts as a write is made")
        if level.normalized == "layerwise":
            refuse("retention", "is not allowed with normalized='layerwise': a write is not merely added")
    if level.normalized and type(level.memory).layers is Memory.layers:
        words = f"the memory {level.memory.label} has no weights; give matrix or mlp, or leave it out"
        refuse("normalized", f"is not allowed: {words}")
    if level.normalized == "layerwise":
        check_layerwise(level)
    if level.appends:
        for field in dataclasses.fields(base):
            if field.name in UNUSED_BY_APPENDING and getattr(level, field.name) != _default(field):
                if level.fades_pairs and field.name == "retention":
                    continue
                words = f"the memory {level.memory.label} appends and learns by no rule; leave it out"
                refuse(field.name, f"is not allowed: {words}")


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
