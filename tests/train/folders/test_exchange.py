"""Runs as folders of torch.distributed.checkpoint: read by torch, read back bit for bit, and hostile ones refused."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex

from nestopt.cli import main
from nestopt.train.checkpoints import dcp as ours
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.errors import CheckpointError
from nestopt.train.loop import train
from nestopt.train.run import Run, weights_from
from tests.train.folders.small import rows, small

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture(scope="module")
def exported(text: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run of 6 steps, and its folder of DCP."""
    root = tmp_path_factory.mktemp("exchange")
    run = train(small(text, root / "runs", train__steps=6), quiet=True).run
    assert main(["export", str(run.path), str(root / "dcp")]) == 0
    return SimpleNamespace(run=run, folder=root / "dcp")


def content(run: Path) -> tuple[dict[str, Tensor], dict[str, object]]:
    with ShardReader(run) as parts:
        return {key: parts.whole(key) for key in parts.keys()}, parts.meta  # noqa: SIM118


def test_torch_reads_what_is_exported(exported: SimpleNamespace) -> None:
    model = exported.run.load_model()
    for param in model.parameters():
        nn.init.zeros_(param)
    state = {"model": model.state_dict()}
    dcp.load(state, checkpoint_id=exported.folder, no_dist=True)
    model.load_state_dict(state["model"])
    for name, param in exported.run.load_model().named_parameters():
        assert torch.equal(param, dict(model.named_parameters())[name]), name


def test_a_run_comes_back_whole_and_goes_on_as_it_would(
    exported: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "back"
    assert main(["import", str(exported.folder), str(out)]) == 0
    assert f"a run at step 6; go on with it: nestopt train --resume {out}" in capsys.readouterr().out
    (ours_, meta), (theirs, meta_too) = content(out), content(exported.run.path)
    assert meta == meta_too
    assert ours_.keys() == theirs.keys()
    assert all(torch.equal(ours_[key], theirs[key]) for key in theirs)
    twin = tmp_path / "twin"
    shutil.copytree(exported.run.path, twin)
    config = exported.run.config()
    config.train.steps = 10
    one, other = (train(config, resume=path, quiet=True).run for path in (out, twin))
    assert rows(one) == [row for row in rows(other) if row["step"] > 6]
    weights, weights_too = (weights_from(run.model_file)[0] for run in (one, other))
    assert all(torch.equal(weights[name], weights_too[name]) for name in weights_too)


def test_weights_of_any_program_are_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Linear(4, 3).bfloat16()
    state = {"model": model.state_dict(), "step": 7, "optimizer": {"m": torch.ones(2)}}
    dcp.save(state, checkpoint_id=tmp_path / "theirs", no_dist=True)
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "w.safetensors")]) == 0
    assert capsys.readouterr().out.endswith("2 tensors; left out, being no tensors: step\n")
    weights, _ = weights_from(tmp_path / "w.safetensors")
    assert weights.keys() == {"weight", "bias"}
    assert all(torch.equal(weights[name], param) for name, param in model.state_dict().items())
    assert main(["import", str(tmp_path / "theirs"), str(tmp_path / "run")]) == 2
    assert "is not an export of a run of nestopt; give OUT.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_several_processes_have_cut_up_is_put_together(tmp_path: Path) -> None:
    halves = {"upper": torch.randn(2, 4), "lower": torch.randn(3, 4)}
    dcp.save(halves, checkpoint_id=tmp_path, no_dist=True)
    found: Metadata = pickle.loads((tmp_path / ".metadata").read_bytes())
    whole = found.state_dict_metadata["upper"]
    whole.size = torch.Size([5, 4])
    whole.chunks = [ChunkStorageMetadata(torch.Size([at, 0]), torch.Size([n, 4])) for at, n in ((0, 2), (2, 3))]
    places = [found.storage_data[MetadataIndex(name, torch.Size([0, 0]), 0)] for name in halves]
    found.state_dict_metadata = {"w": whole}
    found.storage_data = {
        MetadataIndex("w", torch.Size([at, 0]), i): place
        for i, (at, place) in enumerate(zip((0, 2), places, strict=True))
    }
    (tmp_path / ".metadata").write_bytes(pickle.dumps(found))
    tensors, _ = ours.read(tmp_path)
    theirs = {"w": torch.zeros(5, 4)}
    dcp.load(theirs, checkpoint_id=tmp_path, no_dist=True)  # that torch takes it for such a folder, too
    assert torch.equal(tensors["w"], torch.cat([*halves.values()]))
    assert torch.equal(tensors["w"], theirs["w"])


def test_weights_alone_of_a_run_without_a_checkpoint(exported: SimpleNamespace, tmp_path: Path) -> None:
    assert main(["export", str(exported.run.model_file), str(tmp_path / "dcp")]) == 0
    tensors, others = ours.read(tmp_path / "dcp")
    weights, _ = weights_from(exported.run.model_file)
    assert not others
    assert tensors.keys() == {f"model.{name}" for name in weights}


def test_what_is_there_is_not_written_over(
    exported: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["export", str(exported.run.path)], ["import", str(exported.folder)]):
        assert main([*command, str(tmp_path)]) == 2
        assert f"OUT: {tmp_path} is there already; give a new folder" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# -- hostile folders ---------------------------------------------------------------------------------------------------


def copied(exported: SimpleNamespace, tmp_path: Path) -> Path:
    folder = tmp_path / "bad"
    folder.mkdir()
    for path in exported.folder.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def refused(folder: Path, words: str) -> None:
    with pytest.raises(CheckpointError, match=words) as found:
        ours.read(folder)
    assert "\n" not in str(found.value)


class Touch:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("touched",)


def test_a_pickle_is_not_run(exported: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(exported, tmp_path)
    (folder / ".metadata").write_bytes(pickle.dumps(Touch()))
    refused(folder, r"can't be read safely: it asks for posix.mkdir, which is no part of such a folder")
    assert not Path("touched").exists()


def test_a_tensor_is_not_run(exported: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = copied(exported, tmp_path)
    file = folder / "__0_0.distcp"
    torch.save(Touch(), file)
    file.write_bytes(file.read_bytes().ljust(100_000, b"\0"))
    with pytest.raises(CheckpointError):
        ours.read(folder)
    assert not Path("touched").exists()


def first(of: dict[object, Any]) -> Any:
    return next(iter(of.values()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: setattr(first(found.storage_data), "relative_path", "../x"), "'../x' is no name of a file"),
        (lambda found: found.storage_data.pop(next(iter(found.storage_data))), "has not all of"),
        (lambda found: setattr(first(found.state_dict_metadata), "size", torch.Size([2**60])), "of another program"),
        (lambda found: setattr(found, "storage_data", None), "is damaged, or of another program"),
    ],
)
def test_metadata_that_leads_elsewhere_is_refused(
    change: object, words: str, exported: SimpleNamespace, tmp_path: Path
) -> None:
    folder = copied(exported, tmp_path)
    found = pickle.loads((folder / ".metadata").read_bytes())
    change(found)  # type: ignore[operator]
    (folder / ".metadata").write_bytes(pickle.dumps(found))
    refused(folder, words)


def test_files_cut_short_are_refused(exported: SimpleNamespace, tmp_path: Path) -> None:
    folder = copied(exported, tmp_path)
    for name in ("__0_0.distcp", ".metadata"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-300])
        with pytest.raises(CheckpointError):
            ours.read(folder)
    (folder / ".metadata").unlink()
    refused(folder, "is no folder of torch.distributed.checkpoint: it has no .metadata")


def test_an_imported_run_opens(exported: SimpleNamespace, tmp_path: Path) -> None:
    main(["import", str(exported.folder), str(tmp_path / "run")])
    loaded = Run.open(tmp_path / "run").load_model()
    for name, param in exported.run.load_model().named_parameters():
        assert torch.equal(param, dict(loaded.named_parameters())[name])
