"""`train(config)` makes a run folder, trains, evaluates, saves, and says how it went."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from nestopt.config import Config, ConfigError
from nestopt.train import engines
from nestopt.train.engines import peers
from nestopt.train.engines.alike import facts
from nestopt.train.engines.engine import device_of
from nestopt.train.folder import Hold
from nestopt.train.run import Result, Run
from nestopt.train.together import agreed
from nestopt.train.training import Training
from nestopt.train.trust import check_trusted


def train(
    config: Config | None = None,
    *,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    reset_data: bool = False,
    trust: bool = False,
    quiet: bool = False,
) -> Result:
    """Train a language model on bytes, or on the tokens of documents.

    Args:
        config: the run; None is the default one (or, with `resume`, the one the run was started with).
        resume: the folder of an interrupted run, to go on with exactly where its checkpoint is.
        init_from: a run's folder or a safetensors file, with whose weights a new run begins.
        reset_data: with `resume`, begin the data anew, with another seed, text, window or batch if they are others.
        trust: with `resume` and no `config`, also do what its configuration asks for outside of its folder.
        quiet: no progress bar and no report.

    Raises:
        ConfigError, CorpusError, CheckpointError: something given can't be used; says what and why.
        TrainingError: a loss, a gradient or a weight is not finite, or another process failed. Where one process fails,
            all end, within seconds.
        OSError: something can't be written; says where.
    """
    with peers.watching() as watch:
        run = Run.open(resume) if resume is not None else None
        if run is not None and init_from is not None:
            raise ConfigError("a resumed run has its weights already; give resume, or init_from for a new run")
        if run is None and reset_data:
            raise ConfigError("reset_data is for a run that is resumed; a new one begins its data anyway")
        if config is None:
            config = Config() if run is None else run.config()
            if run is not None and not trust:
                check_trusted(config, run.path, training=True)
        watch.join(config.train.timeout)
        if watch.joined:
            watch.compare(facts(config, device_of(config.train.device), resume))
        engine = engines.make(config)
        try:
            result = _train(config, engine, run, quiet, init_from, reset_data)
        except BaseException:
            engine.abandon()
            raise
        engine.close()
        return result


def _train(
    config: Config,
    engine: engines.Engine,
    run: Run | None,
    quiet: bool,
    init_from: str | Path | None,
    reset_data: bool,
) -> Result:
    with ExitStack() as end:

        def hold(run: Run) -> Hold | None:
            if engine.rank:
                return None
            run.check_own()
            return end.enter_context(run.hold())

        held = None if run is None else agreed(engine, lambda: hold(run))
        training = Training(config, engine, run, quiet, init_from, reset_data)
        end.callback(training.close)
        training.held = agreed(engine, lambda: hold(training.run)) if run is None else held
        return training.run_to_the_end()
