"""Rates of a GPU: stated, read, measured; and what is wrong with them is refused by name."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from nestopt.cli import main
from nestopt.config import ConfigError
from nestopt.models.cost import Cost
from nestopt.train.planning import Rates, command, measure
from nestopt.train.planning.rates import PEAK_TFLOPS

FLOPS = {"float32": 50e12, "tf32": 400e12, "bfloat16": 700e12}
GIVEN = ["model.dim=16", "model.blocks=1", "model.heads=2", "data.window=16", "data.batch=2", "--gpus", "1"]


def written(tmp_path: Path, rates: Any) -> str:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"machine": "a card", "rates": rates}), encoding="utf-8")
    return str(path)


def test_stated_rates_are_a_share_of_the_peaks() -> None:
    half = Rates.stated({"float32": 20.0}, bandwidth=2000.0, launch=4.0, share=0.5)
    assert half.flops_per_s == {"float32": 1e13, "tf32": 494.7e12 / 2, "bfloat16": 989.4e12 / 2}
    assert (half.bytes_per_s, half.per_launch_s) == (1e12, pytest.approx(4e-6))
    assert half.source == "stated, not measured: 50% of the peaks that were given, and 4 µs a launch"
    assert "an H100 SXM's data sheet" in Rates.stated().source


def test_each_kind_of_work_takes_its_time() -> None:
    rates = Rates(1e-6, 1e12, FLOPS)
    cost = Cost({"float32": 50e12, "bfloat16": 1400e12, "tf32": 0, "float16": 700e12}, bytes=3e12, ops=7_000_000)
    assert rates.seconds(cost) == {"launches": pytest.approx(7), "bytes": 3.0, "products": 4.0}


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "zero": ({"bytes_per_s": 0}, "rates.bytes_per_s: 0 is not allowed; give a number above 0"),
    "negative": ({"per_launch_s": -1e-6}, "rates.per_launch_s: -1e-06 is not allowed"),
    "not a number": ({"bytes_per_s": float("nan")}, "rates.bytes_per_s: nan is not allowed"),
    "endless": ({"bytes_per_s": float("inf")}, "rates.bytes_per_s: inf is not allowed"),
    "text": ({"bytes_per_s": "fast"}, "rates.bytes_per_s: 'fast' is not allowed"),
    "a dtype's": ({"flops_per_s": {**FLOPS, "tf32": 0.0}}, "rates.flops_per_s.tf32: 0.0 is not allowed"),
    "a dtype left out": (
        {"flops_per_s": {"float32": 1.0, "bfloat16": 1.0}},
        "rates.flops_per_s.tf32: null is not allowed",
    ),
    "another dtype": (
        {"flops_per_s": {**FLOPS, "float64": 1.0}},
        "rates.flops_per_s.float64: 1.0 is not allowed; flops_per_s has no key 'float64'.",
    ),
    "one number": ({"flops_per_s": 1e12}, "rates.flops_per_s: 1000000000000.0 is not allowed; give float32, tf32 and"),
}


@pytest.mark.parametrize("name", WRONG)
def test_rates_that_can_not_be_are_refused(name: str, tmp_path: Path) -> None:
    changed, message = WRONG[name]
    rates = {"per_launch_s": 5e-6, "bytes_per_s": 3e12, "flops_per_s": FLOPS, **changed}
    for make in (lambda: Rates(**rates), lambda: Rates.read(written(tmp_path, rates))):
        with pytest.raises(ConfigError, match=re.escape(message)):
            make()


@pytest.mark.parametrize("missing", ["per_launch_s", "bytes_per_s", "flops_per_s"])
def test_a_file_without_a_key_is_refused(missing: str, tmp_path: Path) -> None:
    rates = {"per_launch_s": 5e-6, "bytes_per_s": 3e12, "flops_per_s": FLOPS}
    del rates[missing]
    path = written(tmp_path, rates)
    wanted = f"\"rates\" in it has no '{missing}'; it must have per_launch_s, bytes_per_s and flops_per_s"
    with pytest.raises(ConfigError, match=re.escape(wanted)):
        Rates.read(path)


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"rates": 3}', '{"rate": {}}'])
def test_a_file_that_is_none_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"--rates: '.*gpu\.json' is not allowed; .* JSON"
    ):  # long paths are cut short
        Rates.read(path)
    with pytest.raises(ConfigError, match="No such file"):
        Rates.read(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tflops": {"float64": 1.0}}, "--tflops.float64: 1.0 is not allowed; it has no key 'float64'"),
        ({"tflops": {"tf32": -1.0}}, "--tflops tf32: -1.0 is not allowed"),
        ({"bandwidth": 0.0}, "--bandwidth: 0.0"),
        ({"launch": float("nan")}, "--launch: nan"),
        ({"share": 1.5}, "--share: 1.5 is not allowed; give a number above 0, 1 at the most"),
        ({"share": float("nan")}, "--share: nan"),
    ],
)
def test_stated_peaks_out_of_range_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Rates.stated(**given)


def test_what_is_measured_can_be_written_and_read(tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    rates = measure("cpu")
    assert torch.backends.cuda.matmul.fp32_precision == before
    assert set(rates.flops_per_s) == set(PEAK_TFLOPS)
    assert 1e-8 < rates.per_launch_s < 1e-2
    assert rates.bytes_per_s > 1e7
    assert min(rates.flops_per_s.values()) > 1e7
    path = written(tmp_path, dataclasses.asdict(rates))
    assert Rates.read(path) == dataclasses.replace(rates, source=f"from {path}")


def test_a_device_that_torch_does_not_know_is_refused() -> None:
    with pytest.raises(RuntimeError, match="vax"):
        measure("vax")


def test_the_plan_says_which_rates_it_has(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(tmp_path, {"per_launch_s": 2e-6, "bytes_per_s": 3e12, "flops_per_s": FLOPS})
    assert main(["plan", *GIVEN, "--rates", path]) == 0
    text = capsys.readouterr().out
    assert f"Rates: from {path}." in text
    assert "2.0 µs" in text
    assert "3,000.0 GB/s" in text
    assert main(["plan", *GIVEN, "--tflops", "float32=10,tf32=20", "--share", "1", "--launch", "3"]) == 0
    text = capsys.readouterr().out
    assert "10.0 TFLOP/s" in text
    assert "Rates: stated, not measured: 100% of the peaks that were given, and 3 µs a launch." in text


def test_rates_that_contradict_each_other_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = written(tmp_path, {"per_launch_s": 2e-6, "bytes_per_s": 3e12, "flops_per_s": FLOPS})
    for flags, message in (
        (["--rates", path, "--launch", "3"], "--launch: 3.0 is not allowed; it is about peaks of a data sheet"),
        (["--rates", "measured", "--share", "1"], "or give --rates stated, not measured"),
        (["--tflops", "989"], "--tflops: '989' is not allowed; give 10¹² operations a second by dtype"),
    ):
        assert main(["plan", *GIVEN, *flags]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_nothing_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert command._gpu({}).rates == Rates.stated()
    assert main(["plan", *GIVEN, "--rates", "measured"]) == 2
    assert "--rates: 'measured' is not allowed; there is no CUDA device here" in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_device_is_measured() -> None:
    gpu = command._gpu({})
    assert gpu.rates.source == f"measured on {torch.cuda.get_device_name()}"
    assert gpu.memory == torch.cuda.get_device_properties(0).total_memory / 1e9
    flops = gpu.rates.flops_per_s
    assert 0 < flops["float32"] <= flops["tf32"] * 1.1
    assert command._gpu({"share": 1.0}).rates == Rates.stated(share=1.0)
