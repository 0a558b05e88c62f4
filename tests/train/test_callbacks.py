"""Callbacks as a run calls them: when, with what, on which process, and what happens when one fails or ends it."""

from __future__ import annotations

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import nestopt
from nestopt.config import ConfigError
from nestopt.train.callbacks import Callback, EarlyStopping
from nestopt.train.errors import TrainingError
from nestopt.train.loggers import Logger
from nestopt.train.loop import train
from nestopt.train.run import Run
from nestopt.train.schedule import Schedule
from nestopt.train.training import Training
from tests.train.folders.small import rows, same_ends, small

SEEN: list[tuple[Any, ...]] = []


class Notes(Callback):
    """Notes what it is told."""

    word: str = ""

    def on_step(self, moment, loss, norm):
        assert loss.ndim == norm.ndim == 0
        assert moment.optimizer.param_groups[0]["lr"] > 0
        SEEN.append(("step", moment.step, float(loss)))

    def on_eval(self, moment, bits_per_byte):
        assert moment.records()[-1]["eval/bits_per_byte"] == bits_per_byte
        SEEN.append(("eval", moment.step, bits_per_byte))

    def on_checkpoint(self, moment, path):
        assert path.is_file()
        SEEN.append(("checkpoint", moment.step, path.name))

    def on_end(self, moment, bits_per_byte):
        SEEN.append(("end", moment.step, bits_per_byte))


class Fails(Callback):
    at: str = "on_step"

    def on_step(self, moment, loss, norm):
        self.fail("on_step")

    def on_eval(self, moment, bits_per_byte):
        self.fail("on_eval")

    def on_checkpoint(self, moment, path):
        self.fail("on_checkpoint")

    def on_end(self, moment, bits_per_byte):
        self.fail("on_end")

    def fail(self, at):
        if at == self.at:
            raise KeyError("of mine")


class BadLogger(Logger):
    where: str = "log"

    def begin(self, run, config, records):
        self.fail("begin")

    def log(self, record):
        self.fail("log")

    def fail(self, where):
        if where == self.where:
            raise OSError(28, "no space")


class Ones(Schedule):
    wrong: float = 1.0
    asked: ClassVar[list[float]] = []

    def __call__(self, progress, warmup, decay):
        self.asked.append(progress)
        return self.wrong


@pytest.fixture(autouse=True)
def plugin() -> Iterator[None]:
    module = types.ModuleType("nestopt_notes")

    def hook(kind: str, **named: type) -> None:
        @nestopt.hookimpl(specname=f"nestopt_register_{kind}")
        def register_them(register):
            for name, cls in named.items():
                register(name, cls)

        setattr(module, kind, register_them)

    hook("callbacks", notes=Notes, fails=Fails)
    hook("loggers", bad=BadLogger)
    hook("schedules", ones=Ones)
    nestopt.registry.add(module, "notes_plugin")
    SEEN.clear()
    Ones.asked.clear()
    yield
    nestopt.registry.remove("notes_plugin")


def test_all_is_told_in_order_and_only_once(text: Path, tmp_path: Path) -> None:
    config = small(text, tmp_path, train__steps=5, train__eval_every=2, train__save_every=3)
    plain = train(config, quiet=True).run
    config.train.callbacks = ["notes", {"callback": "notes", "word": "again"}]
    result = train(config, quiet=True)
    told, twice = SEEN[::2], SEEN[1::2]
    assert told == twice
    assert [(what, step) for what, step, _ in told] == [
        ("step", 1),
        ("step", 2),
        ("eval", 2),
        ("checkpoint", 2),
        ("step", 3),
        ("checkpoint", 3),
        ("step", 4),
        ("eval", 4),
        ("checkpoint", 4),
        ("step", 5),
        ("checkpoint", 5),
        ("eval", 5),
        ("end", 5),
    ]
    losses = [value for what, _, value in told if what == "step"]
    assert losses == pytest.approx([row["train/loss"] for row in rows(result.run) if "train/loss" in row])
    assert told[-1] == ("end", 5, result.bits_per_byte)
    assert same_ends(plain, result.run)  # looking on changes nothing
    assert result.run.config().train.callbacks == [Notes(), Notes(word="again")]
    SEEN.clear()
    assert train(resume=result.run.path, trust=True, quiet=True).finished  # it has ended: there is nothing to tell
    assert SEEN == []


def test_an_interrupted_run_ends_without_a_score(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import signal

    update = Training._update

    def interrupting(self):
        if self.step == 2:
            signal.raise_signal(signal.SIGINT)
        return update(self)

    monkeypatch.setattr(Training, "_update", interrupting)
    config = small(text, tmp_path)
    config.train.callbacks = ["notes"]
    assert not train(config, quiet=True).finished
    assert SEEN[-2:] == [("checkpoint", 3, "checkpoint.json"), ("end", 3, None)]


@pytest.mark.parametrize("at", ["on_step", "on_eval", "on_checkpoint", "on_end"])
def test_one_that_raises_is_named_with_its_plugin(text: Path, tmp_path: Path, at: str) -> None:
    config = small(text, tmp_path, train__steps=2, train__eval_every=0, train__save_every=0)
    config.train.callbacks = [{"callback": "fails", "at": at}]
    words = rf"^the callback 'fails' of plugin 'notes_plugin' failed in {at} at step \d: KeyError: 'of mine'$"
    with pytest.raises(TrainingError, match=words):
        train(config, quiet=True)


@pytest.mark.parametrize("where", ["begin", "log"])
def test_a_logger_that_raises_is_named_with_its_plugin(text: Path, tmp_path: Path, where: str) -> None:
    config = small(text, tmp_path, train__steps=2)
    config.train.loggers = ["jsonl", {"logger": "bad", "where": where}]
    when = "as the run began" if where == "begin" else "at step 1"
    words = rf"^the logger 'bad' of plugin 'notes_plugin' failed {when}: OSError: .*no space"
    with pytest.raises(TrainingError, match=words):
        train(config, quiet=True)


def test_a_schedule_of_a_plugin_sets_the_rate(text: Path, tmp_path: Path) -> None:
    config = small(text, tmp_path, train__steps=4, train__decay_shape="ones")
    result = train(config, quiet=True)
    assert [row["lr"] for row in rows(result.run) if "lr" in row] == [0.02] * 4
    assert Ones.asked == pytest.approx([0.125, 0.375, 0.625, 0.875])
    config.train.decay_shape = Ones(float("nan"))
    with pytest.raises(
        TrainingError, match=r"the schedule 'ones' of plugin 'notes_plugin' failed at step 1: .*gave nan"
    ):
        train(config, quiet=True)


def test_early_stopping_ends_a_run_that_gets_no_better(text: Path, tmp_path: Path) -> None:
    config = small(text, tmp_path, train__steps=40, train__eval_every=2, optimizer__lr=0.0, optimizer__rest={"lr": 0.0})
    config.train.callbacks = [EarlyStopping(patience=2)]
    result = train(config, quiet=True)
    assert result.finished
    assert result.step == 6  # the best at 2, and two that were no better
    assert result.ended.startswith("early_stopping: held-out text was no better than ")
    assert result.run.model_file.exists()
    config.train.callbacks = []
    config.train.steps = 8
    assert train(config, resume=result.run.path, quiet=True).step == 8  # it can be gone on with


def test_early_stopping_counts_what_was_before_it_was_taken_up(text: Path, tmp_path: Path) -> None:
    still = {"optimizer__lr": 0.0, "optimizer__rest": {"lr": 0.0}}
    config = small(text, tmp_path, train__steps=5, train__eval_every=2, train__save_every=2, **still)
    run = train(config, quiet=True).run
    config.train.steps = 40
    config.train.callbacks = [EarlyStopping(patience=4)]
    assert train(config, resume=run.path, quiet=True).step == 8  # 2, 4, 5, 6, 8


def test_what_no_callback_can_be_is_refused() -> None:
    for given, words in (
        ({"callbacks": ["early"]}, r"train.callbacks\[0\]: 'early' is not allowed; .*Did you mean 'early_stopping'"),
        ({"callbacks": [{"callback": "early_stopping", "patience": 0}]}, r"train.callbacks\[0\].patience: 0"),
        ({"loggers": "csv"}, "train.loggers: 'csv' is not allowed; give a list"),
        ({"loggers": [{"logger": "wandb", "mode": "on"}]}, r"train.loggers\[0\].mode: 'on' is not allowed"),
        ({"decay_shape": "lin"}, "train.decay_shape: 'lin' is not allowed; .*Did you mean 'linear'"),
    ):
        with pytest.raises(ConfigError, match=words):
            nestopt.load({"train": given})
    config = nestopt.load({}, ["train.callbacks=[early_stopping]", "train.callbacks[0].patience=7"])
    assert config.train.callbacks == [EarlyStopping(7)]


def test_a_strangers_run_calls_no_callback_of_a_plugin_untrusted(text: Path, tmp_path: Path) -> None:
    config = small(text, tmp_path, train__steps=2)
    config.train.callbacks = ["notes"]
    path = train(config, quiet=True).run.path
    with pytest.raises(ConfigError, match=r"train\.callbacks has notes, which is of a plugin.*--trust"):
        train(resume=path, quiet=True)
    assert train(resume=path, quiet=True, trust=True).finished
    assert Run.open(path).load_model() is not None


def test_each_process_has_the_callbacks_that_are_for_it() -> None:
    from nestopt.train.callbacks import Callbacks

    class Everywhere(Callback):
        everywhere = True

    given = [Notes(), Everywhere()]
    for rank, wanted in ((0, given), (1, given[1:])):
        callbacks = Callbacks(given, rank, lambda stop: None)
        assert callbacks._own == wanted
        assert callbacks.any


def test_a_moment_stops_the_run_of_its_own(text: Path, tmp_path: Path) -> None:
    assert torch.get_default_dtype() == torch.float32
    config = small(text, tmp_path, train__steps=9)

    class Stops(Callback):
        def on_step(self, moment, loss, norm):
            if moment.step == 3:
                moment.stop("enough")

    module = types.ModuleType("nestopt_stops")

    @nestopt.hookimpl
    def nestopt_register_callbacks(register):
        register("stops", Stops)

    module.nestopt_register_callbacks = nestopt_register_callbacks
    nestopt.registry.add(module, "stops")
    try:
        config.train.callbacks = ["stops"]
        result = train(config, quiet=True)
    finally:
        nestopt.registry.remove("stops")
    assert (result.step, result.finished, result.ended) == (3, True, "stops: enough (at step 3)")
