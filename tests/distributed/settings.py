"""What is trained, by whom: shared by the tests and the processes that they start."""

from __future__ import annotations

from typing import Any

MATRIX_WEIGHTS = 0  # every weight is cut up, however small: by default DeepSpeed keeps small ones whole
ENGINES: dict[str, dict[str, Any]] = {
    "ddp": {"engine": "ddp"},
    "fsdp2": {"engine": "fsdp2"},
    "zero 0": {"engine": "deepspeed", "zero_stage": 0},
    "zero 1": {"engine": "deepspeed", "zero_stage": 1},
    "zero 2": {"engine": "deepspeed", "zero_stage": 2},
    "zero 3": {
        "engine": "deepspeed",
        "zero_stage": 3,
        "deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": MATRIX_WEIGHTS}},
    },
}

HOPE = {
    "dim": 16,
    "blocks": 2,
    "heads": 2,
    "mixers": [{"level": "self_modifying", "chunk": 8, "projection_chunk": 8}, "attention"],
    "gate_output": True,
    "tie": True,
    "segment": 16,
    "mlp": {"level": "cms", "periods": [8], "learn": "context", "teach": "loss", "through": "first_order"},
}
TRANSFORMER = {
    "mixer": "attention",
    "gate_output": False,
    "dim": 16,
    "blocks": 2,
    "heads": 2,
    "mlp": {"level": "cms", "periods": [1, 2]},
}

# in float32: bfloat16, where Newton-Schulz would be by default, rounds away what is compared
M3 = {"level": "m3", "slow_period": 3, "dtype": "float32"}
THREE = [
    {
        "level": "parallel",
        "levels": {
            "fast": "momentum",
            "slow": {"level": "nest", "outer": {"level": "momentum", "beta": 0.5, "period": 3}, "inner": "momentum"},
        },
    },
    {"level": "newton_schulz", "dtype": "float32"},
]
AVERAGED = {"level": "weight_average", "decay": 0.5, "inner": THREE}
REST = {"stack": "adamw", "lr": 0.003}
RUNS = {
    "hope": {"model": HOPE, "optimizer": {"stack": M3, "lr": 0.01, "weight_decay": 0.1, "rest": REST}},
    "transformer": {
        "model": TRANSFORMER,
        "optimizer": {"stack": AVERAGED, "lr": 0.01, "weight_decay": 0.1, "rest": REST},
    },
}

STEPS, SAVED = 12, 8
"""Of a run, and at its last checkpoint, which is in the middle of the slow levels' periods."""


def run(kind: str, text: str, out: str, **train: Any) -> dict[str, Any]:
    """The configuration of a run of a few seconds."""
    return {
        **RUNS[kind],
        "data": {"path": text, "window": 24, "batch": 8},
        "train": {
            "steps": STEPS,
            "log_every": 1,
            "eval_every": 5,
            "eval_bytes": 400,
            "final_bytes": 400,
            "save_every": 0,
            "sample_bytes": 8,
            "clip": 0.5,
            "device": "cpu",
            "threads": 1,
            "learn": "all",
            "eval_streams": 0,
            "out": out,
            **train,
        },
    }


def document_run(kind: str, shards: str, out: str, **train: Any) -> dict[str, Any]:
    """The same on documents, which begin anew where they begin, in batches of one row."""
    dataset = {"dataset": "documents", "path": shards, "tokenizer": f"{shards}/tokenizer.json", "held_out": 10}
    found = run(kind, "", out, accumulate=2, **train)
    found["model"] = {**found["model"], "vocab": 400}
    found["data"] = {"dataset": dataset, "window": 24, "batch": 4}
    return found


LEVELS: dict[str, Any] = {
    "gd": "gd",
    "momentum": {"level": "momentum", "period": 2},
    "preconditioned_momentum": "preconditioned_momentum",
    "delta_momentum": "delta_momentum",
    "feature_momentum": "feature_momentum",
    "deep_momentum": "deep_momentum",
    "adam": "adam",
    "adamw": {"level": "adamw", "weight_decay": 0.1},
    "matrix_adagrad": "matrix_adagrad",
    "shampoo": "shampoo",
    # of a gradient with fewer rows than columns Adam's basis is open, and a momentum's does not matter
    "soap": {"level": "soap", "of": "momentum", "basis_every": 2},
    "muon": {"level": "muon", "dtype": "float32"},
    "m3": {"level": "m3", "slow_period": 2, "dtype": "float32"},
    "dgd": "dgd",
    "ggd": "ggd",
    "second_moment": "second_moment",
    "regression_optimum": "regression_optimum",
    "ftrl": {"level": "ftrl", "l1": 1e-4},
    "cms": {"level": "cms", "periods": [1, 2]},
    "average": "average",
    "weight_average": {"level": "weight_average", "inner": "adam"},
    "schedule_free": "schedule_free",
}
"""A spec of every level on gradients."""

STACKS: dict[str, Any] = {
    "links in slices": {
        "stack": ["gradient_correction", {"level": "clip", "by": "value", "limit": 0.01}, "weight_decay"]
    },
    "links at owners": {"stack": [{"level": "clip", "by": "adaptive", "limit": 0.1}, "lamb"]},
    "lookahead of muon": {
        "level": "nest",
        "of": "weights",
        "outer": "gd",
        "inner": {"level": "muon", "dtype": "float32"},
        "period": 2,
    },
    "dgd, up every second step": {"stack": "dgd", "groups": [{"match": "up", "period": 2}], "rest": "adamw"},
}
"""Sections of a configuration that are more than a level."""
