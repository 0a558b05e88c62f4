"""Numbers, bytes and names as people read them."""

from __future__ import annotations

import unicodedata


def count(number: int | None) -> str:
    """Write a number with separators for thousands; None as nothing."""
    return "" if number is None else f"{number:,}"


def size(number: int | None) -> str:
    """Return bytes in decimal units: `"49.4 kB"`."""
    if number is None:
        return ""
    if number < 1000:
        return f"{number} B"
    value, units = float(number), iter(("kB", "MB", "GB", "TB", "PB"))
    unit = ""
    while round(value, 1) >= 1000:
        value, unit = value / 1000, next(units, unit)
    return f"{value:.1f} {unit}"


def many(number: int, noun: str) -> str:
    """Return `"1 level"`, `"2 levels"`, `"2 memories"`."""
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun[:-1]}ies" if noun.endswith("y") else f"{number:,} {noun}s"


def width(text: str) -> int:
    """Return columns that `text` takes in a fixed-width font: wide characters take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def shorten(text: str, columns: int) -> str:
    """Return `text` in at most so many columns, by leaving out its middle."""
    if width(text) <= columns:
        return text
    for kept in range(len(text) - 1, 0, -1):
        head, tail = text[: (kept + 1) // 2], text[len(text) - kept // 2 :]
        if width(head) + 1 + width(tail) <= columns:
            return f"{head}…{tail}"
    return "…"
