import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.train.report.metrics import MetricsLog, read

strings = st.text(max_size=10).filter(lambda text: text not in ("nan", "inf", "-inf"))
values = st.none() | st.booleans() | st.integers() | st.floats() | strings
records = st.lists(st.dictionaries(st.text(max_size=10), values, max_size=4), max_size=5)


@given(records)
@settings(max_examples=60, deadline=None)
def test_records_come_back_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, records: list[dict]) -> None:
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    with MetricsLog(path) as log:
        for record in records:
            log.append(record)
    assert repr(read(path)) == repr(records)  # repr: nan is not equal to itself, and 1 is equal to True


def test_each_line_is_in_the_file_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m")
    for step in range(3):
        log.append({"step": step})
        assert len(read(tmp_path / "m")) == step + 1
    log.close()


def test_not_finite_numbers_are_strict_json_and_come_back(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m") as log:
        log.append({"a": math.nan, "b": math.inf, "c": -math.inf, "d": np.float64("nan"), "e": np.float64(0.1)})
    line = (tmp_path / "m").read_text()
    assert json.loads(line, parse_constant=pytest.fail) == {"a": "nan", "b": "inf", "c": "-inf", "d": "nan", "e": 0.1}
    (record,) = read(tmp_path / "m")
    assert math.isnan(record["a"])
    assert record["b"] == math.inf
    assert record["c"] == -math.inf


def test_a_line_cut_by_a_crash_is_dropped_and_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricsLog(path) as log:
        log.append({"step": 1})
        log.append({"step": 2, "loss": 0.5})
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        kept = [{"step": 1}] if size >= first else []
        assert read(path) == kept
        with MetricsLog(path) as log:
            log.append({"step": 3})
        assert read(path) == [*kept, {"step": 3}]


def test_truncate_after_a_step(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with MetricsLog(path) as log:
        for record in (
            {"note": "start"},
            {"step": 1, "x": math.nan},
            {"step": 2},
            {"step": 2, "eval": 1.5},
            {"step": 3},
        ):
            log.append(record)
        log.truncate_after(2)
        assert [record.get("step") for record in read(path)] == [None, 1, 2, 2]
        assert math.isnan(read(path)[1]["x"])
        log.append({"step": 3, "again": True})
    assert read(path)[-1] == {"step": 3, "again": True}
    assert len(read(path)) == 5
    assert os.listdir(tmp_path) == ["m"]


def test_a_damaged_line_in_the_middle_is_an_error_with_its_number(tmp_path: Path) -> None:
    for damage in ('{"step": 2', "[1, 2]"):
        (tmp_path / "m").write_text(f'{{"step": 1}}\n{damage}\n{{"step": 3}}\n')
        with pytest.raises(ValueError, match="line 2"):
            read(tmp_path / "m")


@pytest.mark.parametrize("value", [torch.tensor(1.0), [1, 2], {"a": 1}, (1,)])
def test_other_values_are_refused_and_leave_no_trace(tmp_path: Path, value: object) -> None:
    with MetricsLog(tmp_path / "m") as log:
        with pytest.raises(TypeError, match=f"loss: .* {type(value).__name__}"):
            log.append({"step": 1, "loss": value})
        assert read(tmp_path / "m") == []


def test_a_missing_file_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "m")
