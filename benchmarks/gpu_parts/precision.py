"""The one place that knows how the precision of memories' products is asked for."""

from __future__ import annotations

from typing import Any


def layer_options(precision: str | None) -> dict[str, Any]:
    """Options of `nestopt.layer`, and keys of a model's section, for products in `precision`; None is the default."""
    return {} if precision is None else {"precision": precision}


def suffix(precision: str | None) -> str:
    """What a row of that precision has behind its name."""
    return "" if precision is None else f", precision={precision}"
