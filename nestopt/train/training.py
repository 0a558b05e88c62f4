"""A training run in one process: its loop, what it measures and saves on the way, and how it ends."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nestopt.config import Config, as_saved, save
from nestopt.core.device import upload
from nestopt.nn.hope import Learn
from nestopt.optim import optimizer as make_optimizer
from nestopt.optim.sharded.saved import TensorSlice
from nestopt.train import engines, loggers
from nestopt.train.callbacks import Callbacks, Moment, blamed
from nestopt.train.checkpoints.shards import ShardReader, put_weights
from nestopt.train.data import sources
from nestopt.train.data.source import Batch, HeldOut, TaskBatch, merged
from nestopt.train.data.windows import Windows
from nestopt.train.engines import peers
from nestopt.train.engines.fsdp_methods import check_signal
from nestopt.train.errors import CorpusError, damaged, extra, whole_number
from nestopt.train.evaluate import measured
from nestopt.train.folder import INDEX, Hold
from nestopt.train.loggers import Loggers
from nestopt.train.objective import Objective
from nestopt.train.report.report import Report
from nestopt.train.resume import check_fixed, fixed, saved_random_state, score_at
from nestopt.train.rng import random_state, restore_random_state
from nestopt.train.run import Result, Run, build_model, check_batch, weights_from
from nestopt.train.schedule import Schedule
from nestopt.train.together import Stop, agreed, stop_signal

with extra("train"):
    from tqdm import tqdm

RANDOM = "random."

EARLY = 60.0
"""Seconds of training after which a run first shows what it does, and saves, whatever else it is told."""


class Training:
    """A run in this process: what it trains, and how far it has come."""

    def __init__(
        self,
        config: Config,
        engine: engines.Engine,
        run: Run | None,
        quiet: bool,
        init_from: str | Path | None = None,
        reset: bool = False,
    ) -> None:
        self.config, self.engine, self.quiet = config, engine, quiet or engine.rank != 0
        for logger in loggers.of(config) if engine.rank == 0 else ():
            logger.require()
        check_batch(config, engine.world, engine.device)
        found = engine.gathered(sources.documents(config) if engine.rank == 0 else None)
        self.source = sources.make(config, engine.rank, engine.world, found[0])
        self.held_out = self.source.held_out(config.train.final_bytes)
        if len(self.held_out.tokens) < 2:
            raise CorpusError(f"{self.source.name}: one token is held out, which can't be measured; give more text")
        if (watch := peers.present()).joined:
            watch.compare({"the digest of the text": self._digest()})
        self.lm = build_model(config)
        if init_from is not None:
            agreed(engine, lambda: put_weights(self.lm, *weights_from(init_from)))
        self.lm.to(engine.device)
        size = sum(param.numel() for param in self.lm.parameters())
        engine.cut_up(self.lm)
        nested = make_optimizer(self.lm, config)
        for group in nested.param_groups:
            group["initial_lr"] = group["lr"]
        torch.manual_seed(config.train.seed)
        self.step, self.elapsed = 0, 0.0
        self.saved, self.best = -1, math.inf  # the step of the last checkpoint, and the best score of one
        self.held: Hold | None = None
        self.log: Loggers | None = None
        self.reset = reset
        self._now = time.process_time if config.train.clock == "cpu" else time.monotonic
        self.losses: list[Tensor] = []  # since the last line of the log
        learn: Learn = True if config.train.learn == "all" else "mixer"
        engine.attach(Objective(self.lm, learn), self.lm, nested)
        self.lm.lockstep = engine.cut
        if engine.cut:
            check_signal(self.lm)
        self.optimizer = engine.optimizer
        if run is None:
            made = agreed(engine, lambda: str(Run.create(config).path) if engine.rank == 0 else "")
            self.run = Run(Path(engine.gathered(made)[0]))
        else:
            self.run = run
            if run.begun:
                self._load(reset)
        self.callbacks = Callbacks(config.train.callbacks, engine.rank, self._moment)
        self.report = Report(self.run, self.source, self.held_out, size, quiet=self.quiet)

    def _digest(self) -> int:
        """Return a sum of the text that this process has, by which it is told from any other."""
        found = zlib.crc32(self.held_out.tokens.numpy().data)
        return zlib.crc32(self.source.training.data, found) if isinstance(self.source, Windows) else found

    def close(self) -> None:
        self.source.close()
        if self.log is not None:
            self.log.close()

    def run_to_the_end(self) -> Result:
        report = self.report
        writes = self.engine.rank == 0
        over = self.saved == self.step and self._progress() >= 1 and not self.reset
        score = agreed(self.engine, lambda: score_at(self.run, self.step) if over else None)
        if score is not None:
            report.say(f"the run ended at step {self.step}; to go on with it, give it more train.steps (or seconds)")
            return self._result(score, f"a run before, at step {self.step:,}")
        with stop_signal() as stop:
            if self.step == 0:
                report.begin(self.optimizer, self.config)
            log = None
            if writes:
                again = self._progress() >= 1  # what is measured at the end, if the run was stopped there
                once_more = "eval/bits_per_byte" if again else None
                log = self.log = Loggers(self.run, self.config, self.step, once_more)
                report.cut_samples(self.step - again)
            if self.reset:
                self._begin_data()
            finished = self._steps(log, report, stop)
            self._save()
        if not finished:
            ended = f"{stop.name} at step {self.step:,}"
            self.callbacks("on_end", None)
            report.interrupted(ended)
            return self._result(None, ended)
        try:
            score = self._end(log, report)
        except KeyboardInterrupt:
            report.interrupted(f"SIGINT while measuring, after step {self.step:,}")
            raise
        return self._result(score, self._ended())

    def _result(self, score: float | None, ended: str) -> Result:
        baselines = self.report.baselines if self.engine.rank == 0 and score is not None else {}
        return Result(self.run, self.step, self.elapsed, score, baselines, score is not None, ended)

    def _end(self, log: Loggers | None, report: Report) -> float:
        self.engine.check_weights()
        report.say(f"measuring on {self.held_out.bytes:,} held-out {report.unit}s …")
        with self.engine.evaluating():
            score = self._measure(self.held_out, log)
            weights = self.engine.checkpoints.whole_weights(self.run.path)
            self._sample()
            if log:
                assert weights is not None
                report.end(score, self.elapsed, self._ended())
                self.run.save_model(weights, {"step": self.step, "bits_per_byte": score})
            self.callbacks("on_eval", score)
            self.callbacks("on_end", score)
        self.engine.wait()
        return score

    def _moment(self, stop: Callable[[str], None]) -> Moment:
        return Moment(self.run, self.config, self.lm, self.optimizer, self.step, self.elapsed, stop)

    def _ended(self) -> str:
        """Say what ended a run that was not interrupted."""
        settings = self.config.train
        if self.callbacks.stopped:
            return f"{self.callbacks.stopped} (at step {self.step:,})"
        if self.step >= settings.steps:
            return f"its steps are done (train.steps={settings.steps})"
        of = f"{self.step:,} of {settings.steps:,} steps"
        return f"its time is over (train.seconds={settings.seconds:g}) after {of}; train.seconds=null sets no limit"

    def _steps(self, log: Loggers | None, report: Report, stop: Stop) -> bool:
        """Train until the end (True) or until asked to stop (False)."""
        settings = self.config.train
        bar = tqdm(total=settings.steps, initial=self.step, disable=self.quiet, unit="step", dynamic_ncols=True)
        begin, since = self._now() - self.elapsed, (time.monotonic(), self.step)
        losses = self.losses
        early = self.step == 0
        with bar:
            while self._progress() < 1:
                if self.engine.any(stop.is_set()):
                    return False
                if self.callbacks.any and self.engine.any(bool(self.callbacks.stopped)):
                    self.callbacks.stopped = next(filter(None, self.engine.gathered(self.callbacks.stopped)))
                    return True
                skipped = self.engine.skipped[0]
                self.engine.finite.step = self.step + 1
                loss, norm = self._update()
                if self.engine.skipped[0] == skipped:
                    losses.append(loss)
                self.step += 1
                self.elapsed = self._seconds_since(begin)
                bar.total = max(self.step, round(self.step / self._progress()))  # fewer, where time ends the run
                bar.update()
                self.callbacks("on_step", loss, norm)
                if self.step % settings.log_every == 0:
                    self.engine.check_finite()
                    now = time.monotonic()
                    rate = (self.step - since[1]) * self.config.data.batch * self.config.data.window / (now - since[0])
                    mean = torch.stack(losses).mean() if losses else torch.full_like(loss, math.nan)  # all were skipped
                    self._log(log, bar, float(self.engine.mean(mean)), float(norm), rate)
                    losses.clear()
                    since = (now, self.step)
                if self._progress() >= 1:
                    return True
                first = early and self.engine.any(self.elapsed >= EARLY)
                early = early and not first
                score = None
                if settings.eval_every and self.step % settings.eval_every == 0:
                    score = self._middle(log, report, bar)
                elif first:
                    with self.engine.evaluating():
                        self._show(log, report)
                best = score is not None and score < self.best
                due = settings.save_every and (first or best or self.step % settings.save_every == 0)
                if due:
                    self._save(score)
                if due or first or score is not None:  # which is no training
                    begin, since = self._now() - self.elapsed, (time.monotonic(), self.step)
        return True

    def _seconds_since(self, begin: float) -> float:
        """Return this process's time; where time limits the run, the mean of all processes', so that they act alike."""
        elapsed = self._now() - begin
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
        schedule = settings.decay_shape
        assert isinstance(schedule, Schedule)
        with blamed(schedule, f"at step {self.step + 1:,}"):
            scale = schedule(progress, settings.warmup, settings.decay)
            if not 0 <= scale < math.inf:
                raise ValueError(f"it gave {scale!r} at {progress:g} of the run; give 0 or more")
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * scale
        return self.engine.update(self._batches(self.source.batch()))

    def _batches(self, batch: Batch | TaskBatch) -> list[tuple[Tensor | None, ...]]:
        """Return what the objective is called with, `train.accumulate` times."""
        count = self.config.train.accumulate
        tokens = upload(batch.tokens, self.engine.device).chunk(count)
        if isinstance(batch, Batch) and batch.starts is None:
            return [(part,) for part in tokens]
        # each counts as many targets as its documents, or its examples, have: the mean is over those of all
        targets = self.engine.total(torch.full((), float(batch.targets), device=self.engine.device))
        scale = count * self.engine.world / targets.clamp_min(1)
        if isinstance(batch, Batch):
            assert batch.starts is not None
            return [(part, starts, scale) for part, starts in zip(tokens, batch.starts.chunk(count), strict=True)]
        answers, masks = (
            [None] * count if given is None else upload(given, self.engine.device).chunk(count)
            for given in (batch.answers, batch.mask)
        )
        return [(part, None, scale, *given) for part, *given in zip(tokens, answers, masks, strict=True)]

    def _log(self, log: Loggers | None, bar: Any, loss: float, norm: float, rate: float) -> None:
        if log is None:
            return
        bits = loss / math.log(2) / self.held_out.bytes_per_token  # as many bytes as a token has there
        bar.set_postfix_str(f"loss {loss:.3f}, {bits:.3f} {self.report.measure}, {rate:,.0f} tokens/s")
        self._check_folder()
        log.append(
            {
                "step": self.step,
                "seconds": self.elapsed,
                "train/loss": loss,
                "train/bits_per_byte": bits,
                "train/gradient_norm": norm,
                "train/skipped": self.engine.skipped[0],
                "train/tokens_per_second": rate,
                "lr": self.optimizer.param_groups[0]["lr"],
            }
        )

    def _middle(self, log: Loggers | None, report: Report, bar: Any) -> float:
        self.engine.check_weights()
        with self.engine.evaluating():
            score = self._measure(self.source.held_out(self.config.train.eval_bytes), log)
            if log and not self.quiet:
                bar.write(f"step {self.step}: held out {score:.3f} {report.measure}")
            self.callbacks("on_eval", score)
            self._show(log, report)
        return score

    def _show(self, log: Loggers | None, report: Report) -> None:
        self._sample()
        if log:
            report.plot()

    def _sample(self) -> None:
        """Let the first process write text of the model's own; where weights are cut up, all must ask for it."""
        if self.engine.rank == 0 or self.engine.cut:
            self.report.sample(self.lm, self.step, self.config, write=self.engine.rank == 0)

    def _evaluate(self, held_out: HeldOut) -> float:
        engine = self.engine
        shared: dict[str, Any] = {"rank": engine.rank, "world": engine.world, "total": engine.total}
        return measured(self.lm, held_out, self.config, quiet=self.quiet, **shared)

    def _measure(self, held_out: HeldOut, log: Loggers | None) -> float:
        score = self._evaluate(held_out)
        if log:
            self._check_folder()
            log.append({"step": self.step, "seconds": self.elapsed, "eval/bits_per_byte": score})
        return score

    def _check_folder(self) -> None:
        if self.held is not None:
            self.held.check()

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def _save(self, score: float | None = None) -> None:
        """Save a checkpoint, unless this step has one."""
        if self.saved == self.step:
            return
        self._check_folder()
        self.engine.check_weights()
        losses = [float(loss) for loss in self.losses]
        data = merged(self.engine.gathered(self.source.state_dict()))
        meta = {
            "step": self.step,
            "elapsed": self.elapsed,
            "losses": losses,
            "data": data,
            "skipped": self.engine.skipped,
            "config": fixed(self.config),
        }
        keep = self.config.train.keep
        self.engine.checkpoints.save(self.run.path, meta, self._own, score=score, keep=keep, make=False)
        self.saved, self.best = self.step, min(self.best, math.inf if score is None else score)
        self.callbacks("on_checkpoint", self.run.path / INDEX)

    def _begin_data(self) -> None:
        """Have the folder say what a run that has been given other data is now."""
        if self.engine.rank == 0:
            base, now = self.run.config(), self.config
            settings = base.train.model_copy(update={"seed": now.train.seed})
            with as_saved():
                save(base.model_copy(update={"data": now.data, "train": settings}), self.run.config_file)
        self.saved = -1
        self._save()

    def _own(self) -> Iterator[tuple[str, TensorSlice]]:
        """Yield what a checkpoint has of this process besides the model and its optimizer."""
        for name, state in random_state().items():
            yield f"{RANDOM}{self.engine.rank}.{name}", TensorSlice(state)

    def _load(self, reset: bool) -> None:
        engine = self.engine
        with agreed(engine, lambda: ShardReader(self.run.path, engine.rank, engine.world)) as parts:
            engine.checkpoints.load(parts)
            with damaged(parts.path):
                self._take(parts, reset)

    def _take(self, parts: ShardReader, reset: bool) -> None:
        """Take from a checkpoint what it has besides the model and its optimizer."""
        meta = parts.meta
        check_fixed(self.config, dict(meta["config"]) if "config" in meta else fixed(self.run.config()), reset)
        restored = saved_random_state(parts, RANDOM, self.engine.rank)
        self.step, self.elapsed = whole_number(meta["step"], "step"), float(meta["elapsed"])
        peers.present().compare({"the checkpoint's step": self.step})
        self.engine.skipped = [whole_number(n, "skipped") for n in meta.get("skipped", [0, 0])]
        if not 0 <= self.elapsed < math.inf or not isinstance(meta["losses"], list):
            raise ValueError(f"elapsed is {self.elapsed}, losses {meta['losses']!r}")
        self.losses = [torch.tensor(float(loss), device=self.engine.device) for loss in meta["losses"]]
        if not reset:
            self.source.load_state_dict(meta["data"])
        restore_random_state(restored)
        self.saved = self.step
        self.best = min((item.score for item in parts.kept if item.score is not None), default=math.inf)
