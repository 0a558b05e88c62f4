"""How the MLPs of a trained model learn as it reads: by which rule, and at settings chosen on held-out text."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nestopt import models
from nestopt.config import Config, ConfigError, ModelConfig, as_saved, save
from nestopt.levels.continuum.level import Auto, Cms, level_names
from nestopt.models import HopeLM
from nestopt.models.continua import continua, learning, with_learning
from nestopt.nn.hope import Learn
from nestopt.train.data import sources
from nestopt.train.data.source import HeldOut
from nestopt.train.engines.engine import device_of
from nestopt.train.errors import CorpusError, extra
from nestopt.train.evaluate import measured
from nestopt.train.run import Run
from nestopt.train.tables import grid

with extra("train"):
    from tqdm import tqdm

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Of the rates: each model has the one that is best on text of its own for that."""

PERIODS = (0.25, 0.5, 1.0, 2.0)
"""Of the periods."""

KEEPS = (1.0, 0.99, 0.95)

TUNING = 32768
"""Bytes of the text by which settings are chosen: held out, and not among those that are measured."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """A text read by a model.

    Attributes:
        factor: of the rates that the model came with.
        rate: at which its MLPs learned: the geometric mean over levels.
        bits: per byte.
        seconds: of the CPU.
    """

    factor: float
    rate: float
    bits: float
    seconds: float


def reading_rule(mlp: Cms) -> Cms:
    """Return how MLPs learn as they read: as they do, or, of those that don't, from the loss, every 32 tokens."""
    if mlp.learn == "context":
        return mlp
    periods = (32,) if len(mlp.periods) == 1 else mlp.periods
    return dataclasses.replace(mlp, periods=periods, learn="context", teach="loss", rate=0.08, through="first_order")


def texts(config: Config, tuning: int = TUNING) -> tuple[HeldOut, HeldOut]:
    """Return the held-out text that settings are chosen by, and the one that is measured.

    Raises:
        CorpusError: there is too little.
    """
    source = sources.make(config)
    try:
        tested = config.train.final_bytes
        test, tune = source.held_out(tested), source.beside(tested, tuning)
    finally:
        source.close()
    if len(tune.tokens) * 8 < min(tuning, len(test.tokens)):  # all is tested: a quarter of it is not, then
        cut = len(test.tokens) // 4
        tune, test = _part(test, slice(cut)), _part(test, slice(cut, None))
    if min(len(tune.tokens), len(test.tokens)) < 2:
        raise CorpusError(f"{source.name}: {test.bytes} held-out bytes are too few to choose by and to measure")
    return tune, test


def _part(text: HeldOut, part: slice) -> HeldOut:
    tokens = text.tokens[part]
    starts = None if text.starts is None else text.starts[part]
    return HeldOut(tokens, starts, round(len(tokens) * text.bytes_per_token))


def learner(config: Config, model: HopeLM, rule: Cms) -> HopeLM | None:
    """Return a trained model whose MLPs learn as it reads, by `rule`: the same weights under the names of its levels.

    Where the MLPs of some blocks learn so already, these alone do. None where none does and each is several: their
    periods are numbers of the optimizer's steps.
    """
    mlp = learning(config.model)
    if mlp.learn == "static" and len(mlp.periods) > 1:
        return None
    section = _ruled(config.model, rule)
    fresh = models.build_model(section).to(next(model.parameters()))
    each = (continua(one) for one in (config.model, section))
    names: dict[str, str] = {}
    for i, mlps in enumerate(zip(*each, strict=True)):
        both = zip(*(level_names(mlp.periods) for mlp in mlps), strict=True)
        names |= {f"blocks.{i}.mlp.levels.{old}.": f"blocks.{i}.mlp.levels.{new}." for old, new in both}
    state = fresh.state_dict()
    for key, value in model.state_dict().items():
        old, new = next(((old, new) for old, new in names.items() if key.startswith(old)), ("", ""))
        state[new + key.removeprefix(old)] = value
    fresh.load_state_dict(state)
    return fresh.eval()


def _ruled(section: ModelConfig, rule: Cms) -> ModelConfig:
    return with_learning(section, lambda mlp: dataclasses.replace(rule, memory=mlp.memory))


def read(config: Config, model: HopeLM, text: HeldOut, learn: Learn = True) -> tuple[float, float]:
    """Return the bits per byte of a text, and the CPU seconds that reading it took."""
    begin = time.process_time()
    return measured(model, text, config, learn=learn), time.process_time() - begin


def at_best_rate(
    config: Config, model: HopeLM, text: HeldOut, *, factors: Sequence[float] = FACTORS, bar: Any = iter
) -> Iterator[Reading]:
    """Read a text at each rate, and leave the model with the best: gives the readings, in order."""
    rates = [p for key, p in model.named_parameters() if key.endswith(".rate")]
    first = [p.detach().clone() for p in rates]

    def go_to(factor: float) -> float:
        with torch.no_grad():
            for p, start in zip(rates, first, strict=True):
                p.copy_(start + math.log(factor))  # a rate is kept as its logarithm
        return math.exp(float(torch.cat([p.detach().flatten() for p in rates]).mean()))

    found: dict[float, Reading] = {}
    for factor in bar(factors):
        rate = go_to(factor)
        found[factor] = Reading(factor, rate, *read(config, model, text))
        yield found[factor]
    go_to(min(found, key=lambda factor: found[factor].bits))


def tune(run: Run, *, out: Path | None = None, tuning: int = TUNING, quiet: bool = False) -> str:
    """Choose at which rate, period and keep a trained model learns as it reads, without training it.

    Args:
        run: its folder.
        out: a folder to write the model to with these settings, as a run of its own that `generate`, `eval` and
            `train --init-from` take.
        tuning: bytes of held-out text to choose by; the model is then measured on others.
        quiet: no progress bar.

    Returns:
        What was tried, what is best, and what it gives, as text.

    Raises:
        ConfigError: its MLPs can't learn as they read, or do so by rules of their own.
        CorpusError: there is too little held-out text.
    """
    config = run.config()
    chosen_by, test = texts(config, tuning)
    trained = run.load_model(device_of(config.train.device))
    rule = reading_rule(learning(config.model))
    periods = dict.fromkeys(times for by in PERIODS if (times := _times(rule.periods, by)) is not None)
    keeps = [keep for keep in KEEPS if keep != rule.keep]
    tried: list[tuple[Cms, Reading, HopeLM]] = []

    def attempt(rule: Cms, factors: Sequence[float]) -> None:
        model = learner(config, trained, rule)
        if model is None:
            allowed = "give an mlp of one level, or one that learns in context"
            raise ConfigError.refuse("model.mlp.periods", list(rule.periods), allowed)
        for reading in at_best_rate(config, model, chosen_by, factors=factors):
            tried.append((rule, reading, model))
            bar.update()

    with tqdm(total=len(periods) * len(FACTORS) + 3 * len(keeps), disable=quiet, unit="reading") as bar:
        for some in periods:
            attempt(dataclasses.replace(rule, periods=some), FACTORS)
        best, at, _ = min(tried, key=_bits)
        for keep in keeps:
            attempt(dataclasses.replace(best, keep=keep), [at.factor / 2, at.factor, at.factor * 2])
    tried.sort(key=_bits)
    best, at, model = tried[0]
    rows = [("periods", "keep", "rate", "bits per byte", "reading")]
    for own, found, _ in tried:
        shown = ",".join(map(str, own.periods))
        rows.append((shown, f"{own.keep:g}", f"{found.rate:.3g}", f"{found.bits:.3f}", f"{found.seconds:.1f} s"))
    said = [*grid(rows), f"bits per byte of {chosen_by.bytes:,} held-out bytes, by which the first is chosen."]
    said.append(f"On {test.bytes:,} others, which were not looked at:")
    before = None if learning(config.model).learn == "static" else trained
    readers: list[tuple[str, HopeLM | None, Learn]]
    readers = [("still", trained, "mixer"), ("as it was", before, True), ("as chosen", model, True)]
    for name, reader, learn in readers:
        if reader is not None:
            bits, seconds = read(config, reader, test, learn)
            said.append(f"  {name:<9}  {bits:.3f}  ({seconds:.1f} s)")
    if out is not None:
        section = _ruled(config.model, dataclasses.replace(best, rate=at.rate))
        out.mkdir(parents=True)
        with as_saved():
            save(config.model_copy(update={"model": section}), out / "config.yaml")
        Run(out).save_model(dict(model.state_dict()), {"tuned": str(run.path)})
        said.append(f"in {out}: config.yaml, model.safetensors")
    return "\n".join(said)


def _bits(item: tuple[Cms, Reading, HopeLM]) -> float:
    return item[1].bits


def _times(periods: Sequence[Any], by: float) -> tuple[Any, ...] | None:
    """Return periods times a number; None where one is no longer a whole number of tokens, or the data choose it."""
    if by == 1:
        return tuple(periods)
    if any(isinstance(p, Auto) or p * by != int(p * by) for p in periods):
        return None
    return tuple(int(p * by) for p in periods)
