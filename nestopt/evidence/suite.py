"""What `nestopt evidence` answers: a claim is measured, drawn, and decided."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from nestopt.config import ConfigError
from nestopt.config.files import replacing
from nestopt.core.part import nearest
from nestopt.core.registry import registry
from nestopt.evidence.claims import CLAIMS, Claim, claim_of
from nestopt.evidence.store import Store
from nestopt.evidence.trials import RATES, Plan, check_models
from nestopt.evidence.verdict import Answer, Row, Verdict, seeds_of
from nestopt.train.errors import extra
from nestopt.train.folder import make_place
from nestopt.train.tables import grid

with extra("train"):
    from matplotlib.figure import Figure

QUICK_STEPS = 12
MOST_SEEDS = 5
"""Seeds that a claim gets where fewer have not decided it."""


def answer_evidence(args: argparse.Namespace) -> str:
    """Measure what the command line names, and return a table and a verdict.

    Raises:
        ConfigError, CheckpointError: something given can't be used; says what and why.
    """
    if args.task == "list":
        return listing()
    claim = claim_of(args.task)
    if claim is None:
        known = [*CLAIMS, *registry.names("task")]
        raise ConfigError(
            f"no claim or task is called {args.task!r}.{nearest(args.task, known)} `nestopt evidence list` has all"
        )
    whole, claim = claim, claim.of(args.tasks) if args.tasks else claim
    models = tuple(args.models or claim.models)
    if len(set(models)) < 2 or len(set(models)) < len(models):
        raise ConfigError.refuse("--models", " ".join(models), "give two or more, each once; the first is judged")
    folder = Path(args.out or Path("evidence") / (args.task + ("-quick" if args.quick else "")))
    make_place("--out", folder, "evidence.json", "evidence.png")
    plan = _plan(args, claim, models, Store(folder / "evidence.json"))
    check_models(claim.subjects(plan.quick), plan)
    rows = claim.rows(plan)
    verdict = claim.judge(claim, rows, models)
    if verdict.answer == "undecided" and args.seeds is None and not args.quick:
        plan = dataclasses.replace(plan, seeds=MOST_SEEDS)
        rows = claim.rows(plan)
        verdict = claim.judge(claim, rows, models)
    if left_out := [task for task in whole.tasks if task not in claim.tasks]:
        answer: Answer = "undecided" if verdict.answer == "yes" else verdict.answer
        verdict = Verdict(answer, f"{verdict.rule}; not tried: {', '.join(left_out)}", verdict.seeds)
    command = _command(args, folder)
    of = "" if models[0] == claim.models[0] else f"of {models[0]}, in the place of {claim.models[0]}: "
    line = f"claim {args.task}: {of}{claim.says}. {verdict}"
    plan.store.save(command=command, claim=claim.says, verdict=dataclasses.asdict(verdict), measured=rows)
    draw(claim, rows, models, folder / "evidence.png", verdict)
    return "\n".join([*table(rows, models, claim.part), line, f"in {folder}: evidence.json, evidence.png"])


def _plan(args: argparse.Namespace, claim: Claim, models: Sequence[str], store: Store) -> Plan:
    """Share the budget among runs: each task's of each model at each rate, then with each seed at both limits."""
    seeds, rates = args.seeds or (1 if args.quick else 3), RATES[1:2] if args.quick else RATES
    runs = max(1, len(claim.tasks)) * len(models) * (len(rates) + 2 * seeds - 1)
    runs = runs if claim.tuned else seeds * (2 * len(models) - 1)
    seconds = None if args.quick and args.budget is None else (args.budget or claim.budget) / runs

    def say(text: str) -> None:
        if not args.quiet:
            print(text, file=sys.stderr, flush=True)

    return Plan(models, seeds, rates, seconds, QUICK_STEPS, 16 if args.quick else 256, args.quick, store, say)


def _command(args: argparse.Namespace, folder: Path) -> str:
    """Return the command line that gives the same again."""
    said = ["nestopt", "evidence", args.task, *(["--quick"] if args.quick else []), "--out", str(folder)]
    for name in ("models", "tasks", "seeds", "budget"):
        if (given := getattr(args, name)) is not None:
            said += [f"--{name}"]
            said += given if isinstance(given, list) else [f"{given:g}s" if name == "budget" else str(given)]
    return shlex.join(said)


def listing() -> str:
    """Return all claims and tasks."""
    lines = [f"{name:<10}  {claim.says}" for name, claim in CLAIMS.items()]
    lines += ["", "tasks, on which Hope is compared with the best linear model:"]
    for name in registry.names("task"):
        said = (registry.get("task", name).__doc__ or "").strip().splitlines() or [""]
        lines.append(f"{name:<16}  {said[0]}")
    return "\n".join(lines)


def table(rows: Sequence[Row], models: Sequence[str], part: str) -> list[str]:
    """Return a line for each task, limit and model: the means over seeds of its scores, and of `part` each seed's."""
    parts = [name for name in rows[0]["scores"] if name != "valid"]
    several = seeds_of(rows) > 1
    head = ["task", "limit", "model", "parameters", "steps", "CPU s", "rate", *parts, "seeds"]
    lines = [(*head, *([f"{part} by seed"] if several else []))]
    for task, limit in dict.fromkeys((row["task"], row["limit"]) for row in rows):
        for model in models:
            same = [row for row in rows if (row["task"], row["limit"], row["model"]) == (task, limit, model)]
            if not same:
                continue
            means = [f"{statistics.fmean(row['scores'][name] for row in same):.3f}" for name in parts]
            each = [" ".join(f"{row['scores'][part]:.3f}" for row in same)] if several else []
            seconds = [row["seconds"] for row in same if "seconds" in row]
            lines.append(
                (
                    task,
                    limit,
                    model,
                    f"{same[0]['parameters']:,}" if "parameters" in same[0] else "–",
                    f"{statistics.fmean(row['steps'] for row in same):,.0f}",
                    f"{statistics.fmean(seconds):.0f}" if seconds else "–",
                    f"{same[0]['rate']:.3g}",
                    *means,
                    str(len(same)),
                    *each,
                )
            )
    return grid(lines, left=3)


def draw(claim: Claim, rows: Sequence[Row], models: Sequence[str], path: Path, verdict: Verdict) -> None:
    """Draw the score that decides: of each task and limit the seeds of each model, and their mean."""
    groups = list(dict.fromkeys((row["task"], row["limit"]) for row in rows))
    figure = Figure(figsize=(8, 1.4 + 0.22 * len(groups) * (len(models) + 1)), dpi=120, layout="constrained")
    axes = figure.subplots()
    for i, group in enumerate(groups):
        for j, model in enumerate(models):
            y = i * (len(models) + 1) + j
            found = [
                row["scores"][claim.part]
                for row in rows
                if (row["task"], row["limit"], row["model"]) == (*group, model)
            ]
            axes.plot(found, [y] * len(found), "o", color=f"C{j}", markersize=4, alpha=0.5)
            if found:
                axes.plot(statistics.fmean(found), y, "|", color=f"C{j}", markersize=12, label=None if i else model)
    middle = [(len(models) - 1) / 2 + i * (len(models) + 1) for i in range(len(groups))]
    axes.set_yticks(middle, [f"{task},\n{limit}" for task, limit in groups], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(f"score on {claim.part}")
    axes.set_title(f"verdict: {verdict.answer}", fontsize=9)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(models), frameon=False, fontsize=8)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
