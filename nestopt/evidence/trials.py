"""Models trained alike on one task: at equal tokens and at equal CPU seconds, each at the best of its rates."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch

from nestopt.config import Config, ConfigError, ModelConfig, build
from nestopt.core.memories import Mlp
from nestopt.evidence.store import Store
from nestopt.levels.continuum.level import Cms
from nestopt.models import HopeLM
from nestopt.train.compare import SECONDS, TOKENS, as_large, like, parameters
from nestopt.train.data.task import Task, generator_of
from nestopt.train.loop import train
from nestopt.train.run import Result

RATES = (0.001, 0.003, 0.01)

TRACKS: Mapping[str, object] = {
    "level": "self_modifying",
    "memory": {"memory": "mlp", "depth": 1},
    "adaptive": [],
    "delta": 0.0,
    "bound": 2.0,
    "chunk": 1,
    "projection_chunk": 1,
}
"""A Hope that tracks a state: its memory is a matrix, written at each token, which can turn round what it holds."""

MODELS: Mapping[str, object] = {
    "deltanet±": {"level": "deltanet", "lr": {"gate": {"init": 1.0, "low": 0.0, "high": 2.0}}},
    "hope-tracks": TRACKS,
}
"""Mixers by names that are no level's; DeltaNet with eigenvalues down to -1, too."""

COUNTS: Mapping[str, Sequence[object]] = {"hope-counts": [TRACKS, "linear_attention"]}
"""Mixers block by block, of models whose reads are not normalised: sums have a size, by which they can count.

`examples/hope_counts.yaml` is one of them.
"""

_NEVER = 10**9


@dataclasses.dataclass
class Plan:
    """How a claim is measured.

    Attributes:
        models: by name.
        seeds: how many, from 0 on.
        rates: of which each model has the best.
        seconds: of CPU that a run has, or None.
        steps: that a run has where `seconds` is None: then tokens are equal, and nothing else.
        examples: that each score is a mean over.
        quick: whether models are small and tasks few, to see that all works.
        store: of the rows.
        say: is told what is going on.
    """

    models: Sequence[str]
    seeds: int
    rates: Sequence[float]
    seconds: float | None
    steps: int
    examples: int
    quick: bool
    store: Store
    say: Callable[[str], None]

    @property
    def out(self) -> Path:
        return self.store.path.parent


@runtime_checkable
class Subject(Protocol):
    """What models are trained on and measured by."""

    def config(self, model: str, plan: Plan) -> Config:
        """Return a run of this model: all but its rate, seed and length."""
        ...

    def measure(self, model: HopeLM, result: Result, plan: Plan) -> dict[str, float]:
        """Return scores, the greater the better; by `valid` rates are chosen."""
        ...


class OnTask:
    """A task: models of two blocks of 32, all with as many parameters as a Transformer with MLPs of 192.

    Args:
        task: of any kind.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def config(self, model: str, plan: Plan) -> Config:
        def of(hidden: int, **mixers: object) -> ModelConfig:
            mlp = Cms(periods=(1,), memory=Mlp(hidden=hidden, residual=False))
            sizes: dict[str, Any] = {"dim": 32, "blocks": 2, "heads": 2, "vocab": self.task.vocab}
            return ModelConfig(mlp=mlp, **sizes, **mixers)

        data = {"task": self.task, "batch": 16 if plan.quick else 32}
        base = Config(model=of(192, mixer="attention"), data=data, train=settings(plan))
        if model not in COUNTS:
            return like(base, MODELS.get(model, model))
        mixers = {"mixers": COUNTS[model], "out_norm": False}
        section = as_large(lambda hidden: of(hidden, **mixers), parameters(base.model), model)
        return base.model_copy(update={"model": section})

    def measure(self, model: HopeLM, result: Result, plan: Plan) -> dict[str, float]:
        found = {part: self.score(model, part, plan.examples) for part in ("train", *self.task.tests)}
        return {"valid": self.score(model, "train", plan.examples, "valid"), **found}

    @torch.no_grad()
    def score(self, model: HopeLM, part: str, count: int, of: str = "test") -> float:
        """Return the mean score of a model, which is told no answers, on examples that all models have."""
        generator, total, done = generator_of(of, part), 0.0, 0
        while done < count:
            examples = self.task.draw(min(32, count - done), generator, part)
            tokens, _, mask = examples.told()
            logits, _ = model(tokens, mask=mask, learn="mixer")
            total, done = total + float(self.task.score(logits, examples).sum()), done + len(tokens)
        return total / count


def settings(plan: Plan) -> dict[str, Any]:
    """Return the section `train` of all runs, which show nothing on their way."""
    never = {"eval_every": 0, "save_every": 0, "sample_bytes": 0}
    how = {"eval_streams": 0, "final_bytes": 1024 if plan.quick else 16384, "device": "cpu", "threads": 1}
    return {**never, **how, "clock": "cpu", "warmup": 0.1, "decay": 0.5, "out": str(plan.out / "runs")}


def run(subjects: Mapping[str, Subject], plan: Plan) -> list[dict[str, Any]]:
    """Train all models on all subjects as the plan says, and return the rows."""
    return [row for name, subject in subjects.items() for row in _on(name, subject, plan)]


def _on(name: str, subject: Subject, plan: Plan) -> list[dict[str, Any]]:
    first, rows, rates = SECONDS if plan.seconds else TOKENS, [], {}
    steps = plan.steps
    for model in plan.models:
        tried = [_trial(name, subject, plan, model, first, 0, rate, steps) for rate in plan.rates]
        best = max(tried, key=lambda row: (row["scores"]["valid"], -row["bits"]))
        rates[model] = best["rate"]
        rows.append(best)
        rows += [_trial(name, subject, plan, model, first, seed, best["rate"], steps) for seed in range(1, plan.seeds)]
    if plan.seconds:
        steps = min(row["steps"] for row in rows if row["seed"] == 0)
        runs = [(model, seed) for model in plan.models for seed in range(plan.seeds)]
        rows += [_trial(name, subject, plan, model, TOKENS, seed, rates[model], steps) for model, seed in runs]
    return rows


def _trial(
    name: str, subject: Subject, plan: Plan, model: str, limit: str, seed: int, rate: float, steps: int
) -> dict[str, Any]:
    timed = limit == SECONDS
    amount = f"{plan.seconds:g} CPU seconds" if timed else f"{steps} steps"
    key = f"{name}, {model}, {amount}, seed {seed}, rate {rate:g}"

    def measure() -> dict[str, Any]:
        plan.say(key)
        base = subject.config(model, plan)
        given = {"seed": seed, "steps": _NEVER if timed else steps, "seconds": plan.seconds if timed else None}
        optimizer = {"stack": "adamw", "lr": rate, "route": "all"}
        data = {**base.to_data(), "optimizer": optimizer}
        data["train"] = {**data["train"], **given}
        config = Config.from_data(data)
        result = train(config, quiet=True)
        if not result.finished:
            raise KeyboardInterrupt
        trained = result.run.load_model()
        return {
            "task": name,
            "model": model,
            "limit": limit,
            "seed": seed,
            "rate": rate,
            "parameters": sum(p.numel() for p in trained.parameters()),
            "steps": result.step,
            "seconds": result.seconds,
            "bits": result.bits_per_byte,
            "scores": subject.measure(trained, result, plan),
            "run": str(result.run.path.relative_to(plan.out)),
        }

    return plan.store.once(key, measure)


def check_models(subjects: Mapping[str, Subject], plan: Plan) -> None:
    """Raise ConfigError if one of the models is none, or can't have as many parameters."""
    for model in plan.models:
        for subject in subjects.values():
            try:
                subject.config(model, plan)
            except ConfigError as error:
                raise ConfigError.of([ConfigError(one.problem, "--models") for one in error.errors]) from None


def subjects_of(specs: Mapping[str, object]) -> dict[str, Subject]:
    """Return by name subjects, or tasks as a config has them, as subjects."""
    found: dict[str, Subject] = {}
    for name, spec in specs.items():
        if isinstance(spec, Subject):
            found[name] = spec
        else:
            task = build("task", spec)
            assert isinstance(task, Task)
            found[name] = OnTask(task)
    return found
