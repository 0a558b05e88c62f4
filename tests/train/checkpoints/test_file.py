import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from nestopt.config.files import replacing
from nestopt.train.checkpoints.file import VERSION, load, save
from nestopt.train.errors import CheckpointError

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip

keys = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from(
    [".", "a.b", "%", "%2E", "%25.", ""]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6)
json_values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    made = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randint(0, 100, shape)
    made = made.to(dtype)
    return made.transpose(0, -1) if len(shape) > 1 and draw(st.booleans()) else made


def same(one: Any, other: Any) -> bool:
    """Equal in value, shape, dtype and type, all the way down."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return isinstance(other, dict) and one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    if isinstance(one, list):
        return isinstance(other, list) and len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


@given(st.dictionaries(keys, tensors(), max_size=4), st.dictionaries(st.text(max_size=6), json_values, max_size=3))
@settings(max_examples=50, deadline=None)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, named: dict, meta: dict) -> None:
    path = tmp_path_factory.mktemp("run") / "c.safetensors"
    save(path, named, meta)
    back, back_meta = load(path)
    assert same(named, back)
    assert same(meta, back_meta)


def test_shared_memory_views_and_parameters_are_written_in_full(tmp_path: Path) -> None:
    base = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(torch.ones(2))
    named = {
        "base": base,
        "tied": base,
        "row": base[1],
        "column": base[:, 1],
        "wide": base[:1].expand(5, 4),
        "parameter": parameter,
        "with a graph": parameter * 2,
        "zero-dimensional": torch.tensor(3),
        "empty": torch.zeros(0, 3),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "negative": torch.tensor([1 + 2j]).conj().imag,
    }
    save(tmp_path / "c", named, {})
    back, _ = load(tmp_path / "c")
    assert back.keys() == named.keys()
    for name, tensor in named.items():
        assert torch.equal(back[name], tensor.detach()), name
    assert not back["parameter"].requires_grad
    back["base"].fill_(-1)
    assert torch.equal(back["tied"], base)  # apart in memory,
    assert torch.equal(load(tmp_path / "c")[0]["base"], base)  # and from the file


def test_any_safetensors_reader_can_read_it(tmp_path: Path) -> None:
    save(tmp_path / "c", {"w": torch.ones(2)}, {"step": 3, "loss": float("inf")})
    with safe_open(tmp_path / "c", "pt") as file:
        header = file.metadata()
        assert list(file.keys()) == ["w"]
    assert header["format"] == "nestopt-checkpoint"
    assert header["version"] == str(VERSION)
    assert json.loads(header["meta"]) == {"step": 3, "loss": float("inf")}


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("pickle was used")

    for name in ("dump", "dumps", "load", "loads", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    save(tmp_path / "c", {"w": torch.ones(2)}, {"a": [1]})
    load(tmp_path / "c")


def test_a_file_has_the_mode_that_the_umask_asks_for(tmp_path: Path) -> None:
    save(tmp_path / "c", {}, {})
    (tmp_path / "plain").touch()
    assert (tmp_path / "c").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: there is no such checkpoint"):
        load(tmp_path / "nowhere")


def test_cut_short_at_any_byte_or_longer_than_it_was(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, {"w": torch.ones(3)}, {"step": 1})
    whole = path.read_bytes()
    for damaged in [*(whole[:size] for size in range(len(whole))), whole + b"\0"]:
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="c: cannot be read"):
            load(path)


def test_a_damaged_header_never_gives_another_error(tmp_path: Path) -> None:
    path = tmp_path / "c"
    save(path, {"w": torch.ones(3), "b": torch.ones(2, dtype=torch.int64)}, {"step": 1})
    whole = path.read_bytes()
    refused = 0
    for place in range(len(whole) - 28):  # all but the 28 bytes of data
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                load(path)
            except CheckpointError:
                refused += 1
    assert refused > 4 * (len(whole) - 28)  # a bit of a name, or of meta, can change into another valid one


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (None, "no checkpoint of nestopt"),
        ({"format": "pt"}, "no checkpoint of nestopt"),
        ({"format": "nestopt-checkpoint", "version": str(VERSION + 1)}, f"newer nestopt .format version {VERSION + 1}"),
        ({"format": "nestopt-checkpoint", "version": "one", "meta": "{}"}, "header is damaged"),
        ({"format": "nestopt-checkpoint", "version": "1"}, "header is damaged"),
        ({"format": "nestopt-checkpoint", "version": "1", "meta": "{"}, "header is damaged"),
        ({"format": "nestopt-checkpoint", "version": "1", "meta": "[]"}, "header is damaged"),
    ],
)
def test_other_safetensors_files(tmp_path: Path, header: dict[str, str] | None, reason: str) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "c", metadata=header)
    with pytest.raises(CheckpointError, match=reason):
        load(tmp_path / "c")


def test_a_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("named", "meta", "error", "reason"),
    [
        ({}, {"betas": (0.9, 0.99)}, TypeError, r"meta\.betas: .* tuple, .*list"),
        ({}, {"a": [{"b": torch.ones(1)}]}, TypeError, r"meta\.a\[0\]\.b"),
        ({}, {"a": {1: 2}}, TypeError, "keys must be strings, not 1"),
        ({"__metadata__": torch.ones(1)}, {}, ValueError, "__metadata__"),
        ({"w": torch.eye(2).to_sparse()}, {}, TypeError, "w: only plain dense tensors .*sparse"),
        ({"w": torch.ones(1, device="meta")}, {}, TypeError, "w: .* on meta"),
        ({"w": torch.ones(1, dtype=torch.complex128)}, {}, TypeError, "w: .*complex128"),
    ],
)
def test_what_cannot_come_back_is_refused_and_the_old_file_stays(
    tmp_path: Path, named: dict, meta: dict, error: type[Exception], reason: str
) -> None:
    save(tmp_path / "c", {"w": torch.ones(1)}, {"step": 1})
    with pytest.raises(error, match=reason):
        save(tmp_path / "c", named, meta)
    assert load(tmp_path / "c")[1] == {"step": 1}
    assert os.listdir(tmp_path) == ["c"]


def test_replacing_keeps_the_old_file_when_the_block_raises(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("old")
    with pytest.raises(FileExistsError), replacing(tmp_path / "f") as temporary:
        temporary.mkdir()
    assert (tmp_path / "f").read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]


def test_replacing_leaves_the_files_of_others_alone(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.b") as outer, replacing(tmp_path / "a") as inner:
        outer.write_text("outer")
        inner.write_text("inner")
    assert (tmp_path / "a.b").read_text() == "outer"
    assert (tmp_path / "a").read_text() == "inner"
    assert sorted(os.listdir(tmp_path)) == ["a", "a.b"]


WRITER = """
import os, sys, torch
from nestopt.train.checkpoints import file as checkpoint
def save(step):
    checkpoint.save(sys.argv[1], {"w": torch.full((4_000_000,), float(step))}, {"step": step})
"""
DIES_BEFORE_THE_SWAP = WRITER + "save(1); os.replace = lambda *_: os._exit(9); save(2)"
SAVES_FOR_EVER = WRITER + "[save(step) for step in range(1_000_000)]"


def checkpoints_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.suffix == ".safetensors"]


def assert_whole(path: Path) -> int:
    named, meta = load(path)
    assert (named["w"] == meta["step"]).all()
    assert len(named["w"]) == 4_000_000
    return meta["step"]


def test_a_writer_that_dies_before_the_swap_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    assert subprocess.run([sys.executable, "-c", DIES_BEFORE_THE_SWAP, str(path)], check=False).returncode == 9
    assert assert_whole(path) == 1
    assert checkpoints_in(tmp_path) == [path.name]
    assert len(os.listdir(tmp_path)) == 2  # the other is what the dead writer left behind
    save(path, {}, {"step": 3})
    assert os.listdir(tmp_path) == [path.name]  # the next writer has cleared it away


@pytest.mark.parametrize("delay", [0.0, 0.013])
def test_a_writer_killed_at_any_moment_leaves_a_whole_file(tmp_path: Path, delay: float) -> None:
    path = tmp_path / "c.safetensors"
    writer = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(path)])
    try:
        deadline = time.monotonic() + 120
        while not path.exists() or not any(name.endswith(".tmp") for name in os.listdir(tmp_path)):
            assert writer.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    assert_whole(path)
    assert checkpoints_in(tmp_path) == [path.name]
