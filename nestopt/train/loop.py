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

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from nestopt.config import Config, ConfigError
from nestopt.nn.hope import Learn
from nestopt.optim import optimizer as make_optimizer
from nestopt.optim.sharded.saved import Stretch
from nestopt.train import engines
from nestopt.train.datasets import Files
from nestopt.train.evaluate import bits_per_byte, held_out_text, stream_bits_per_byte
from nestopt.train.metrics import MetricsLog
from nestopt.train.objective import Objective
from nestopt.train.parts import Parts
from nestopt.train.randomness import random_state, restore_random_state
from nestopt.train.report import Report
from nestopt.train.run import Run, build_model
from nestopt.train.schedule import factor
from nestopt.train.text import windows

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
    """

    run: Run
    step: int
    seconds: float
    bits_per_byte: float | None
    baselines: dict[str, float]
    finished: bool


def train(config: Config | None = None, *, resume: str | Path | None = None, quiet: bool = False) -> Result:
    """Train a byte-level language model.

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
        return _Training(config, engine, run, quiet).run_to_the_end()
    finally:
        engine.close()


class _Training:
    def __init__(self, config: Config, engine: engines.Engine, run: Run | None, quiet: bool) -> None:
        self.config, self.engine, self.quiet = config, engine, quiet or engine.rank != 0
        data = config.data
        dataset = Files(data.path) if data.path else data.dataset
        if dataset is None:
            raise ConfigError.refuse("data.dataset", None, "give a dataset, or data.path")
        if config.model.vocab < 256:
            raise ConfigError.refuse("model.vocab", config.model.vocab, "bytes need 256 or more")
        self.corpus = dataset.load()
        self.tokens = torch.from_numpy(self.corpus.train)
        self.text = held_out_text(self.corpus.held_out, config.train.final_bytes)
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
        self.optimizer = engine.optimizer
        if run is not None:
            self.run = run
            self._load()
        elif engine.rank == 0:
            self.run = Run.create(config)
        if engine.world > 1 and run is None:
            self.run = _shared(self.run if engine.rank == 0 else None)
        self.report = Report(self.run, self.corpus.name, self.text, self.corpus.train, size, quiet=self.quiet)

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
            report.interrupted(self.step)
            return Result(self.run, self.step, self.elapsed, None, {}, False)
        report.say(f"measuring on {len(self.text):,} held-out bytes …")
        score = self._evaluate(self.text)
        weights = self.engine.kept.whole_weights(self.run.path)
        self._sample()
        if log:
            assert weights is not None
            self.run.save_model(weights, {"step": self.step, "bits_per_byte": score})
            log.append({"step": self.step, "seconds": self.elapsed, "eval/bits_per_byte": score})
            log.close()
            report.end(score, self.elapsed)
        self.engine.wait()
        return Result(self.run, self.step, self.elapsed, score, report.baselines if writes else {}, True)

    def _steps(self, log: MetricsLog | None, report: Report, stop: threading.Event) -> bool:
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
        """Time on this process's clock; where time limits the run, on the mean of all, so that they act alike."""
        elapsed = time.monotonic() - begin
        if self.config.train.seconds is None:
            return elapsed
        return float(self.engine.mean(torch.tensor(elapsed, dtype=torch.float64, device=self.engine.device)))

    def _progress(self) -> float:
        """How much of the run is over, from 0 to 1."""
        settings = self.config.train
        share = self.step / settings.steps
        return share if settings.seconds is None else max(share, self.elapsed / settings.seconds)

    def _update(self) -> tuple[Tensor, Tensor]:
        settings = self.config.train
        # the first step has a rate above 0, and so has the last
        progress = min(1.0, self._progress() + 0.5 / settings.steps)
        scale = factor(progress, warmup=settings.warmup, decay=settings.decay)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        batch = windows(
            self.tokens,
            self.step,
            batch=self.config.data.batch,
            length=self.config.data.window,
            seed=settings.seed,
            rank=self.engine.rank,
            world=self.engine.world,
        ).to(self.engine.device)
        return self.engine.update(batch.chunk(settings.accumulate))

    def _log(self, log: MetricsLog | None, bar: Any, loss: float, norm: float, rate: float) -> None:
        if log is None:
            return
        bits = loss / math.log(2)
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
        score = self._evaluate(held_out_text(self.corpus.held_out, self.config.train.eval_bytes))
        self._sample()
        if log:
            log.append({"step": self.step, "seconds": self.elapsed, "eval/bits_per_byte": score})
            report.plot()
            if not self.quiet:
                bar.write(f"step {self.step}: held out {score:.3f} bits per byte")

    def _sample(self) -> None:
        """Text of the model's own, written by the first process; where weights are cut up, all must ask for it."""
        if self.engine.rank == 0 or self.engine.cut:
            self.report.sample(self.lm, self.step, self.config, write=self.engine.rank == 0)

    def _evaluate(self, held_out: npt.NDArray[np.uint8]) -> float:
        data, engine = self.config.data, self.engine
        text = torch.from_numpy(held_out).to(engine.device)
        shared: dict[str, Any] = {"rank": engine.rank, "world": engine.world, "total": engine.total}
        if streams := self.config.train.eval_streams:
            return stream_bits_per_byte(self.lm, text, streams=streams, piece=data.window, **shared)
        return bits_per_byte(
            self.lm,
            text,
            window=data.window,
            batch=4 * data.batch,
            **shared,
        )

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        losses = [float(loss) for loss in self.losses]
        meta = {"step": self.step, "elapsed": self.elapsed, "losses": losses}
        self.engine.kept.save(self.run.path, meta, self._own)

    def _own(self) -> Iterator[tuple[str, Stretch]]:
        """What a checkpoint has of this process besides the model and its optimizer."""
        for name, state in random_state().items():
            yield f"{RANDOM}{self.engine.rank}.{name}", Stretch(state)

    def _load(self) -> None:
        with Parts(self.run.path) as parts:
            self.engine.kept.load(parts)
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
        self.losses = [torch.tensor(loss, device=self.engine.device) for loss in meta["losses"]]
        restore_random_state(random)


def _shared(run: Run | None) -> Run:
    """The first process's run folder, in every process."""
    path = [str(run.path) if run else None]
    torch.distributed.broadcast_object_list(path, src=0)
    return Run(Path(str(path[0])))


@contextmanager
def _stop_signal() -> Iterator[threading.Event]:
    """Set by the first Ctrl-C or SIGTERM, so that a step is never cut in two; the second acts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: Any) -> None:
        stop.set()
        for n, before in old.items():
            signal.signal(n, before)

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, before in old.items():
            signal.signal(number, before)
