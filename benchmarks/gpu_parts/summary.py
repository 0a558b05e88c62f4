"""The result of a run as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cells import grid, number
from benchmarks.gpu_parts import NO_TIME
from benchmarks.gpu_parts.runner import Ended

OUTCOMES = ("passed", "failed", "measured", "skipped")


def cell(value: object) -> str:
    """A number of three digits, by its exponent where it is small; words as they are."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 1e-3 else number(value)
    return "–" if value is None else str(value)


def line(row: Mapping[str, Any]) -> str:
    """A row in one line, as it is told while the run goes on."""
    values = "; ".join(f"{key} {cell(value)}" for key, value in _flat(row["values"]))
    return " · ".join(filter(None, (f"{row['outcome']:8} {row['name']}", values, row["words"])))


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key} {inner}", each) for inner, each in value.items())
        else:
            yield key, value


def counts(ended: Ended) -> dict[str, int]:
    return {outcome: sum(row["outcome"] == outcome for row in ended.rows) for outcome in OUTCOMES}


def well(parts: Sequence[Ended], *, whole: bool) -> bool:
    """Whether nothing failed, and all parts came to their end; if `whole`, with all that belongs to them."""
    ended_well = all(ended.how == "done" and not counts(ended)["failed"] for ended in parts)
    return ended_well and not (whole and _late(parts))


def _late(parts: Sequence[Ended]) -> int:
    """How many rows there was no time for."""
    return sum(row["words"] == NO_TIME for ended in parts for row in ended.rows)


def text(machine: Mapping[str, Any], command: str, parts: Sequence[Ended], *, brief: bool = False) -> str:
    """All of it, the table of parts last.

    Args:
        machine: the card and the software.
        command: that was run.
        parts: what became of each.
        brief: leave out which checks passed, and by how much: what a screen has room for.
    """
    lines = ["# The prepared GPU run", "", f"- command: {command}"]
    lines += [f"- {key}: {value}" for key, value in machine.items()]
    for ended in parts:
        lines += ["", f"## {ended.part}", "", *_part(ended, brief)]
    lines += ["", "## Summary", "", *_table(parts), "", verdict(parts), ""]
    return "\n".join(text for text, after in zip(lines, [*lines[1:], "."], strict=True) if text or after)


def _part(ended: Ended, brief: bool) -> list[str]:
    """What failed, first; then numbers as tables; then names."""
    found = [f"**{ended.how}**: {ended.words}", ""] if ended.how != "done" else []
    rows = {outcome: [row for row in ended.rows if row["outcome"] == outcome] for outcome in OUTCOMES}
    for row in rows["failed"]:
        found.append(f"- **failed** {line(row).removeprefix('failed').strip()}")
    if rows["failed"]:
        found.append("")
    found += _grid([row for row in rows["measured"] if row["values"]])
    bounded = [row for row in rows["passed"] if "bound" in row["values"]]
    found += [_worst(bounded)] if brief and bounded else _grid(bounded)
    found += _grid([row for row in rows["passed"] if row["values"] and "bound" not in row["values"]])
    found += _names("passed", [row for row in rows["passed"] if not row["values"]], brief)
    return [*found, *_names("skipped", rows["skipped"], brief)]


def _worst(rows: Sequence[Mapping[str, Any]]) -> str:
    """The check that came nearest to its bound, for all that passed."""
    worst = max(rows, key=lambda row: row["values"]["error"] / row["values"]["bound"])
    error, bound = (cell(worst["values"][key]) for key in ("error", "bound"))
    return f"- passed: {len(rows)}; nearest to its bound: {worst['name']}, {error} of {bound}"


def _names(outcome: str, rows: Sequence[Mapping[str, Any]], brief: bool) -> list[str]:
    """By reason; of many the first ones, if `brief`."""
    by_reason: dict[str, list[str]] = {}
    for row in rows:
        by_reason.setdefault(row["words"], []).append(row["name"])
    found = []
    for reason, names in by_reason.items():
        shown = [*names[:3], f"… {len(names)} in all"] if brief and len(names) > 4 else names
        found.append(f"- {outcome}{f' ({reason})' if reason else ''}: {', '.join(shown)}")
    return found


def _grid(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Rows that have a column in common as one table, others as lines; and what else there is to say of them."""
    tables: list[tuple[list[str], list[tuple[str, dict[str, Any]]]]] = []
    for row in rows:
        values = {key: value for key, value in _flat(row["values"]) if value is not None}
        for heads, known in tables:
            if values.keys() & set(heads):
                heads += [key for key in values if key not in heads]
                known.append((row["name"], values))
                break
        else:
            tables.append((list(values), [(row["name"], values)]))
    found = []
    for heads, known in tables:
        if len(known) == 1:
            name, values = known[0]
            found.append(f"- {name}: {'; '.join(f'{key} {cell(value)}' for key, value in values.items())}")
        else:
            cells = [[name, *(cell(values.get(head)) for head in heads)] for name, values in known]
            found += ["", *grid([["", *heads], *cells]), ""]
    return [*found, *(f"- {row['name']}: {row['words']}" for row in rows if row["words"])]


def _table(parts: Sequence[Ended]) -> list[str]:
    rows = [["part", *OUTCOMES, "s", "of", "ended"]]
    for ended in parts:
        found = counts(ended)
        spent = [f"{ended.seconds:.0f}", f"{ended.limit_s:.0f}"]
        rows.append([ended.part, *(str(found[outcome]) for outcome in OUTCOMES), *spent, ended.how])
    total = [str(sum(counts(ended)[outcome] for ended in parts)) for outcome in OUTCOMES]
    spent = [f"{sum(ended.seconds for ended in parts):.0f}", f"{sum(ended.limit_s for ended in parts):.0f}"]
    return grid([*rows, ["all", *total, *spent, ""]])


def verdict(parts: Sequence[Ended]) -> str:
    """In one line."""
    failed = [f"{ended.part}: {row['name']}" for ended in parts for row in ended.rows if row["outcome"] == "failed"]
    cut = [f"{ended.part} {ended.how}" for ended in parts if ended.how != "done"]
    late = _late(parts)
    left = f"; there was no time left for {late}" if late else ""
    if not failed and not cut:
        return f"Nothing failed, and all parts came to their end{left}."
    found = [f"{len(failed)} failed ({'; '.join(failed[:12])}{', …' if len(failed) > 12 else ''})"] if failed else []
    return f"{'; '.join([*found, *cut])}{left}."


def data(machine: Mapping[str, Any], command: str, parts: Sequence[Ended]) -> dict[str, Any]:
    """As plain data, with `"rates"` where a plan looks for them."""
    return {
        "command": command,
        "machine": dict(machine),
        "rates": rates(parts),
        "parts": [dataclasses.asdict(ended) for ended in parts],
    }


def rates(parts: Sequence[Ended]) -> dict[str, Any]:
    """What the part of that name has found for the plan; nothing where it has not run."""
    rows = [row for ended in parts if ended.part == "rates" for row in ended.rows if row["name"] == "rates"]
    return dict(rows[-1]["values"]) if rows else {}


def write(folder: Path, machine: Mapping[str, Any], command: str, parts: Sequence[Ended]) -> None:
    """`gpu.json` and `gpu.md`, each written beside its place and then moved there."""
    found = {
        "gpu.json": json.dumps(data(machine, command, parts), indent=1, ensure_ascii=False) + "\n",
        "gpu.md": text(machine, command, parts),
    }
    for name, content in found.items():
        temporary = folder / f".{name}"
        temporary.write_text(content, encoding="utf-8")
        os.replace(temporary, folder / name)
