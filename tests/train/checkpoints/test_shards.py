"""Checkpoints of several parts: read whole or in stretches, whoever wrote what; whole at any moment."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.optim.sharded.saved import TensorSlice
from nestopt.train.checkpoints.shards import INDEX, ShardReader, ShardWriter
from nestopt.train.errors import CheckpointError


def write(folder, per_process, meta=None, number=0):
    """As processes would that wait for each other: the first one last, since it makes the parts the checkpoint."""
    for rank in reversed(range(len(per_process))):
        ShardWriter(folder, rank, len(per_process), lambda: None, number).save(per_process[rank], meta or {})


@given(
    shape=st.lists(st.integers(0, 5), max_size=3),
    cuts=st.lists(st.floats(0, 1), max_size=3),
    at=st.floats(0, 1),
    to=st.floats(0, 1),
)
@settings(deadline=None, max_examples=40)
def test_stretches_of_any_cut_are_read_back(tmp_path_factory, shape, cuts, at, to):
    folder = tmp_path_factory.mktemp("parts")
    numel = math.prod(shape)
    tensor = torch.arange(float(numel)).view(shape)
    ends = [0, *sorted(round(cut * numel) for cut in cuts), numel]
    pieces = [
        [("a", TensorSlice(tensor.flatten()[low:high], tuple(shape), low))] for low, high in itertools.pairwise(ends)
    ]
    pieces[0].append(("b", TensorSlice(torch.ones(2, 3))))
    write(folder, pieces)
    low, high = sorted((round(at * numel), round(to * numel)))
    with ShardReader(folder) as parts:
        assert set(parts.keys()) == {"a", "b"}
        assert parts.shape("a") == tuple(shape)
        assert torch.equal(parts.whole("a"), tensor)
        assert torch.equal(parts.stretch("a", low, high - low), tensor.flatten()[low:high])
        assert torch.equal(parts.stretch("b", 1, 4), torch.ones(4))


def test_rows_are_read_without_the_rest_of_a_whole_tensor(tmp_path):
    tensor = torch.arange(12.0).view(4, 3)
    write(tmp_path, [[("w", TensorSlice(tensor)), ("s", TensorSlice(torch.tensor(7.0)))]])
    with ShardReader(tmp_path) as parts:
        assert torch.equal(parts.stretch("w", 4, 6), tensor.flatten()[4:10])
        assert torch.equal(parts.stretch("s", 0, 1), torch.tensor([7.0]))
        assert torch.equal(parts.whole("s"), torch.tensor(7.0))


def test_the_last_save_is_the_checkpoint_and_the_former_is_gone(tmp_path):
    for number in range(3):
        write(tmp_path, [[("w", TensorSlice(torch.full((2,), float(number))))]] * 2, {"step": number}, number)
    with ShardReader(tmp_path) as parts:
        assert parts.meta == {"step": 2}
        assert parts.number == 3
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-3-part-1-of-2.safetensors",
        "checkpoint-3-part-2-of-2.safetensors",
        "checkpoint.json",
    ]


def test_parts_without_an_index_are_no_checkpoint_yet(tmp_path):
    """A process is killed after some have written their parts: the last good one is still all there."""
    write(tmp_path, [[("w", TensorSlice(torch.zeros(2)))]] * 2, {"step": 1})
    second = ShardWriter(tmp_path, 1, 2, lambda: None, 1)
    second.save([("w", TensorSlice(torch.ones(2)))], {})

    def die() -> None:
        raise KeyboardInterrupt

    first = ShardWriter(tmp_path, 0, 2, die, 1)
    with pytest.raises(KeyboardInterrupt):
        first.save([("w", TensorSlice(torch.ones(2)))], {"step": 2})
    with ShardReader(tmp_path) as parts:
        assert parts.meta == {"step": 1}
        assert torch.equal(parts.whole("w"), torch.zeros(2))


def test_what_is_wrong_is_said(tmp_path):
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: there is no such checkpoint"):
        ShardReader(tmp_path)
    write(tmp_path, [[("w", TensorSlice(torch.arange(3.0), (4,), 0))]])
    with ShardReader(tmp_path) as parts, pytest.raises(CheckpointError, match="do not have all of w"):
        parts.whole("w")
    with ShardReader(tmp_path) as parts, pytest.raises(CheckpointError, match="another model: it has no v"):
        parts.whole("v")
    part = tmp_path / "checkpoint-1-part-1-of-1.safetensors"
    content = part.read_bytes()
    part.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=r"part-1-of-1\.safetensors: cannot be read"):
        ShardReader(tmp_path)
    part.unlink()
    with pytest.raises(CheckpointError, match="this part of the checkpoint is missing"):
        ShardReader(tmp_path)
    part.write_bytes(content)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({**index, "version": 99}))
    with pytest.raises(CheckpointError, match="newer nestopt"):
        ShardReader(tmp_path)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        ShardReader(tmp_path)
