"""What is trained in the part `training`, and what `nestopt plan` says of it: counted beforehand, by `--prepare`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.precision import layer_options
from nestopt.config import Config, load
from nestopt.config.sizes import named
from nestopt.train.planning import Sharing, scale

MODELS = ("transformer-340m", "deltanet-340m", "titans-340m", "hope-340m")
SETTINGS = Path(__file__).parents[2] / "examples" / "scale" / "340m.yaml"
ROWS, WINDOW = 2, 4096
"""Of the one micro-batch of a step: a Hope of twice the rows takes 72 GB by its plan."""


def config(name: str, *, tiny: bool = False, device: str = "cpu", precision: str | None = None) -> Config:
    """The published settings of that size, but for a step of one small batch in one process."""
    found = load(SETTINGS, ["train.engine=single", "train.accumulate=1", f"train.device={device}"])
    assert isinstance(found, Config)
    section = {**_smaller(named(name), tiny), **layer_options(precision)}
    data = {**found.to_data()["data"], "batch": ROWS, "window": 64 if tiny else WINDOW}
    return Config.from_data({**found.to_data(), "model": section, "data": data})


def _smaller(section: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """With `tiny`, a toy of the same parts."""
    if not tiny:
        return section
    mlp = {**section["mlp"], "memory": {**section["mlp"]["memory"], "hidden": 48}}
    if len(mlp["periods"]) > 1:
        mlp["periods"] = [16, 32]
    mixer = section["mixer"]
    if isinstance(mixer, Mapping):
        mixer = {key: value if key == "level" or isinstance(value, str) else 16 for key, value in mixer.items()}
    sizes = {"vocab": 97, "dim": 32, "blocks": 1, "heads": 2, "segment": 32 if section["segment"] else 0}
    return {**section, **sizes, "mixer": mixer, "mlp": mlp}


def count(name: str, *, tiny: bool = False, precision: str | None = None) -> dict[str, Any]:
    """Bytes at the most, and what a step costs: launches, bytes moved, and operations of products by their dtype.

    A Hope of 340M takes a minute of one core.
    """
    settings = config(name, tiny=tiny, precision=precision)
    found = scale(settings, Sharing.of(settings, 1))
    cost, memory, batch = found.passes + found.step, found.memory.total, [ROWS, found.window]
    return {
        "memory": memory,
        "batch": batch,
        "launches": cost.ops,
        "bytes": cost.bytes,
        "products": dict(cost.products),
    }


def seconds(counted: Mapping[str, Any], rates: Mapping[str, Any]) -> dict[str, float]:
    """What the launches, the bytes and the products of a step take at these rates, each by itself."""
    found = {}
    if "launches" in counted and "per_launch_s" in rates:
        found["launches"] = counted["launches"] * rates["per_launch_s"]
    if "bytes" in counted and "bytes_per_s" in rates:
        found["bytes"] = counted["bytes"] / rates["bytes_per_s"]
    flops = rates.get("flops_per_s", {})
    if all(dtype in flops for dtype in counted["products"]):
        found["products"] = sum(count / flops[dtype] for dtype, count in counted["products"].items())
    return found
