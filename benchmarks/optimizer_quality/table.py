"""What was found, as tables of Markdown and files of the documentation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median, stdev

from benchmarks.optimizer_quality.rows import ROWS
from benchmarks.optimizer_quality.sweep import Cost, Found, Run, repeated, search, search_in_time

Losses = Sequence[float]
"""On what is reported, one a seed."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Of an optimizer on a problem.

    Attributes:
        best: the run whose setting those that are reported have.
        in_time: likewise in as much CPU time as the first row takes.
        by_steps, by_time: their losses.
    """

    best: Run
    in_time: Run
    by_steps: Losses
    by_time: Losses
    cost: Cost


Outcomes = Mapping[str, Mapping[str, Outcome]]
"""By problem and optimizer, those of which every run is there."""


def outcomes(found: Found, problems: Iterable[str], steps: int, trials: int, seeds: int) -> Outcomes:
    """Return what all runs that are known amount to."""
    all_of: dict[str, dict[str, Outcome]] = {}
    for problem in problems:
        own = all_of.setdefault(problem, {})
        for name, row in ROWS.items():
            result = found.results.__getitem__
            try:
                cost = found.costs[problem, name]
                best = search(Run(problem, name, steps, row.middle), row.own, trials, result)
                in_time = search_in_time(best, cost, trials, result)
                losses = [[result(run).test for run in repeated(one, seeds)] for one in (best, in_time)]
            except KeyError:
                continue  # not all of it is there
            own[name] = Outcome(best, in_time, *losses, cost)
    return {problem: own for problem, own in all_of.items() if own}


def ranked(known: Outcomes) -> tuple[list[str], list[str]]:
    """Return the problems and optimizers that ranks are over: as much as is known without a gap."""
    order = sorted(known, key=lambda problem: -len(known[problem]))
    parts = []
    for count in range(1, len(order) + 1):
        common = [name for name in ROWS if all(name in known[problem] for problem in order[:count])]
        parts.append(([problem for problem in known if problem in order[:count]], common))
    return max(parts, key=lambda part: len(part[0]) * len(part[1]), default=([], []))


def ranks(known: Outcomes, losses: Callable[[Outcome], Losses]) -> dict[str, list[int]]:
    """Return the ranks of each optimizer, one a problem and seed, the best mean rank first."""
    problems, names = ranked(known)
    found: dict[str, list[int]] = {name: [] for name in names}
    for problem in problems:
        for at_seed in zip(*(losses(known[problem][name]) for name in names), strict=True):
            for name, loss in zip(names, at_seed, strict=True):
                found[name].append(1 + sum(other < loss for other in at_seed))
    return dict(sorted(found.items(), key=lambda item: fmean(item[1])))


def by_steps(outcome: Outcome) -> Losses:
    return outcome.by_steps


def by_time(outcome: Outcome) -> Losses:
    return outcome.by_time


# -- tables ------------------------------------------------------------------------------------------------------------


def ranks_table(known: Outcomes) -> str:
    problems, _ = ranked(known)
    of_steps, of_time = ranks(known, by_steps), ranks(known, by_time)
    lines = []
    for name, own in of_steps.items():
        cells = [known[problem][name] for problem in problems]
        times, states = [cell.cost.ratio for cell in cells], [round(cell.cost.bytes, 1) for cell in cells]
        rates = [cell.best.rate for cell in cells]
        start = f"{_short(_middle(rates))} ({_span(rates)})"
        lines.append([f"`{name}`", _spread(own), _spread(of_time[name]), start, _span(times), _span(states)])
    head = ["", "rank, equal steps", "rank, equal CPU time", "rate to start from", "time × `adamw`", "state, B"]
    return _table(head, lines)


def losses_table(known: Outcomes, names: Iterable[str] = ROWS, *, in_time: bool = False) -> str:
    """Return the losses of some optimizers, one column a problem; in equal time with the steps that fitted."""

    def cell(own: Mapping[str, Outcome], name: str) -> str:
        if name not in own:
            return "–"
        losses = (by_time if in_time else by_steps)(own[name])
        return _loss(losses) + (f" ({own[name].in_time.steps})" if in_time else "")

    rows = [[f"`{name}`", *(cell(own, name) for own in known.values())] for name in names]
    return _table(["", *known], [row for row in rows if set(row[1:]) != {"–"}])


def settings_table(known: Outcomes) -> str:
    """Return the settings that were best, one column a problem."""

    def cell(run: Run) -> str:
        return ", ".join([_short(run.rate), *(f"{name} {value:g}" for name, value in run.options)])

    rows = [[f"`{n}`", *(cell(own[n].best) if n in own else "–" for own in known.values())] for n in ROWS]
    return _table(["", *known], [row for row in rows if set(row[1:]) != {"–"}])


def pairs_table(known: Outcomes, pairs: Iterable[tuple[str, str]]) -> str:
    """Return what each level adds to the loss of the other one, over the same seeds; then on how many in equal time."""
    rows = []
    for name, other in pairs:
        both = [(own[name], own[other]) for own in known.values() if {name, other} <= own.keys()]
        if not both:
            continue
        signs = [_sign(a.by_time, b.by_time) for a, b in both]
        counts = [f"{signs.count(sign)} {word}" for sign, word in ((-1, "better"), (0, "level"), (1, "worse"))]
        cells = [
            _difference(own[name].by_steps, own[other].by_steps) if {name, other} <= own.keys() else "–"
            for own in known.values()
        ]
        rows.append([f"`{name}` − `{other}`", *cells, ", ".join(counts)])
    return _table(["equal steps", *known, "equal CPU time"], rows)


PAIRS = (
    ("m3", "muon"),
    ("dgd", "gd"),
    ("dgd(of=momentum)", "momentum"),
    ("dgd(of=adam)", "adamw"),
    ("dgd(of=muon)", "muon"),
    ("deep_momentum", "momentum"),
    ("delta_momentum", "momentum"),
    ("muon", "adamw"),
    ("normuon", "muon"),
    ("adamuon", "muon"),
    ("soap", "adamw"),
    ("shampoo", "adamw"),
    ("ademamix", "adamw"),
    ("lion_chain", "adamw"),
    ("schedule_free", "adamw"),
    ("lookahead(adam)", "adamw"),
    ("soap", "pytorch-optimizer SOAP"),
)
"""A level, and what it is to be better than."""

SAME = (
    ("adamw", "torch AdamW"),
    ("momentum", "torch SGD, momentum"),
    ("muon", "torch Muon"),
    ("lion_chain", "pytorch-optimizer Lion"),
    ("schedule_free", "pytorch-optimizer ScheduleFreeAdamW"),
)
"""Those that are one algorithm in two libraries."""

LEVELS = {
    "m3": ("muon", "m3"),
    "dgd": ("gd", "dgd", "momentum", "dgd(of=momentum)", "adamw", "dgd(of=adam)", "muon", "dgd(of=muon)"),
    "deep_momentum": ("momentum", "deep_momentum"),
}
"""The pages of levels that have a table, and its rows."""


def files(known: Outcomes) -> dict[Path, str]:
    """Return what the documentation includes, by its path below `docs`."""
    parts = {
        "ranks": ranks_table(known),
        "losses": losses_table(known),
        "losses-in-time": losses_table(known, in_time=True),
        "settings": settings_table(known),
        "pairs": pairs_table(known, PAIRS),
        "same": pairs_table(known, SAME),
    }
    for page, names in LEVELS.items():
        own = [pair for pair in PAIRS if pair[0] == page or pair[0].startswith(f"{page}(")]
        parts[page] = f"{losses_table(known, names)}\n{pairs_table(known, own)}"
    return {Path("choosing", f"{name}.inc"): text for name, text in parts.items()}


# -- cells -------------------------------------------------------------------------------------------------------------


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _loss(losses: Losses) -> str:
    if not all(map(math.isfinite, losses)):
        return "diverges"
    return f"{fmean(losses):.3f}" + (f" ± {stdev(losses):.3f}" if len(losses) > 1 else "")


def _paired(losses: Losses, others: Losses) -> tuple[float, float]:
    """Return the mean difference between runs of the same seed, and its standard error."""
    differences = [a - b for a, b in zip(losses, others, strict=True)]
    error = stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else math.inf
    return fmean(differences), error


def _sign(losses: Losses, others: Losses) -> int:
    """Return -1 or 1 where the mean difference is beyond two standard errors and all seeds agree, else 0."""
    if not all(map(math.isfinite, (*losses, *others))):
        return (max(losses) > max(others)) - (max(losses) < max(others))
    mean, error = _paired(losses, others)
    agree = len({a < b for a, b in zip(losses, others, strict=True)}) == 1
    return 0 if abs(mean) <= 2 * error or not agree else int(math.copysign(1, mean))


def _difference(losses: Losses, others: Losses) -> str:
    if not all(map(math.isfinite, (*losses, *others))):
        return "diverges"
    mean, error = _paired(losses, others)
    text = f"{mean:+.3f} ± {error:.3f}".replace("-", "−")
    return f"**{text}**" if _sign(losses, others) else text


def _spread(values: Sequence[int]) -> str:
    return f"{fmean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _middle(values: Sequence[float]) -> float:
    return math.exp(median(map(math.log, values)))


def _short(value: float) -> str:
    return f"{float(f'{value:.2g}'):g}"


def _span(values: Sequence[float]) -> str:
    low, high = _short(min(values)), _short(max(values))
    return low if low == high else f"{low}–{high}"
