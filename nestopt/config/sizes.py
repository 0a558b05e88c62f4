"""Models by name: Hope and its baselines at the sizes of the paper's tables."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from nestopt.config.errors import ConfigError
from nestopt.core import UnknownName, hookimpl, registry

_SHAPES: dict[str, dict[str, Any]] = {
    "340m": {"dim": 1024, "blocks": 24, "heads": 16},
    "760m": {"dim": 1536, "blocks": 24, "heads": 16},
    "1.3b": {"dim": 2048, "blocks": 24, "heads": 32},
}

_MIXERS: dict[str, Any] = {
    "hope": {"level": "self_modifying", "chunk": 64, "projection_chunk": 256},
    "transformer": "attention",
    "retnet": "retnet",
    "deltanet": "deltanet",
    "titans": {"level": "titans", "chunk": 64, "read": "chunk"},
}

_HIDDEN: dict[str, tuple[int, int, int]] = {
    "hope": (1536, 2432, 3392),
    "transformer": (4224, 6592, 8448),
    "retnet": (3712, 5824, 7424),
    "deltanet": (3712, 5760, 7424),
    "titans": (3520, 5568, 7232),
}
"""Hidden units of each MLP, by which a model comes to its size: what is nearest among multiples of 64."""

NAMES: tuple[str, ...] = tuple(f"{kind}-{size}" for kind in _MIXERS for size in _SHAPES)
"""`hope-340m`, `hope-760m`, `hope-1.3b`, and the same for `transformer`, `retnet`, `deltanet` and `titans`."""


def named(name: str) -> dict[str, Any]:
    """Return the model section of a size by its name, as plain data: `named("hope-340m")`; a plugin's, too.

    All of nestopt's have a vocabulary of 32,000 tokens, tied to the head, and 24 blocks; parameters are within 2 % of
    the name. The width of the MLPs makes up for what a mixer takes more or less than another's. Hope's continuum has
    two of them, written every 256 and every 1,024 tokens by the model's own loss.

    Raises:
        ConfigError: for a name that no model has.
    """
    try:
        return copy.deepcopy(dict(registry.get("model", name)))
    except UnknownName as error:
        raise ConfigError(str(error)) from None


def _section(name: str) -> dict[str, Any]:
    kind, _, size = name.partition("-")
    mlp: dict[str, Any] = {"level": "cms", "periods": [1]}
    if kind == "hope":
        mlp = {"level": "cms", "periods": [256, 1024], "learn": "context", "teach": "loss", "through": "first_order"}
    mlp["memory"] = {"memory": "mlp", "hidden": _HIDDEN[kind][list(_SHAPES).index(size)], "residual": False}
    return {
        "vocab": 32000,
        "tie": True,
        "mixer": _MIXERS[kind],
        "mlp": mlp,
        "gate_output": kind != "transformer",
        "segment": 256 if kind == "hope" else 0,
        **_SHAPES[size],
    }


@hookimpl
def nestopt_register_models(register: Callable[[str, Mapping[str, Any]], None]) -> None:
    """Register the models of this file."""
    for name in NAMES:
        register(name, _section(name))
