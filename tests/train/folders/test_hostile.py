"""Folders of strangers: nothing is written elsewhere, nothing is waited for, and each refusal is a sentence."""

from __future__ import annotations

import json
import os
import shutil
import socket
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from nestopt.cli import main
from nestopt.config import Config, ConfigError
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.errors import CheckpointError
from nestopt.train.generation import Writer
from nestopt.train.loop import train
from nestopt.train.run import Run
from nestopt.train.trust import check_trusted
from tests.train.folders.small import content, small

WRITTEN = ("metrics.jsonl", "samples.txt", "loss.png", "model.safetensors", "checkpoint.json")


@pytest.mark.parametrize("name", [*WRITTEN, "checkpoint-8-part-1-of-1.safetensors", "checkpoint-9.json"])
@pytest.mark.parametrize("kind", ["link", "dangling", "fifo", "folder", "socket", "itself"])
def test_a_resumed_run_writes_to_no_link_and_waits_for_no_fifo(copy, tmp_path, refused, name, kind):
    elsewhere = tmp_path / "elsewhere"
    path = copy.path / name
    if path.exists():
        shutil.copy(path, elsewhere)
    else:
        elsewhere.write_text("mine")
    path.unlink(missing_ok=True)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            os.chdir(copy.path)
            made.bind(name)
    else:
        path.symlink_to({"link": elsewhere, "dangling": tmp_path / "new", "itself": path}[kind])
    before = content(tmp_path) if kind not in ("fifo", "socket") else None
    said = refused("train", "--resume", copy.path, "train.steps=20", "-q")
    assert str(path) in said
    assert before is None or content(tmp_path) == before
    assert not (tmp_path / "new").exists()


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_file_with_another_name_elsewhere_is_not_written_to(copy, tmp_path, refused, name):
    (tmp_path / "elsewhere").hardlink_to(copy.path / name)
    before = content(tmp_path)
    assert f"{name}: cannot be written, it is a file that has another name" in refused(
        "train", "--resume", copy.path, "train.steps=20", "-q"
    )
    assert content(tmp_path) == before


def test_a_device_is_not_written_to(copy, refused, ended, tmp_path):
    copy.metrics_file.unlink()
    try:
        os.mknod(copy.metrics_file, 0o600 | 0o020000, os.makedev(1, 7))
    except PermissionError:
        pytest.skip("only root can make devices")
    assert "it is a device" in refused("train", "--resume", copy.path, "train.steps=20", "-q")
    assert "it is a device" in refused("generate", ended.path, "--length", "1", "--state", "/dev/full")


@pytest.mark.parametrize("name", ["model.safetensors", "checkpoint.json", "checkpoint-4-part-1-of-1.safetensors"])
def test_what_is_read_is_a_file(copy, refused, name):
    with ShardReader(copy.path) as parts:
        name = name.replace("-4-", f"-{parts.number}-")
    if name != "model.safetensors":
        copy.model_file.unlink()
    (copy.path / name).unlink()
    os.mkfifo(copy.path / name)
    assert f"{name}: cannot be read" in refused("generate", copy.path, "--length", "1")


def index_of(run: Run) -> dict[str, Any]:
    return json.loads((run.path / "checkpoint.json").read_text())


def put(run: Run, index: Any) -> None:
    """Write an index with the checksum that it must have."""
    if isinstance(index, dict) and "checksum" in index:
        index.pop("checksum")
        index["checksum"] = zlib.crc32(json.dumps(index, sort_keys=True).encode())
    (run.path / "checkpoint.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name", ["../elsewhere", "/etc/passwd", "sub/x.safetensors", "", ".", "config.yaml", "x.safetensors", 3, None]
)
@pytest.mark.parametrize("key", ["files", "stale"])
def test_names_stay_in_the_folder(copy, tmp_path, refused, name, key):
    (tmp_path / "elsewhere").write_bytes(next(copy.path.glob("checkpoint-*-part-*")).read_bytes())
    put(copy, {**index_of(copy), key: [name]})
    before = content(tmp_path)
    said = refused("train", "--resume", copy.path, "train.steps=20", "-q")
    assert "checkpoint.json: is damaged" in said
    assert repr(name) in said
    assert content(tmp_path) == before


DEEP = "[" * 100_000 + "]" * 100_000
KEYS = ("step", "elapsed", "losses", "data", "groups", "config")
BAD: list[Any] = [None, "x", -1, 1.5, [], [None], {}, {"step": "x"}, {"step": -1}, True, 10**30, float("nan"), [[]]]


@pytest.mark.parametrize("key", KEYS)
def test_damaged_values_are_named_and_change_nothing(copy, refused, key):
    whole = index_of(copy)
    before = content(copy.path)
    for bad in [*BAD, "missing"]:
        meta = {**whole["meta"], key: bad}
        if bad == "missing":
            del meta[key]
        if (key, bad) in [
            ("losses", []),
            ("elapsed", 10**30),
            ("config", "missing"),
            ("elapsed", True),
            ("elapsed", 1.5),
        ]:
            continue  # allowed
        put(copy, {**whole, "meta": meta})
        now = content(copy.path)
        said = refused("train", "--resume", copy.path, "train.steps=20", "-q")
        assert "checkpoint.json" in said, (key, bad)
        assert content(copy.path) == now
    put(copy, whole)
    assert content(copy.path).keys() == before.keys()


@pytest.mark.parametrize("key", ["format", "version", "number", "files", "meta", "kept", "stale", "checksum"])
def test_a_damaged_index_is_named(copy, refused, key):
    whole = index_of(copy)
    for bad in (None, "x", -1, [], {}, [{}], [[]], [{"number": "a"}], True, 10**30, 99):
        if (key, bad) in [("stale", []), ("stale", {}), ("kept", [])] or (key == "meta" and bad == {}):
            continue
        index = {**whole, key: bad}
        put(copy, {k: v for k, v in index.items() if k != "checksum"} if key == "checksum" else index)
        assert "checkpoint.json: " in refused("train", "--resume", copy.path, "-q", "train.steps=20"), (key, bad)


@pytest.mark.parametrize(
    "written", ["", "{", "[]", "3", "null", DEEP, '{"format": ' + DEEP + "}", "\0", "ÿ"], ids="012345678"
)
def test_what_is_no_index_is_named(copy, refused, written):
    (copy.path / "checkpoint.json").write_text(written, encoding="latin-1")
    assert "checkpoint.json: " in refused("train", "--resume", copy.path, "-q")


def test_a_huge_index_is_not_read(copy, refused):
    with open(copy.path / "checkpoint.json", "r+b") as file:
        file.truncate(2**40)
    assert "checkpoint.json: is larger than" in refused("train", "--resume", copy.path, "-q")


@pytest.mark.parametrize("name", ["part", "model.safetensors"])
def test_cut_short_or_with_a_huge_header(copy, refused, name):
    with ShardReader(copy.path) as parts:
        path = copy.path / (parts.files[0] if name == "part" else name)
    if name == "part":
        copy.model_file.unlink()
    whole = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert f"{path.name}: cannot be read" in refused("generate", copy.path, "--length", "1")
    for length in (2**62, 2**31, 0, len(whole)):
        path.write_bytes(length.to_bytes(8, "little") + whole[8:])
        assert f"{path.name}: " in refused("generate", copy.path, "--length", "1")


@pytest.mark.parametrize(
    "stretches",
    [None, [], {"model.head.weight": {}}, {"model.head.weight": {"start": -1, "shape": [1]}}, {"model.head.weight": 3}],
)
def test_damaged_stretches_are_named(copy, refused, stretches):
    with ShardReader(copy.path) as parts:
        path = copy.path / parts.files[0]
    tensors, _ = checkpoint.load(path)
    key = next(name for name in tensors if name.startswith("model."))
    if isinstance(stretches, dict):
        stretches = {key: next(iter(stretches.values()))}
    checkpoint.save(path, tensors, {} if stretches is None else {"stretches": stretches})
    if stretches == []:
        return
    assert f"{path.name}: is damaged" in refused("train", "--resume", copy.path, "-q", "train.steps=20")


def test_another_models_weights_are_refused_in_a_sentence(text, copy, tmp_path, refused):
    other = train(small(text, tmp_path / "other", model__dim=32, train__steps=1), quiet=True).run
    shutil.copy(other.model_file, copy.model_file)
    said = refused("generate", copy.path, "--length", "1")
    assert "model.safetensors: the checkpoint is of another model" in said
    checkpoint.save(copy.model_file, {"strange": torch.ones(1)}, {})
    assert "strange is not here" in refused("generate", copy.path, "--length", "1")


@pytest.mark.parametrize(
    "meta",
    [
        {},
        {"waiting": None},
        {"waiting": 3},
        {"waiting": ["a"]},
        {"waiting": [999]},
        {"waiting": [-1]},
        {"waiting": [1, 2]},
        {"waiting": [1.5]},
    ],
)
def test_a_damaged_state_is_refused_in_a_sentence(ended, tmp_path, refused, meta):
    path = tmp_path / "state.safetensors"
    writer = Writer(ended.load_model())
    writer.read(b"levels")
    writer.save(path)
    tensors, _ = checkpoint.load(path)
    checkpoint.save(path, tensors, {"kind": "state", **meta})
    assert "state.safetensors: is damaged" in refused("generate", ended.path, "--length", "2", "--from-state", path)


@pytest.mark.parametrize("change", ["scalar", "rows", "clash", "name"])
def test_a_state_with_other_tensors_is_refused_in_a_sentence(ended, tmp_path, refused, change):
    path = tmp_path / "state.safetensors"
    writer = Writer(ended.load_model())
    writer.read(b"levels")
    writer.save(path)
    tensors, meta = checkpoint.load(path)
    first = next(iter(tensors))
    changed = {
        "scalar": {name: torch.zeros(()) for name in tensors},
        "rows": {name: torch.cat([value] * 2) for name, value in tensors.items()},
        "clash": {**tensors, f"{first}.more": torch.zeros(1)},
        "name": {**tensors, "block_7.mixer": torch.zeros(1)},
    }[change]
    checkpoint.save(path, changed, meta)
    refused("generate", ended.path, "--length", "2", "--from-state", path)


# -- what a configuration asks for -------------------------------------------------------------------------------------


def deepspeed(**settings: Any) -> dict[str, Any]:
    return {"train": {"engine": "deepspeed", "deepspeed": settings}}


REACHING = [
    deepspeed(csv_monitor={"enabled": True, "output_path": "/tmp/elsewhere"}),
    deepspeed(tensorboard={"enabled": True, "output_path": "elsewhere"}),
    deepspeed(wandb={"enabled": True}),
    deepspeed(comet={"enabled": True}),
    deepspeed(flops_profiler={"enabled": True, "output_file": "/tmp/x"}),
    deepspeed(autotuning={"enabled": True, "results_dir": "/tmp/x"}),
    deepspeed(zero_optimization={"stage": 3, "offload_param": {"device": "cpu", "nvme_path": "/tmp/x"}}),
    {"data": {"dataset": {"dataset": "documents", "path": "a/b", "tokenizer": "someone/nothing-here"}}},
    {"data": {"dataset": "fineweb_edu"}},
]


@pytest.mark.parametrize("asks", REACHING, ids=str)
def test_what_reaches_out_of_a_strangers_folder_is_asked_for(copy, refused, asks, monkeypatch):
    def no_network(*args: object, **options: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    data = copy.config().to_data()
    for section, values in asks.items():
        data[section].update(values)
    if "data" in asks:
        data["data"]["path"] = None
    copy.config_file.write_text(Config.from_data(data).to_yaml())
    before = content(copy.path)
    commands = [["train", "--resume", copy.path, "-q", "train.steps=20"], ["eval", "forgetting", copy.path]]
    if "data" in asks:
        commands.append(["generate", copy.path, "--length", "1"])
    for command in commands:
        assert "give --trust" in refused(*command)
    with pytest.raises(ConfigError, match="trust=True"):
        train(resume=copy.path, quiet=True)
    assert content(copy.path) == before


def test_what_the_user_has_said_is_the_users(copy):
    config = copy.config()
    config.train.engine, config.train.deepspeed = "deepspeed", {"csv_monitor": {"enabled": True, "output_path": "x"}}
    with pytest.raises(ConfigError, match=r"train\.deepspeed\.csv_monitor can write anywhere"):
        check_trusted(config, copy.path)
    given = config.model_copy(deep=True)
    given.train.deepspeed = {"csv_monitor": {"enabled": False}}
    check_trusted(config, copy.path, given=given)
    config.train.deepspeed = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
    check_trusted(config, copy.path)


def test_a_stack_for_a_config_and_a_bad_folder_are_named(copy, refused, tmp_path):
    copy.config_file.write_text("level: momentum\n")
    for command in (["train", "--resume", copy.path], ["generate", copy.path], ["eval", "forgetting", copy.path]):
        assert "config.yaml is a stack" in refused(*command)
    copy.config_file.unlink()
    os.mkfifo(copy.config_file)
    assert "is not a run" in refused("train", "--resume", copy.path)


def test_a_link_in_the_place_of_a_folder_is_refused(ended, copy, tmp_path, text):
    from nestopt.train.compare import compare

    (tmp_path / "elsewhere").mkdir()
    (copy.path / "baseline").symlink_to(tmp_path / "elsewhere")
    result = train(resume=copy.path, quiet=True)
    with pytest.raises(CheckpointError, match="baseline: is a link"):
        compare(copy.config(), result, quiet=True)
    assert not list((tmp_path / "elsewhere").iterdir())
    assert main(["generate", str(copy.path), "--length", "1"]) == 0
