"""Models on the bundled text: continua of one to four levels, Hope without one of its parts, and `--baseline`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from nestopt.config import Config, ConfigError, ModelConfig
from nestopt.core.memories import Mlp, Window
from nestopt.core.part import Gate
from nestopt.evidence.forgetting import documents_in, forgetting
from nestopt.evidence.trials import Plan, settings
from nestopt.levels.continuum.level import Cms
from nestopt.levels.presets import WindowAttention
from nestopt.levels.self_modifying.level import ADAPTIVE, SelfModifying
from nestopt.models import HopeLM
from nestopt.train.compare import SECONDS, THIS, TOKENS, Row, as_large, compare, like, parameters
from nestopt.train.data.sources import dataset_of
from nestopt.train.loop import train
from nestopt.train.reading import read, texts
from nestopt.train.run import Result

LATER = (0, 1, 10)
"""How much other text is read before it is measured what is kept, in documents."""


class Continuum:
    """The bundled text, for models whose MLPs are a continuum of so many levels: `1`, `2`, `3` or `4`."""

    def config(self, model: str, plan: Plan) -> Config:
        if model not in ("1", "2", "3", "4"):
            raise ConfigError.refuse("--models", model, "give 1, 2, 3 or 4, the levels of a continuum")
        count, hidden = int(model), 48 if plan.quick else 192
        periods = tuple(16 * 4**i for i in range(count))
        memory = Mlp(hidden=hidden // count, residual=False)
        learns = {"learn": "context", "teach": "loss", "rate": 0.08, "through": "first_order"}
        mlp = Cms(periods=periods, memory=memory, **learns)  # type: ignore[arg-type]
        dim, window = (16, 64) if plan.quick else (64, 128)
        section = {"mixer": WindowAttention(memory=Window(32)), "mlp": mlp, "dim": dim, "blocks": 2, "heads": 2}
        data = {"window": window, "batch": 8}
        return Config(model=section, data=data, train={**settings(plan), "eval_streams": 8})

    def measure(self, model: HopeLM, result: Result, plan: Plan) -> dict[str, float]:
        config = result.run.config()
        text = torch.from_numpy(dataset_of(config).load().held_out).long()
        count, size = (2, 32) if plan.quick else (8, 512)
        documents, new = documents_in(text, size, count, LATER[-1])
        kept = forgetting(model, documents, new, times=LATER, piece=config.data.window).learning.gain[-1].mean
        return {**_bits(model, result), "kept": kept}


LEFT_OUT: Mapping[str, Mapping[str, Any]] = {
    "hope": {},
    "no-dgd": {"delta": 0.0},
    "no-momentum": {"momentum": None},
    "no-decay": {"keep": 1 - 1e-7, "adaptive": tuple(name for name in ADAPTIVE if name != "alpha")},
    "no-cms": {},
    **{f"no-{part}": {"adaptive": tuple(name for name in ADAPTIVE if name != part)} for part in "kvq"},
}
"""Hope, and what is other where it has to do without a part (NL table 6). Without a decay the gate α starts so near 1
that nothing moves it; without the continuum MLPs stay as they were trained."""


class Ablation:
    """The bundled text, for Hope with all of its parts, and without each of them."""

    def config(self, model: str, plan: Plan) -> Config:
        if model not in LEFT_OUT:
            raise ConfigError.refuse("--models", model, f"give some of {', '.join(LEFT_OUT)}")
        dim, window = (16, 64) if plan.quick else (32, 128)

        def of(model: str, hidden: int) -> ModelConfig:
            whole: dict[str, Any] = {"adaptive": ADAPTIVE, "momentum": Gate(0.1), "memory": Mlp(hidden=dim)}
            memory = Mlp(hidden=hidden, residual=False)
            learns: dict[str, Any] = {"learn": "context", "teach": "loss", "rate": 0.08, "through": "first_order"}
            mlp = Cms((1, 1), memory=memory) if model == "no-cms" else Cms((16, 64), memory=memory, **learns)
            mixer = SelfModifying(**{**whole, **LEFT_OUT[model]})
            return ModelConfig(mixer=mixer, mlp=mlp, dim=dim, blocks=2, heads=2)

        wanted = parameters(of("hope", 3 * dim))
        section = as_large(lambda hidden: of(model, hidden), wanted, model)
        return Config(model=section, data={"window": window, "batch": 8}, train={**settings(plan), "eval_streams": 8})

    def measure(self, model: HopeLM, result: Result, plan: Plan) -> dict[str, float]:
        return _bits(model, result)


def _bits(model: HopeLM, result: Result) -> dict[str, float]:
    """Return bits per byte, less than 0: by `valid` rates are chosen."""
    config = result.run.config()
    tune, test = texts(config, config.train.final_bytes)
    return {"valid": -read(config, model, tune)[0], "bits": -read(config, model, test)[0]}


def language(plan: Plan) -> list[dict[str, object]]:
    """Train the plan's models, each as large as the default one, by `nestopt train --baseline`, and return the rows.

    Scores are bits per byte, less than 0, still and as each learns what it reads.
    """
    return [row for seed in range(plan.seeds) for row in _of_seed(plan, seed)]


def _of_seed(plan: Plan, seed: int) -> list[dict[str, object]]:
    ours, *others = plan.models
    key = f"{', '.join(plan.models)}, seed {seed}, {plan.seconds or plan.steps}"

    def measure() -> dict[str, object]:
        plan.say(key)
        small = {"dim": 64} if plan.quick else {}
        bytes_ = {"final_bytes": 512} if plan.quick else {}
        length = {"seconds": plan.seconds} if plan.seconds else {"steps": plan.steps, "seconds": None}
        never = {"eval_every": 0, "save_every": 0, "sample_bytes": 0, "clock": "cpu", "out": str(plan.out / "runs")}
        config = like(Config(model=small, train={**never, **length, **bytes_, "seed": seed}), ours)
        for name in others:
            like(config, name)
        result = train(config, quiet=True)
        if not result.finished:
            raise KeyboardInterrupt
        rows = compare(config, result, others, quiet=True)
        if len(rows) < 1 + 2 * len(others):
            raise KeyboardInterrupt
        return {"found": [found for row in rows for found in _row(row, ours)]}

    return list(plan.store.once(key, measure)["found"])


def _row(row: Row, ours: str) -> list[dict[str, object]]:
    """Return a row of `compare` as one of a claim; the first model stands at both limits."""
    assert row.learning is not None
    return [
        {
            "task": "text",
            "model": ours if row.limit == THIS else row.model,
            "limit": limit,
            "seed": row.seed,
            "rate": row.rate,
            "parameters": row.parameters,
            "steps": row.steps,
            "seconds": row.seconds,
            "scores": {"still": -row.still, "learning": -row.learning},
        }
        for limit in ((TOKENS, SECONDS) if row.limit == THIS else (row.limit,))
    ]
