"""Whether callbacks and loggers work in a run: they are tried in one of a second."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from nestopt.config import Config
from nestopt.core import Part
from nestopt.testing.parts import check_spec
from nestopt.train.errors import extra


def check_in_a_run(part: Part, folder: str | Path | None = None) -> Path:
    """Assert that a callback or a logger, which must be registered, survives a small run that is taken up once.

    Args:
        part: the callback or the logger.
        folder: where the run is made; None is a temporary one.

    Returns:
        The run's folder, to look at what was written; gone already where none was given.

    Raises:
        AssertionError, TrainingError: it does not; says what.
        MissingExtra: training, or the logger, needs what is not installed.
    """
    check_spec(part)
    if folder is None:
        with tempfile.TemporaryDirectory() as temporary:
            return check_in_a_run(part, temporary)
    with extra("train"):
        import tqdm  # noqa: F401
    from nestopt.train.loop import train

    text = Path(folder) / "text.txt"
    text.write_text("levels remember gradients and tokens alike. " * 120)
    settings: dict[str, Any] = {"eval_bytes": 100, "final_bytes": 100, "sample_bytes": 0, "threads": 1, "device": "cpu"}
    steps = {"steps": 4, "eval_every": 2, "save_every": 2, "log_every": 1, "out": str(Path(folder) / "runs")}
    data = {
        "model": {"dim": 8, "blocks": 1, "heads": 1, "mixer": "linear_attention"},
        "data": {"path": str(text), "window": 8, "batch": 2},
        "train": settings | steps,
    }
    config = Config.from_data(data)
    setattr(config.train, f"{part.kind}s", [part])
    before = getattr(config.train, f"{part.kind}s")[0]
    result = train(config, quiet=True)
    config.train.steps = 6
    result = train(config, resume=result.run.path, quiet=True)
    assert result.bits_per_byte is not None, f"{part.label}: the run did not end by itself"
    assert part == before, f"{part.label}: the run changed its fields"
    return result.run.path
