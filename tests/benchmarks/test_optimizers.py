"""The optimizer benchmark, at toy size: what it runs, and that its numbers are what it says they are."""

from __future__ import annotations

import importlib.util
import json
import mmap
import re
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import nestopt
from benchmarks import machine, nestopt_rows, optimizers
from benchmarks.memory import forget_peak, held_bytes, in_fresh_process, peak_bytes, resident_bytes
from benchmarks.peer_rows import wide_newton_schulz
from benchmarks.report import number
from benchmarks.rows import Missing, Parameters, Row, rows
from benchmarks.sets import SETS, shapes
from benchmarks.timing import Call, Timing, interleave, ratio
from benchmarks.work import cubic, elementwise, quintic

OURS = [(name, row) for name in SETS for row in rows(name) if row.name.startswith("nestopt")]
PEERS = {"pytorch-optimizer": "pytorch_optimizer", "nested-learning": "nested_learning", "Keller Jordan's": "muon"}


@pytest.mark.parametrize(("name", "row"), OURS, ids=lambda part: part if isinstance(part, str) else part.name)
def test_every_row_of_ours_steps_every_parameter(name: str, row: Row) -> None:
    parameters = Parameters(shapes(name, tiny=True))
    before = [param.detach().clone() for param in parameters.tensors]
    try:
        optimizer = row.build(parameters.tensors)
    except Missing as missing:
        pytest.skip(str(missing))
    for _ in range(row.warmups + row.steps):
        parameters.fill()
        optimizer.step()
    for param, old in zip(parameters.tensors, before, strict=True):
        assert torch.isfinite(param).all()
        assert not torch.equal(param, old)


def test_the_command_prints_tables_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {kind: tmp_path / f"out.{kind}" for kind in ("md", "json", "svg")}
    given = ["--tiny", "--rounds", "2", "--markdown", str(files["md"]), "--json", str(files["json"])]
    optimizers.main([*given, "--plot", str(files["svg"])])
    printed, written = capsys.readouterr().out, files["md"].read_text(encoding="utf-8")
    for name in (*SETS, "dgd"):
        assert f"### {name}\n" in written
    for line in written.splitlines():
        assert line in printed
    tables = json.loads(files["json"].read_text(encoding="utf-8"))["tables"]
    assert [table["name"] for table in tables] == [*SETS, "dgd"]
    for table in tables:
        by_name = {line["name"]: line for line in table["lines"]}
        reference = by_name[table["reference"]]["samples_ms"]
        assert set(reference) == {"0", "1"}
        for line in table["lines"]:
            peer = next((module for start, module in PEERS.items() if line["name"].startswith(start)), None)
            if peer is None or importlib.util.find_spec(peer) is not None:
                assert not line["problem"].startswith("failed"), line
            else:
                assert line["problem"].startswith("not installed: ")
            if not line["problem"]:
                # one interleaved run: the ratio is that of times of the same rounds
                ratios = sorted(line["samples_ms"][i] / reference[i] for i in ("0", "1"))
                assert line["ratio"] == pytest.approx(sum(ratios) / 2)
    assert files["svg"].read_text(encoding="utf-8").startswith("<?xml")


def test_rounds_are_interleaved_and_their_order_rotates() -> None:
    seen: list[str] = []
    calls = {name: Call(lambda name=name: seen.append(name), lambda: seen.append("fill")) for name in "abc"}
    timings = interleave(calls, rounds=3, cap_s=10.0, reference="a")
    assert seen[::2] == ["fill"] * 12
    assert "".join(seen[1::2]) == "abc" + "abc" + "bca" + "cab"
    assert all(len(timing.rounds) == 3 for timing in timings.values())


def test_a_ratio_is_of_the_same_round_so_that_a_slow_spell_cancels() -> None:
    reference = Timing(rounds={0: 1.0, 1: 10.0, 2: 1.0})
    timing = Timing(rounds={0: 2.0, 1: 20.0, 2: 2.2})
    found = ratio(timing, reference)
    assert found is not None
    assert (found.median, found.low, found.high) == pytest.approx((2.0, 2.0, 2.1))


def _busy(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_candidate_stops_at_its_cap_and_one_that_raises_is_reported() -> None:
    def broken() -> None:
        raise ValueError("no\nsuch thing")

    calls = {
        "reference": Call(lambda: _busy(0.001), lambda: None),
        "slow": Call(lambda: _busy(0.05), lambda: None),
        "capped": Call(lambda: _busy(0.012), lambda: None, steps=2),
        "broken": Call(broken, lambda: None),
    }
    timings = interleave(calls, rounds=4, cap_s=0.04, reference="reference")
    assert timings["slow"].rounds == {}
    assert timings["slow"].step_s == timings["slow"].first_s >= 0.05
    assert 1 <= len(timings["capped"].rounds) <= 2
    assert min(timings["capped"].rounds.values()) >= 0.012  # of one step, not of the two that make a sample
    assert timings["broken"].problem == "failed: ValueError: no"
    quick = interleave(calls, rounds=1, cap_s=1.0, reference="reference", leave_out_above_s=0.03)
    assert quick["slow"].problem.startswith("left out: ")
    assert len(quick["capped"].rounds) == 1


def test_quick_leaves_out_by_the_floor_but_never_the_reference() -> None:
    (table,) = optimizers.main(["--tiny", "--rounds", "1", "--set", "gpt-matrices", "--quick", "1e-12"])
    by_name = {line.name: line for line in table.lines}
    assert by_name.pop(table.reference).rounds == 1
    assert all(line.problem.startswith("left out: its floor") for line in by_name.values())


def test_torch_muon_in_float32_is_torchs_code_but_for_the_cast() -> None:
    gradient = torch.randn(12, 7)
    kept = gradient.clone()
    made = wide_newton_schulz()(gradient, (3.4445, -4.7750, 2.0315), 5, 1e-7)
    assert made.dtype == torch.float32
    assert torch.equal(gradient, kept)  # the cast makes a copy, on which the function works in place
    x = kept.double().T / kept.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    torch.testing.assert_close(made.double(), x.T, rtol=0, atol=1e-4)


def test_floors_count_what_a_loop_counts() -> None:
    rates = machine.Rates(1e9, {"float32": 2e9, "bfloat16": 4e9})
    assert elementwise(2).floors_s([(10, 5), (50,)], rates) == (100 * 28 / 1e9, 0.0)

    def product(a: int, b: int, c: int) -> int:
        return 2 * a * b * c

    m, n = 4, 40
    gram_form = product(m, n, m)
    for step in range(5):
        gram_form += product(m, m, m)  # G²
        gram_form += product(m, m, m) if step else 0  # Q ← PQ
        gram_form += 2 * product(m, m, m) if step < 4 else 0  # G ← PGP
    gram_form += product(m, m, n)
    assert quintic(5)((n, m)) == quintic(5)((m, n)) == gram_form
    standard = 5 * (product(m, m, m) + product(m, m, m) + product(m, m, m))
    assert quintic(5)((m, m)) == standard  # square: through X
    assert cubic(3)((m, m)) == 3 * 2 * product(m, m, m)


def test_held_bytes_counts_each_storage_once_and_what_is_outside_of_state() -> None:
    param = nn.Parameter(torch.zeros(10))
    param.grad = torch.ones(10)
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=0.9)
    optimizer.step()
    assert held_bytes(optimizer, [param, param.grad]) == 40
    optimizer.state[param]["view"] = optimizer.state[param]["momentum_buffer"][:5]
    assert held_bytes(optimizer, [param, param.grad]) == 40
    optimizer.scratch = {"flat": [torch.zeros(3)]}
    assert held_bytes(optimizer, [param, param.grad]) == 52


def test_adamw_holds_what_its_equations_need() -> None:
    (table,) = optimizers.main(["--tiny", "--rounds", "1", "--set", "gpt", "--only", "^nestopt AdamW$"])
    (line,) = [line for line in table.lines if line.name == "nestopt AdamW"]
    assert line.state_bytes == pytest.approx(8, rel=0.05)
    assert line.peer_ratio == line.ratio


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="transient memory is read from Linux's /proc")
def test_transient_memory_is_the_peak_above_what_was_resident() -> None:
    size = 64 * 2**20
    forget_peak()
    before = resident_bytes()
    # Not `torch.zeros`: the allocator may give it memory that is resident already.
    torch.frombuffer(mmap.mmap(-1, size), dtype=torch.float32).fill_(1)
    assert 0.9 * size < peak_bytes() - before < 1.5 * size
    forget_peak()
    assert peak_bytes() - resident_bytes() < 0.5 * size
    (table,) = optimizers.main(["--tiny", "--rounds", "1", "--set", "gpt", "--only", "^$", "--memory"])
    (line,) = table.lines
    assert line.transient_mib is not None
    assert line.transient_mib < 8


def test_a_process_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match="No module named benchmarks"):
        in_fresh_process("benchmarks.nothing", [], 60)


def test_what_is_not_there_is_named() -> None:
    params = [nn.Parameter(torch.zeros(2, 2))]
    with pytest.raises(Missing, match="no level is called 'no_such_level'"):
        nestopt_rows.level("no_such_level")()
    with pytest.raises(Missing, match=r"nestopt\.optim\.NoSuch"):
        nestopt_rows.named("NoSuch")(params)
    with pytest.raises(Missing, match="Nested\\(no_such=…\\)"):
        nestopt_rows.nested(nestopt.levels.gd, no_such=True)(params)


@pytest.mark.parametrize(("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (0.01234, "0.0123"), (None, "–")])
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


def test_a_wrong_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        optimizers.main(["--only", "("])
    assert re.search(r"--only: '\(' is no regular expression", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        optimizers.main(["--set", "gtp"])
    assert "'gpt'" in capsys.readouterr().err
