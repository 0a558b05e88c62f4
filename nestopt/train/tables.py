"""Aligned columns of text."""

from __future__ import annotations

from collections.abc import Sequence


def grid(rows: Sequence[Sequence[str]], left: int = 0) -> list[str]:
    """Align the columns of `rows` to the right, the first `left` of them to the left; returns lines."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    signs = "<" * left + ">" * (len(widths) - left)
    return ["  ".join(f"{cell:{s}{w}}" for cell, s, w in zip(row, signs, widths, strict=True)) for row in rows]
