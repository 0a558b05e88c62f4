"""The benchmark of compositions runs, and says what it is to say."""

from __future__ import annotations

from benchmarks.compositions import main


def test_every_row_is_timed_beside_its_parts() -> None:
    lines = main(["--tiny"])
    table = [line for line in lines if line.startswith("| `")]
    assert [line.split(" | ")[1] for line in table] == [
        "parallel",
        "chain",
        "nest",
        "rule_by_chunk",
        "rule_by_chunk",
        "deep_memory",
        "reference",
        "reference",
    ]
    assert all("retnet" in line and "deltanet" in line for line in table[:2])
