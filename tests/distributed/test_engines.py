"""Any number of processes trains as one does, under every engine."""

from __future__ import annotations

import pytest
import torch

from nestopt.config import Config
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from tests.distributed.cases import level
from tests.distributed.conftest import torchrun
from tests.distributed.settings import ENGINES, LEVELS, RUNS, STACKS, STEPS, document_run, run

pytestmark = pytest.mark.distributed

TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-3}


def measured(records):
    """All losses, in their order."""
    return [line[key] for line in records for key in ("train/loss", "eval/bits_per_byte") if key in line]


@pytest.fixture(scope="module")
def alone(text, out):
    """What one process measures, without any engine."""
    found = {}
    for dtype in TOLERANCE:
        for kind in RUNS:
            config = Config.from_data(run(kind, text, str(out / "alone"), dtype=dtype))
            found[dtype, kind] = measured(read(train(config, quiet=True).run.metrics_file))
            assert len(found[dtype, kind]) == STEPS + 3
            assert found[dtype, kind][-2] < found[dtype, kind][0]
    return found


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_run_is_the_same_everywhere(ends, alone, dtype, kind, name, world):
    losses = measured(ends["same", dtype, kind, name, world]["gave"]["records"])
    assert losses == pytest.approx(alone[dtype, kind], rel=TOLERANCE[dtype])


@pytest.mark.parametrize("kind", RUNS)
def test_a_run_on_documents_is_the_same_everywhere(ends, shards, out, kind):
    """Each process has other documents, of other numbers of tokens; what one saved, another number takes up."""
    if shards is None:
        pytest.skip("needs the extra data")
    config = Config.from_data(document_run(kind, shards, str(out / "alone")))
    alone = measured(read(train(config, quiet=True).run.metrics_file))
    assert len(alone) == STEPS + 3
    for name in ENGINES:
        losses = measured(ends["documents", kind, name]["gave"]["records"])
        assert losses == pytest.approx(alone, rel=1e-5), name
    if kind == "hope":
        assert measured(ends["documents", "again"]["gave"]["records"]) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("spec", {**LEVELS, **STACKS})
def test_a_level_is_the_same_everywhere(ends, spec, name):
    """The support table of the documentation: each of its cells."""
    one = level({**LEVELS, **STACKS}[spec])
    assert one[-1] != one[0]
    assert ends["level", spec, name]["gave"] == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize("name", ["fsdp2", "zero 1", "zero 2", "zero 3"])
def test_tensors_that_go_in_rounds_are_stepped_as_those_that_go_at_once(ends, name):
    """Several are then on their way at a time, to their owners and back, and owners have differently many."""
    found = ends["rounds", name]["gave"]
    assert max(found["rounds"]) > 2
    assert found["losses"] == pytest.approx(level("delta_momentum"), rel=1e-5)


@pytest.mark.parametrize("name", ENGINES)
def test_parts_of_a_step_add_up_in_bfloat16_too(ends, name):
    """Of the four, each process's every part counts."""
    one = level(LEVELS["m3"], accumulate=4, dtype="bfloat16")
    assert one != pytest.approx(level(LEVELS["m3"], accumulate=4), rel=1e-5)  # it is bfloat16
    assert ends["low", name]["gave"] == pytest.approx(one, rel=6e-3)  # DeepSpeed adds gradients up in bfloat16


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("spec", ["muon", "m3"])
def test_a_matrix_is_orthogonalized_by_its_owner_alone(ends, spec, name):
    """Two matrices in six steps: m3's slow memory is read at every second. Whole in every process, twice as often."""
    times = {"muon": {"muon": 2 * 6, "m3": 0}, "m3": {"muon": 0, "m3": 2 * (6 + 3)}}[spec]
    everywhere = 2 if name in ("ddp", "zero 0") else 1
    found = ends["iterations", spec, name]["gave"]
    assert found == {key: count * everywhere for key, count in times.items()}


def test_the_command_of_the_documentation(text, tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(Config.from_data(run("hope", text, str(tmp_path))).to_yaml())
    settings = tmp_path / "ds.json"
    settings.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}')
    status, output = torchrun(2, "-m", "nestopt", "train", path, "--deepspeed", settings)
    assert status == 0, output
    assert "this model" in output
    weights, _ = checkpoint.load(tmp_path / "001" / "model.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
