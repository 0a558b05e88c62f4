"""The claims that can be tried: of each its tasks, its models, and the rule that decides it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from nestopt.config import ConfigError, build
from nestopt.core.registry import registry
from nestopt.evidence import networks, texts, toys, trials
from nestopt.evidence.trials import Plan, subjects_of
from nestopt.evidence.verdict import LEAST, Row, Verdict, above, not_below, of_pairs, scores, seeds_of, together

LINEAR = ("retnet", "gated_linear", "linear_attention", "deltanet", "deltanet±", "gated_deltanet")
"""Models whose memory is a matrix: the best of them is what Hope's recall is compared with."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim.

    Attributes:
        says: what is claimed.
        models: by name; the first is the one that it is claimed of.
        part: of the score that decides.
        judge: what the rows say.
        tasks: by name, each a task as a config has it, or a subject.
        quick: those of them that are tried in a hurry.
        run: how it is measured where there are no tasks.
        tuned: whether each model is trained at several rates.
        budget: CPU seconds of training, in all.
    """

    says: str
    models: tuple[str, ...]
    part: str
    judge: Callable[[Claim, Sequence[Row], Sequence[str]], Verdict]
    tasks: Mapping[str, object] = dataclasses.field(default_factory=dict)
    quick: tuple[str, ...] = ()
    run: Callable[[Plan], list[dict[str, object]]] | None = None
    tuned: bool = True
    budget: float = 3600.0

    def subjects(self, quick: bool) -> dict[str, trials.Subject]:
        """Return what models are trained on."""
        return subjects_of({name: spec for name, spec in self.tasks.items() if not quick or name in self.quick})

    def of(self, tasks: Sequence[str]) -> Claim:
        """Return the claim about some of its tasks. Raises ConfigError for one that it has not."""
        if unknown := [name for name in tasks if name not in self.tasks]:
            allowed = f"give some of {', '.join(self.tasks)}" if self.tasks else "the claim has no tasks to choose from"
            raise ConfigError.refuse("--tasks", unknown[0], allowed)
        return dataclasses.replace(self, tasks={name: self.tasks[name] for name in tasks}, quick=tuple(tasks))

    def rows(self, plan: Plan) -> list[dict[str, object]]:
        """Measure what is not measured yet, and return all rows."""
        return trials.run(self.subjects(plan.quick), plan) if self.run is None else self.run(plan)


def _solved(claim: Claim, rows: Sequence[Row], models: Sequence[str]) -> Verdict:
    """Yes if the first model is right on every example of the part, of each task, for two of three seeds."""
    seeds, tasks, limit = seeds_of(rows), list(dict.fromkeys(row["task"] for row in rows)), rows[0]["limit"]
    counts = {
        model: sum(
            3 * sum(score == 1 for score in scores(rows, claim.part, model=model, task=task, limit=limit).values())
            >= 2 * seeds
            for task in tasks
        )
        for model in models
    }
    rule = f"every example of {claim.part} right for 2 of 3 seeds, {limit}: "
    rule += ", ".join(f"{model} {count} of {len(tasks)}" for model, count in counts.items())
    answer = "undecided" if seeds < LEAST else "yes" if counts[models[0]] == len(tasks) else "no"
    return Verdict(answer, rule, seeds)  # type: ignore[arg-type]


def _as_good_as_linear(claim: Claim, rows: Sequence[Row], models: Sequence[str]) -> Verdict:
    """Yes if the first model is, on every task, not below the best linear one by more than two standard errors."""

    def best(task: str, limit: str) -> list[str]:
        means = {}
        for model in (name for name in models[1:] if name in LINEAR):
            own = scores(rows, claim.part, model=model, task=task, limit=limit)
            means[model] = sum(own.values()) / len(own)
        return sorted(means, key=lambda model: -means[model])[:1]

    found = of_pairs(rows, models[0], best, claim.part, not_below)
    away = of_pairs(rows, models[0], lambda *_: ["transformer"], claim.part, above)
    said = [words for words, _ in (*found, *away)]
    rule = f"not below the best linear model by 2 s.e.: {'; '.join(said)}"
    return Verdict(together(answer for _, answer in found), rule, seeds_of(rows))


def _above_all(claim: Claim, rows: Sequence[Row], models: Sequence[str]) -> Verdict:
    """Yes if the first model is above each other by two standard errors, in all seeds, on every task and limit."""
    found = of_pairs(rows, models[0], lambda *_: models[1:], claim.part, above)
    rule = f"mean beyond 2 s.e. and all seeds agree: {'; '.join(words for words, _ in found)}"
    return Verdict(together(answer for _, answer in found), rule, seeds_of(rows))


def _sign_of_each(claim: Claim, rows: Sequence[Row], models: Sequence[str]) -> Verdict:
    """Yes if the first model is above each of those that have a part less; says of each whether the part helps."""
    words: Mapping[str, str] = {"yes": "helps", "no": "harms", "undecided": "undecided"}
    answers, said = [], []
    for model in models[1:]:
        found = of_pairs(rows, models[0], lambda *_, model=model: [model], claim.part, above)
        said += [f"{compared} {words[answer]}" for compared, answer in found]
        answers += [answer for _, answer in found]
    return Verdict(together(answers), f"mean beyond 2 s.e. and all seeds agree: {'; '.join(said)}", seeds_of(rows))


def _forgets_less(claim: Claim, rows: Sequence[Row], models: Sequence[str]) -> Verdict:
    """Yes if the first model keeps more than each other, and knows no less of what is new."""
    said, answers = [], []
    for part, judge in (("kept", above), ("new", not_below)):
        for words, answer in of_pairs(rows, models[0], lambda *_: models[1:], part, judge):
            said.append(f"{part}, {words}")
            answers.append(answer)
    rule = f"more is kept (2 s.e., all seeds) and no less is right of the new: {'; '.join(said)}"
    return Verdict(together(answers), rule, seeds_of(rows))


def _monotone(claim: Claim, rows: Sequence[Row], models: Sequence[str]) -> Verdict:
    """Yes if each model keeps more than the one before it, and reads no worse."""
    said, answers = [], []
    for fewer, more in itertools.pairwise(models):
        for part, judge in (("kept", above), ("bits", not_below)):
            for words, answer in of_pairs(rows, more, lambda *_, fewer=fewer: [fewer], part, judge):
                said.append(f"{part}, {words}")
                answers.append(answer)
    rule = f"with each level more is kept (2 s.e., all seeds) and bits are not worse: {'; '.join(said)}"
    return Verdict(together(answers), rule, seeds_of(rows))


def _named(*names: str) -> dict[str, object]:
    return {name: name for name in names}


CLAIMS: Mapping[str, Claim] = {
    "languages": Claim(
        "a Hope that is trained on strings of up to 40 symbols of a formal language reads longer ones without a fault",
        ("hope-counts", "hope-tracks", "hope", "deltanet±", "deltanet", "transformer"),
        "41-100",
        _solved,
        _named("parity", "aa_star", "abab_star", "a_n_b_n", "a_n_b_n_c_n", "shuffle_2", "s3", "mod_3"),
        ("parity", "a_n_b_n"),
        budget=8 * 3600.0,
    ),
    "recall": Claim(
        "Hope recalls what it has read as well as the best linear model",
        ("hope", "deltanet", "gated_deltanet", "titans", "transformer"),
        "train",
        _as_good_as_linear,
        {
            **{f"mqar {n} pairs": {"task": "mqar", "pairs": n} for n in (8, 16, 32)},
            "needle": "needle",
            **{f"facts, {n} hops": {"task": "facts", "hops": n} for n in (1, 2)},
        },
        ("mqar 8 pairs", "facts, 1 hops"),
        budget=8 * 3600.0,
    ),
    "mad": Claim(
        "Hope is above the other models on tasks like those of MAD",
        ("hope", "titans", "deltanet", "transformer"),
        "train",
        _above_all,
        _named("noisy_mqar", "selective_copy", "compress", "memorise"),
        ("selective_copy", "memorise"),
        budget=4 * 3600.0,
    ),
    "levels": Claim(
        "with more levels of as many parameters a model that learns as it reads keeps more of what it has read",
        ("1", "2", "3", "4"),
        "kept",
        _monotone,
        {"text": texts.Continuum()},
        ("text",),
        budget=2 * 3600.0,
    ),
    "toys": Claim(
        "delta momentum needs fewer steps than momentum and than Nesterov's",
        ("delta_momentum", "momentum", "nesterov"),
        "steps",
        _above_all,
        run=toys.run,
    ),
    "ablation": Claim(
        "each part of Hope helps it to read: delta rule, momentum, decay, continuum, own keys, values and queries",
        tuple(texts.LEFT_OUT),
        "bits",
        _sign_of_each,
        {"text": texts.Ablation()},
        ("text",),
        budget=4 * 3600.0,
    ),
    "continual": Claim(
        "a network on several clocks forgets less than finetuning and than replay, when classes come two at a time",
        networks.LEARNERS,
        "kept",
        _forgets_less,
        run=networks.continual,
    ),
    "optimizers": Claim(
        "M3 trains a network better than others, each at its best rate",
        ("m3", "muon", "adam", "momentum", "nesterov", "delta_momentum"),
        "test",
        _above_all,
        run=networks.optimizers,
    ),
    "language": Claim(
        "a Hope is above a Transformer that learns as it reads, too",
        ("hope", "transformer"),
        "learning",
        _above_all,
        run=texts.language,
        tuned=False,
        budget=9 * 180.0,
    ),
}
"""By name, in the order in which they are listed."""


def claim_of(name: str) -> Claim | None:
    """Return the claim of this name; of a task's name, that Hope is as good as the best linear model on it."""
    if name in CLAIMS or name not in registry.names("task"):
        return CLAIMS.get(name)
    part = (*build("task", name).tests, "train")[0]  # type: ignore[attr-defined]
    says = f"Hope is as good as the best linear model on {name} ({part})"
    return dataclasses.replace(CLAIMS["recall"], says=says, tasks={name: name}, quick=(name,), part=part, budget=3600.0)
