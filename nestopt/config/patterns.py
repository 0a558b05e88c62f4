"""Regular expressions of users, checked so that none can search for hours."""

from __future__ import annotations

import re
import sys
import warnings
from typing import Any

if sys.version_info >= (3, 11):
    from re import _parser as parser  # type: ignore[attr-defined]
else:
    import sre_parse as parser

NAME, WAYS = 100, 2_000_000
"""Characters of a parameter's name, and in how many ways a pattern may be tried on it."""


def check_pattern(pattern: str) -> None:
    """Raise ValueError, saying what is allowed, for what is no regular expression, or takes too long to search for."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what a later Python may read in another way
            re.compile(pattern)
            found = _ways(parser.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"give a regular expression ({error})") from None
    if found > WAYS:
        raise ValueError(
            "give a regular expression with fewer repetitions, none of them within another: this one may be tried in "
            f"more than {WAYS:,} ways on a name of {NAME} letters"
        )


def _ways(part: Any) -> int:
    """Return in how many ways at most (beyond `WAYS`, it does not matter) a parsed pattern matches at one place."""
    ways = 1
    for kind, given in part:
        name = str(kind)
        if name == "BRANCH":
            own = sum(_ways(branch) for branch in given[1])
        elif name in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
            least, most, inner = given
            each, most = _ways(inner), min(int(most), NAME)
            least = min(least, most)
            # of what matches in one way only the number is open; of what matches in two, each time may be another
            own = most - least + 1 if each == 1 else sum(each**n for n in range(least, most + 1))
        elif name == "GROUPREF_EXISTS":
            own = sum(_ways(branch) for branch in given[1:] if branch is not None)
        else:  # a group, a look-around, a letter
            inner = given if name == "ATOMIC_GROUP" else given[-1] if isinstance(given, tuple) else None
            own = _ways(inner) if isinstance(inner, parser.SubPattern) else 1
        ways = min(ways * own, 10 * WAYS)
    return ways
