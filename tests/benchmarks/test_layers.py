"""The layer benchmark, at toy size: what it runs, and that its numbers are what it says they are."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks import layer_decode, layer_flops, layers
from benchmarks.layer_blocks import ATTENTION, MLP, AttentionBlock
from benchmarks.layer_decode import decode
from benchmarks.layer_growth import exponent, growth, predicted_s
from benchmarks.layer_memory import measure
from benchmarks.layer_rows import MODES, Layer, Row, build, rows
from benchmarks.layer_size import Size, tiny
from benchmarks.machine import Rates
from benchmarks.rows import Missing

ROWS = {row.name: row for row in rows()}
PEERS = {"titans-pytorch": "titans_pytorch", "nested-learning": "nested_learning"}
SIZE = tiny(24, 8)


def _built(row: Row, size: Size = SIZE) -> Layer:
    try:
        return build(row, size)
    except Missing as missing:
        if not row.name.startswith(tuple(PEERS)):
            raise
        pytest.skip(str(missing))


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_row_trains_on_finite_numbers(row: Row) -> None:
    layer = _built(row)
    layer.call("forward")
    assert layer.answer is not None
    assert layer.answer.shape[:2] == (SIZE.batch, SIZE.tokens)
    assert layer.answer.count_nonzero() > 0
    assert layer.finite()
    layer.call("training")
    assert layer.finite()
    for tensor in layer.inputs:
        assert tensor.grad is not None
        assert tensor.grad.count_nonzero() > 0
    assert any(param.grad is not None for param in layer.module.parameters())
    if row.name.startswith("nestopt"):
        assert all(param.grad is not None for param in layer.module.parameters())


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_every_row_that_streams_answers_as_it_does_at_once(row: Row) -> None:
    layer = _built(row)
    if layer.stream is None:
        assert row.name.endswith("the op")
        return
    if row.name.startswith("nested-learning"):
        pytest.skip("its convolution and its chunks begin anew at every call")
    layer.call("forward")
    x, y = layer.inputs[0], layer.answer
    state, found, start = None, [], 0
    lengths = [8, 1, 1, 6, 8]
    if row.name.startswith("titans-pytorch"):
        lengths = [8, *[1] * 16]  # a piece that crosses the end of a chunk raises there; decoding gives none
    if row.name == ATTENTION:
        lengths = [1] * SIZE.tokens
        state = dataclasses.replace(layer.jump(SIZE.batch, SIZE.tokens), length=0)  # an empty cache with room
    with torch.no_grad():
        for length in lengths:
            piece, state = layer.stream(x[:, start : start + length], state)
            found.append(piece)
            start += length
    torch.testing.assert_close(torch.cat(found, dim=1), y, rtol=1e-4, atol=1e-4)


def test_a_step_that_changes_parameters_begins_each_time_from_the_same() -> None:
    module = nn.Linear(2, 2)

    @torch.no_grad()
    def update(x: Tensor) -> None:
        module.weight.mul_(2)

    layer = Layer(module, module, [torch.ones(1, 3, 2)], update=update)
    before = module.weight.clone()
    for _ in range(2):
        layer.call("training")
        assert torch.equal(module.weight, 2 * before)
    layer.prepare()
    assert torch.equal(module.weight, before)
    assert module.weight.grad is None


def test_what_is_not_finite_is_seen() -> None:
    module = nn.Linear(2, 2)
    layer = Layer(module, lambda x: module(x) / 0.0, [torch.ones(1, 3, 2)])
    layer.call("forward")
    assert not layer.finite()
    fine_but_for_gradients = Layer(module, lambda x: module(x - x).sqrt() * 0, [torch.ones(1, 3, 2)])
    nn.init.zeros_(module.bias)
    fine_but_for_gradients.call("forward")
    assert fine_but_for_gradients.finite()
    fine_but_for_gradients.call("training")
    assert not fine_but_for_gradients.finite()


# -- floors ----------------------------------------------------------------------------------------------------------


def _product(a: int, b: int, c: int) -> int:
    return 2 * a * b * c


def test_floors_count_what_a_loop_over_tokens_counts() -> None:
    size, d = Size(tokens=12, chunk=4, batch=3, dim=8, heads=2), 4
    pairs = sum(t + 0.5 for t in range(12)) / 12  # a token sees half of itself: the diagonal of a triangle
    assert layer_flops.attention(size) == 4 * _product(1, 8, 8) + 2 * pairs * _product(1, 8, 1)
    assert layer_flops.mlp(size) == 2 * _product(1, 8, 32)
    # a window of 5: t keys until there are 5
    windowed = sum(t + 0.5 if t < 5 else 5 for t in range(12)) / 12
    assert layer_flops.attended(size, 5) == pytest.approx(2 * windowed * _product(1, 8, 1))
    assert layer_flops.attended(size, 12) == layer_flops.attended(size, 99) == layer_flops.attended(size)
    read, write = _product(d, d, 1), _product(d, 1, d)
    assert layer_flops.matrix_memory()(size) == 2 * (write + read)
    assert layer_flops.matrix_memory(delta=True)(size) == 2 * (write + 2 * read)
    h = 12
    forward = _product(h, d, 1) + _product(d, h, 1)
    backward = _product(1, d, h) + _product(d, 1, h) + _product(h, 1, d)  # through W1, then into W1 and W2
    assert layer_flops.mlp_memory(3)(size) == 2 * (2 * forward + backward)
    # chunks of 4 tokens: half of a C × C product with the inputs' width, and with the outputs', for both weights
    triangular = 0.5 * sum(_product(1, width, 4) for width in (d, h, h, d))
    assert layer_flops.mlp_memory(3, delta=True)(size) == 2 * (2 * forward + backward + triangular)
    long = dataclasses.replace(size, chunk=1000)  # from token to token is less
    assert layer_flops.mlp_memory(3, delta=True)(long) == 2 * (2 * forward + backward + forward)


def test_floors_are_those_of_the_formulas() -> None:
    size, square = Size(tokens=512, chunk=64), 256**2
    formulas = {
        ATTENTION: 8 * square + 2 * 512 * 256,
        MLP: 16 * square,
        "titans-pytorch NeuralMemory": 62 * square,
        "nested-learning SelfModifyingTitans": 72 * square + 30 * 64 * 256,
        "nestopt titans, one head": (8 + 56) * square,
        "nestopt titans, four heads": (8 + 56 / 4) * square,
        "nestopt linear_attention": (8 + 1) * square,
        "nestopt deltanet": (8 + 6 / 4) * square,
        "nestopt attention": 8 * square + 2 * 512 * 256,
    }
    for name, flops in formulas.items():
        assert ROWS[name].flops(size) == flops
    rates = Rates(1e9, {"float32": 1e9, "bfloat16": 2e9})
    forward, training = ROWS[MLP].floors_s(size, rates)
    assert forward == 2 * 512 * 16 * square / 1e9
    assert training == 3 * forward
    assert all(row.flops(size) > 0 for row in ROWS.values())


# -- growth ----------------------------------------------------------------------------------------------------------


def test_an_exponent_is_the_slope_from_the_shortest_to_the_longest() -> None:
    assert exponent({512: 1.0, 1024: 7.0, 2048: 16.0}) == pytest.approx(2.0)
    assert exponent({512: 1.0}) is None
    assert predicted_s({}, 64) == 0.0
    assert predicted_s({10: 1.0}, 40) == pytest.approx(4.0)  # linear, for all that is known
    assert predicted_s({10: 1.0, 20: 1.1}, 40) == pytest.approx(2.2)
    assert predicted_s({5: 9.0, 10: 1.0, 20: 4.0}, 40) == pytest.approx(16.0)


def test_the_growth_table_says_how_far_it_goes() -> None:
    times = {
        ("a", 8, "forward"): {512: 1.0, 2048: 4.0},
        ("a", 8, "training"): {512: 3.0},
        ("b", 8, "forward"): {512: 1.0, 1024: 4.0},
        ("c", 4, "forward"): {512: 1.0},
    }
    text = growth(8, times).markdown()
    assert "from 512 tokens" in text
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in text.splitlines()[4:]
        if line
    }
    assert cells["a"] == ["1.00", "2,048", "–", "512"]
    assert cells["b"] == ["2.00", "1,024", "–", "–"]
    assert "c" not in cells


# -- decoding --------------------------------------------------------------------------------------------------------


class _Counting(nn.Module):
    """Its state is how many tokens it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def stream(self, x: Tensor, state: Any) -> tuple[Tensor, int]:
        self.seen.append(state or 0)
        return x, (state or 0) + x.shape[1]


def _row(name: str, **parts: Any) -> Row:
    return Row(name, lambda size: Layer(nn.Linear(1, 1), lambda x: x, [torch.zeros(2, 4, 1)], **parts), layer_flops.mlp)


def test_decoding_is_timed_from_the_position_it_says() -> None:
    counting = _Counting()

    def broken(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state == 20:
            raise ValueError("full")
        return x, (state or 0) + x.shape[1]

    size = tiny(4, 4)
    table = decode(
        [ROWS[ATTENTION], _row("counting", stream=counting.stream), _row("broken", stream=broken), _row("none")],
        size,
        rounds=2,
        cap_s=5.0,
        positions=(8, 20),
    )
    assert counting.seen == [0, *[8, 9, 10, 11] * 3, 8, *[20, 21, 22, 23] * 3]  # a first call and two rounds at each
    by_name = {line.name: line for line in table.lines}
    assert "none" not in by_name
    for position in (8, 20):
        line = by_name["counting"].at[position]
        assert line.step_ms == pytest.approx(sum(line.samples_ms.values()) / 2)
    assert by_name["counting"].growth is not None
    assert by_name["broken"].at[20].problem == "failed: ValueError: full"
    text = table.markdown()
    assert "- broken, at 20: failed: ValueError: full" in text
    assert "at 8, ms" in text


def test_a_walk_that_would_take_too_long_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_decode, "PIECE", 4)
    walker = layer_decode._Walker(_row("x", stream=_Counting().stream).build(SIZE), SIZE)
    assert walker.go(8, 60.0) == ""
    assert walker.state == walker.position == 8
    walker.pace_s = 10.0
    assert walker.go(20, 60.0) == "left out: about 120 s to get there, over 60 s"
    walker.pace_s = 0.0
    assert walker.go(20, 0.0).startswith("left out: at 12 after 0 s")


def test_the_attention_block_decodes_as_it_reads() -> None:
    block = AttentionBlock(8, 2)
    x = torch.randn(1, 5, 8)
    cache = ROWS[ATTENTION].build(dataclasses.replace(SIZE, dim=8)).jump(1, 100)
    assert cache.length == 100
    assert cache.keys.shape == (1, 2, 100 + SIZE.chunk, 4)
    with torch.no_grad():
        _, after = block.stream(x[:, :1], cache)
    assert after.length == 101
    assert after.keys is cache.keys


# -- the command -----------------------------------------------------------------------------------------------------


def test_the_command_prints_tables_and_writes_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, saved = tmp_path / "layers.md", tmp_path / "layers.json"
    given = ["--tiny", "--seqs", "16", "8", "--chunks", "8", "4", "--rounds", "2", "--limit", "0", "--decode"]
    layers.main([*given, "--out", str(out), "--json", str(saved)])
    printed, written = capsys.readouterr().out, out.read_text(encoding="utf-8")
    assert written.startswith("# Layers on tokens\n")
    assert f"- command: python benchmarks/layers.py {' '.join(given)} --out" in written
    assert f"- torch: {torch.__version__}" in written
    heads = [line.removeprefix("### ") for line in written.splitlines() if line.startswith("###")]
    assert heads == [
        name
        for chunk in (8, 4)
        for name in (
            *(f"{mode}, {tokens} tokens, chunks of {chunk}" for tokens in (8, 16) for mode in MODES),
            f"growth, chunks of {chunk}",
            f"decoding, chunks of {chunk}",
        )
    ]
    assert all(line in printed for line in written.splitlines() if line.startswith("|"))
    tables = json.loads(saved.read_text(encoding="utf-8"))["tables"]
    assert [table["name"] for table in tables] == heads
    timed = [table for table in tables if "reference" in table]
    for table in timed:
        by_name = {line["name"]: line for line in table["lines"]}
        unchunked = {row.name for row in ROWS.values() if not row.chunked} - {ATTENTION, MLP}
        assert set(by_name) == set(ROWS) - (unchunked if table["name"].endswith("of 4") else set())
        for line in table["lines"]:
            _check(line, by_name[ATTENTION])
    assert "floors at" in written


def _check(line: dict[str, Any], reference: dict[str, Any]) -> None:
    peer = next((module for start, module in PEERS.items() if line["name"].startswith(start)), None)
    if peer is not None and importlib.util.find_spec(peer) is None:
        assert line["problem"].startswith("not installed (no module ")
        assert "pip install --no-deps " in line["problem"]
        return
    assert not line["problem"], line
    assert line["finite"] is True
    assert math.isfinite(line["step_ms"])
    assert line["flops_ms"] > 0
    ratios = sorted(line["samples_ms"][i] / reference["samples_ms"][i] for i in ("0", "1"))
    assert line["ratio"] == pytest.approx(sum(ratios) / 2)


def test_a_row_that_fails_or_is_slow_says_so_and_is_not_tried_at_more_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    def build_broken(size: Size) -> Layer:
        def read(x: Tensor) -> Tensor:
            raise RuntimeError("out of\nmemory")

        return Layer(nn.Linear(1, 1), read, [torch.zeros(2, size.tokens, 1)])

    def build_diverging(size: Size) -> Layer:
        module = nn.Linear(1, 1)
        return Layer(module, lambda x: module(x) / 0.0, [torch.zeros(2, size.tokens, 1)])

    def build_missing(size: Size) -> Layer:
        raise Missing("not there: it")

    made = {"broken": build_broken, "diverging": build_diverging, "missing": build_missing}
    some = [ROWS[ATTENTION], *(Row(name, build, layer_flops.mlp) for name, build in made.items())]
    monkeypatch.setattr(layers, "rows", lambda: some)
    given = ["--tiny", "--seqs", "4", "8", "--chunks", "4", "--rounds", "1", "--limit", "0"]
    tables = {table.name: table for table in layers.main(given)}
    for tokens in (4, 8):
        table = tables[f"forward, {tokens} tokens, chunks of 4"]
        found = {line.name: line for line in table.lines}
        assert found["diverging"].finite is False
        assert found["missing"].problem == "not there: it"
        failed = "failed: RuntimeError: out of"
        assert found["broken"].problem == (failed if tokens == 4 else f"not tried, since at 4 tokens: {failed}")
        (row,) = [line for line in table.markdown().splitlines() if line.startswith("| diverging")]
        assert row.split("|")[-2].strip() == "no"
    monkeypatch.setattr(layers, "predicted_s", lambda times, tokens: 100.0)
    (forward, training, _) = layers.main([*given[:1], "--seqs", "4", *given[4:]])
    for table in (forward, training):
        assert [line.problem for line in table.lines[1:3]] == [
            "left out: a call should take about 100 s, over 30 s"
        ] * 2
        assert table.lines[0].rounds == 1  # the reference always runs


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_of_a_call() -> None:
    given = ["--tiny", "--seqs", "4096", "--chunks", "8", "--rounds", "1", "--limit", "0", "--memory", "--only", "^$"]
    (forward,), (training,) = (table.lines for table in layers.main(given)[:2])
    queries_keys_values = 3 * 2 * 4096 * 16 * 4 / 2**20  # MiB
    assert forward.transient_mib is not None
    assert queries_keys_values < forward.transient_mib < 10 * queries_keys_values
    assert training.transient_mib is not None
    assert training.transient_mib > forward.transient_mib + queries_keys_values  # kept, and their gradients


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_layer_that_needs_more_than_the_limit_fails_and_says_so() -> None:
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        measure(ROWS[MLP], "forward", tiny(2**26, 8), threads=1, limit_gib=4.0, timeout_s=60)  # tokens of 8 GiB


def test_a_wrong_argument_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        layers.main(["--only", "("])
    assert "--only: '(' is no regular expression" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        layers.main(["--seqs", "0"])
    assert "must be 1 or more" in capsys.readouterr().err
