"""The training loop: `train(config)` makes a run folder, trains, evaluates, saves, and says how it went."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt.config import Config
from nestopt.core.device import upload
from nestopt.nn.hope import Learn
from nestopt.optim import optimizer as make_optimizer
from nestopt.optim.sharded.saved import TensorSlice
from nestopt.train import engines
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.data import sources
from nestopt.train.data.source import Batch, HeldOut, merged
from nestopt.train.errors import extra
from nestopt.train.evaluate import bits_per_byte, documents_bits, stream_bits_per_byte
from nestopt.train.objective import Objective
from nestopt.train.report.metrics import MetricsLog
from nestopt.train.report.report import Report
from nestopt.train.rng import random_state, restore_random_state
from nestopt.train.run import Run, build_model, check_batch
from nestopt.train.schedule import factor

with extra("train"):
    from tqdm import tqdm

RANDOM = "random."


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        run: its folder.
        step: optimizer steps taken in all.
        seconds: of training, in all.
        bits_per_byte: on the held-out text, or None where the run was interrupted.
        baselines: those of simple models on the same text; in the first process only.
        finished: False if it was interrupted (its checkpoint is saved, and `train(resume=…)` goes on).
        ended: what ended it: its steps, its time or a signal.
    """

    run: Run
    step: int
    seconds: float
    bits_per_byte: float | None
    baselines: dict[str, float]
    finished: bool
    ended: str


def train(config: Config | None = None, *, resume: str | Path | None = None, quiet: bool = False) -> Result:
    """Train a language model on bytes, or on the tokens of documents.

    Args:
        config: the run; None is the default one (or, with `resume`, the one the run was started with).
        resume: the folder of an interrupted run, to go on with exactly where its checkpoint is.
        quiet: no progress bar and no report.

    Raises:
        ConfigError, CorpusError, CheckpointError: something given can't be used; says what and why.
    """
    run = Run.open(resume) if resume is not None else None
    if config is None:
        config = Config() if run is None else run.config()
    engine = engines.make(config)
    try:
        training = _Training(config, engine, run, quiet)
        try:
            return training.run_to_the_end()
        finally:
            training.source.close()
    finally:
        engine.close()


class _Training:
    def __init__(self, config: Config, engine: engines.Engine, run: Run | None, quiet: bool) -> None:
        self.config, self.engine, self.quiet = config, engine, quiet or engine.rank != 0
        check_batch(config, engine.world, engine.device)
        found = engine.gathered(sources.documents(config) if engine.rank == 0 else None)
        self.source = sources.make(config, engine.rank, engine.world, found[0])
        self.held_out = self.source.held_out(config.train.final_bytes)
        self.lm = build_model(config).to(engine.device)
        size = sum(param.numel() for param in self.lm.parameters())
        engine.cut_up(self.lm)
        nested = make_optimizer(self.lm, config)
        for group in nested.param_groups:
            group["initial_lr"] = group["lr"]
        torch.manual_seed(config.train.seed)
        self.step, self.elapsed = 0, 0.0
        self.losses: list[Tensor] = []  # since the last line of the log
        learn: Learn = True if config.train.learn == "all" else "mixer"
        engine.attach(Objective(self.lm, learn), self.lm, nested)
        self.lm.lockstep = engine.cut
        self.optimizer = engine.optimizer
        if run is None:
            made = str(Run.create(config).path) if engine.rank == 0 else None
            self.run = Run(Path(engine.gathered(made)[0]))
        else:
            self.run = run
            self._load()
        self.report = Report(self.run, self.source, self.held_out, size, quiet=self.quiet)

    def run_to_the_end(self) -> Result:
        report = self.report
        if self.step == 0:
            report.begin(self.optimizer, self.config)
        writes = self.engine.rank == 0
        log = MetricsLog(self.run.metrics_file) if writes else None
        if log:
            log.truncate_after(self.step)
        with _stop_signal() as stop:
            finished = self._steps(log, report, stop)
        if not finished:
            self._save()
            if log:
                log.close()
            ended = f"{stop.name} at step {self.step:,}"
            report.interrupted(ended)
            return Result(self.run, self.step, self.elapsed, None, {}, False, ended)
        report.say(f"measuring on {self.held_out.bytes:,} held-out bytes …")
        score = self._evaluate(self.held_out)
        weights = self.engine.checkpoints.whole_weights(self.run.path)
        self._sample()
        if log:
            assert weights is not None
            self.run.save_model(weights, {"step": self.step, "bits_per_byte": score})
            log.append({"step": self.step, "seconds": self.elapsed, "eval/bits_per_byte": score})
            log.close()
            report.end(score, self.elapsed, self._ended())
        self.engine.wait()
        baselines = report.baselines if writes else {}
        return Result(self.run, self.step, self.elapsed, score, baselines, True, self._ended())

    def _ended(self) -> str:
        """Say what ended a run that was not interrupted."""
        settings = self.config.train
        if self.step >= settings.steps:
            return f"its steps are done (train.steps={settings.steps})"
        of = f"{self.step:,} of {settings.steps:,} steps"
        return f"its time is over (train.seconds={settings.seconds:g}) after {of}; train.seconds=null sets no limit"

    def _steps(self, log: MetricsLog | None, report: Report, stop: _Stop) -> bool:
        """Train until the end (True) or until asked to stop (False)."""
        settings = self.config.train
        bar = tqdm(total=settings.steps, initial=self.step, disable=self.quiet, unit="step", dynamic_ncols=True)
        begin, since = time.monotonic() - self.elapsed, (time.monotonic(), self.step)
        losses = self.losses
        with bar:
            while self._progress() < 1:
                if self.engine.any(stop.is_set()):
                    return False
                loss, norm = self._update()
                losses.append(loss)
                self.step += 1
                self.elapsed = self._seconds_since(begin)
                bar.total = max(self.step, round(self.step / self._progress()))  # fewer, where time ends the run
                bar.update()
                if self.step % settings.log_every == 0:
                    now = time.monotonic()
                    rate = (self.step - since[1]) * self.config.data.batch * self.config.data.window / (now - since[0])
                    self._log(log, bar, float(self.engine.mean(torch.stack(losses).mean())), float(norm), rate)
                    losses.clear()
                    since = (now, self.step)
                ended = self._progress() >= 1
                if settings.eval_every and self.step % settings.eval_every == 0 and not ended:
                    self._middle(log, report, bar)
                    since = (time.monotonic(), self.step)
                if settings.save_every and self.step % settings.save_every == 0 and not ended:
                    self._save()
        return True

    def _seconds_since(self, begin: float) -> float:
        """Return this process's time; where time limits the run, the mean of all processes', so that they act alike."""
        elapsed = time.monotonic() - begin
        if self.config.train.seconds is None:
            return elapsed
        return self.engine.agreed(elapsed)

    def _progress(self) -> float:
        """Return how much of the run is over, from 0 to 1."""
        settings = self.config.train
        share = self.step / settings.steps
        return share if settings.seconds is None else max(share, self.elapsed / settings.seconds)

    def _update(self) -> tuple[Tensor, Tensor]:
        settings = self.config.train
        # the first step has a rate above 0, and so has the last
        progress = min(1.0, self._progress() + 0.5 / settings.steps)
        scale = factor(progress, warmup=settings.warmup, decay=settings.decay, shape=settings.decay_shape)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        return self.engine.update(self._batches(self.source.batch()))

    def _batches(self, batch: Batch) -> list[tuple[Tensor | None, ...]]:
        """Return what the objective is called with, `train.accumulate` times."""
        count = self.config.train.accumulate
        tokens = upload(batch.tokens, self.engine.device).chunk(count)
        if batch.starts is None:
            return [(part,) for part in tokens]
        # each counts as many targets as its documents have: the mean is over those of all
        targets = self.engine.total(torch.full((), float(batch.targets), device=self.engine.device))
        scale = count * self.engine.world / targets.clamp_min(1)
        return [(part, starts, scale) for part, starts in zip(tokens, batch.starts.chunk(count), strict=True)]

    def _log(self, log: MetricsLog | None, bar: Any, loss: float, norm: float, rate: float) -> None:
        if log is None:
            return
        bits = loss / math.log(2) / self.held_out.bytes_per_token  # as many bytes as a token has there
        bar.set_postfix_str(f"loss {loss:.3f}, {bits:.3f} bits/byte, {rate:,.0f} tokens/s")
        log.append(
            {
                "step": self.step,
                "seconds": self.elapsed,
                "train/loss": loss,
                "train/bits_per_byte": bits,
                "train/gradient_norm": norm,
                "train/tokens_per_second": rate,
                "lr": self.optimizer.param_groups[0]["lr"],
            }
        )

    def _middle(self, log: MetricsLog | None, report: Report, bar: Any) -> None:
        score = self._evaluate(self.source.held_out(self.config.train.eval_bytes))
        self._sample()
        if log:
            log.append({"step": self.step, "seconds": self.elapsed, "eval/bits_per_byte": score})
            report.plot()
            if not self.quiet:
                bar.write(f"step {self.step}: held out {score:.3f} bits per byte")

    def _sample(self) -> None:
        """Let the first process write text of the model's own; where weights are cut up, all must ask for it."""
        if self.engine.rank == 0 or self.engine.cut:
            self.report.sample(self.lm, self.step, self.config, write=self.engine.rank == 0)

    def _evaluate(self, held_out: HeldOut) -> float:
        data, engine = self.config.data, self.engine
        text = held_out.tokens.to(engine.device)
        shared: dict[str, Any] = {"rank": engine.rank, "world": engine.world, "total": engine.total}
        if held_out.starts is not None:
            rows = max(1, data.batch // (engine.world * self.config.train.accumulate))
            bits = documents_bits(self.lm, text, held_out.starts, window=data.window, batch=rows, **shared)
        elif streams := self.config.train.eval_streams:
            bits = stream_bits_per_byte(self.lm, text, streams=streams, piece=data.window, **shared)
        else:
            bits = bits_per_byte(self.lm, text, window=data.window, batch=4 * data.batch, **shared)
        return bits / held_out.bytes_per_token

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        losses = [float(loss) for loss in self.losses]
        data = merged(self.engine.gathered(self.source.state_dict()))
        meta = {"step": self.step, "elapsed": self.elapsed, "losses": losses, "data": data}
        self.engine.checkpoints.save(self.run.path, meta, self._own)

    def _own(self) -> Iterator[tuple[str, TensorSlice]]:
        """Yield what a checkpoint has of this process besides the model and its optimizer."""
        for name, state in random_state().items():
            yield f"{RANDOM}{self.engine.rank}.{name}", TensorSlice(state)

    def _load(self) -> None:
        with ShardReader(self.run.path) as parts:
            self.engine.checkpoints.load(parts)
            meta = parts.meta
            # more processes than there were: those begin as the first one goes on
            mine = f"{RANDOM}{self.engine.rank}."
            prefix = mine if any(key.startswith(mine) for key in parts.keys()) else f"{RANDOM}0."  # noqa: SIM118
            random = {
                key.removeprefix(prefix): parts.whole(key)
                for key in parts.keys()  # noqa: SIM118
                if key.startswith(prefix)
            }
        self.step, self.elapsed = meta["step"], meta["elapsed"]
        self.source.load_state_dict(meta["data"])
        self.losses = [torch.tensor(loss, device=self.engine.device) for loss in meta["losses"]]
        restore_random_state(random)


class _Stop(threading.Event):
    """Whether to stop, and the name of the signal that asked for it."""

    name = "a signal to another process"


@contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """Set by the first Ctrl-C or SIGTERM, so that a step is never cut in two; the second acts at once."""
    stop = _Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.name = signal.Signals(number).name
        stop.set()
        for n, before in old.items():
            signal.signal(n, before)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, before in old.items():
            signal.signal(number, before)
