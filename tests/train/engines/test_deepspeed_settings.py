"""DeepSpeed's JSON and the configuration: one of them says each thing, or both say the same."""

from __future__ import annotations

import json

import pytest
import torch

import nestopt
from nestopt.cli import main
from nestopt.config import Config, ConfigError
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.train.engines.deepspeed_settings import checked, merged, read, stage_of


def config(given, **train):
    return Config.from_data({"data": {"batch": 8}, "train": {"engine": "deepspeed", "deepspeed": given, **train}})


def test_what_the_configuration_says_is_put_in():
    found = merged(config({"zero_optimization": {"stage": 2, "overlap_comm": True}}, accumulate=2, clip=0.5), world=2)
    assert found["train_batch_size"] == 8
    assert found["train_micro_batch_size_per_gpu"] == 2
    assert found["gradient_accumulation_steps"] == 2
    assert found["gradient_clipping"] == 0.5
    assert found["zero_optimization"] == {"stage": 2, "overlap_comm": True}
    assert found["bf16"] == {"enabled": False}
    assert found["zero_allow_untested_optimizer"] is True
    assert found["zero_force_ds_cpu_optimizer"] is False


def test_clipping_is_off_where_nobody_asks_for_it():
    """DeepSpeed's own default is to clip at 1."""
    assert merged(config(None, clip=None), world=1)["gradient_clipping"] == 0.0
    assert checked({}, "config")["gradient_clipping"] == 0.0
    assert checked({"gradient_clipping": "auto"}, "config")["gradient_clipping"] == 0.0
    assert checked({"gradient_clipping": 0.3}, "config")["gradient_clipping"] == 0.3


@pytest.mark.parametrize(
    ("given", "train"),
    [
        ({"gradient_clipping": "auto"}, {}),
        ({"gradient_clipping": 1.0}, {}),
        ({"bf16": {"enabled": "auto"}}, {"dtype": "bfloat16"}),
        ({"train_batch_size": 8}, {}),
        ({"zero_optimization": {"stage": 3}}, {"zero_stage": 3}),
    ],
)
def test_the_same_may_be_said_twice(given, train):
    merged(config(given, **train), world=1)


@pytest.mark.parametrize(
    ("given", "train", "words"),
    [
        ({"gradient_clipping": 0.1}, {}, ["train.deepspeed.gradient_clipping", "0.1", "train.clip says 1.0"]),
        ({"train_batch_size": 4}, {}, ["train_batch_size", "data.batch says 8"]),
        ({"bf16": {"enabled": True}}, {}, ["bf16.enabled", "train.dtype says False"]),
        ({"zero_optimization": {"stage": 1}}, {"zero_stage": 2}, ["stage", "train.zero_stage says 2"]),
        ({"gradient_accumulation_steps": 4}, {}, ["gradient_accumulation_steps", "train.accumulate says 1"]),
        ({"optimizer": {"type": "AdamW"}}, {}, ["train.deepspeed.optimizer", "section optimizer"]),
        ({"scheduler": {"type": "WarmupLR"}}, {}, ["train.deepspeed.scheduler", "train.warmup"]),
        ({"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}, {}, ["zero_hpz_partition_size"]),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, {}, ["offload_param.device", "give cpu"]),
    ],
)
def test_a_json_that_fights_the_configuration_is_refused(given, train, words):
    with pytest.raises(ConfigError) as error:
        merged(config(given, **train), world=1)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *[("zero_optimization.stage", stage) for stage in (9, -1, 4, True, False, "2", "two", 1.5, 2.0, [], {})],
        *[("zero_optimization", value) for value in (3, True, False, "stage 2", [2], [])],
        *[(section, value) for section in ("bf16", "fp16", "data_types") for value in (True, 1, "on", [])],
        *[(f"zero_optimization.{part}", "cpu") for part in ("offload_optimizer", "offload_param")],
        ("scheduler", "WarmupLR"),
        ("optimizer", "AdamW"),
        ("activation_checkpointing", 3),
    ],
)
def test_sections_that_are_no_mappings_and_stages_that_are_none_are_refused(path, value):
    given = value
    for key in reversed(path.split(".")):
        given = {key: given}
    for key, asked in (
        ("train.deepspeed", lambda: merged(config(given), world=1)),
        ("config", lambda: checked(given, "config")),
    ):
        with pytest.raises(ConfigError) as error:
            asked()
        assert error.value.path == f"{key}.{path}"
        assert str(error.value).startswith(f"{key}.{path}: {value!r} is not allowed; give")
    if path.startswith("zero_optimization") and "offload" not in path:
        with pytest.raises(ConfigError, match="zero_optimization"):
            stage_of(given)


def test_sections_that_are_null_are_not_there():
    sections = {"zero_optimization": None, "bf16": None, "fp16": None, "optimizer": None, "scheduler": None}
    assert merged(config(sections), world=1) == merged(config({}), world=1)
    assert merged(config({"zero_optimization": {"stage": 2, "offload_param": None}}), world=1)["zero_optimization"] == {
        "stage": 2
    }
    assert "amp" not in checked({"amp": False}, "config")


def test_a_file_that_is_no_json_is_refused_by_its_name(tmp_path, capsys):
    path = tmp_path / "ds.json"
    path.write_text("{")
    with pytest.raises(ConfigError, match=r"--deepspeed.*no JSON"):
        read(path)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="a JSON object"):
        read(path)
    assert main(["train", "--deepspeed", str(tmp_path / "dss.json")]) == 2
    said = capsys.readouterr().err
    assert "--deepspeed" in said
    assert "ds.json" in said  # the nearest name


def test_the_stage_is_the_json_s_where_the_configuration_has_none():
    assert stage_of({"zero_optimization": {"stage": 2}}) == 2
    assert stage_of({}) == 0
    assert merged(config({"zero_optimization": {"stage": 2}}), world=1)["zero_optimization"]["stage"] == 2
    assert merged(config(None), world=1)["zero_optimization"]["stage"] == 0


def test_settings_are_kept_with_the_run(tmp_path):
    given = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 500000000}}
    text = config(given).to_yaml()
    path = tmp_path / "config.yaml"
    path.write_text(text)
    assert nestopt.load(path).train.deepspeed == json.loads(json.dumps(given))


def test_they_need_their_engine():
    with pytest.raises(ConfigError, match=r"deepspeed.*engine=deepspeed"):
        Config.from_data({"train": {"deepspeed": {"zero_optimization": {"stage": 1}}}})


def test_what_levels_can_t_be_stepped_under_is_refused():
    from nestopt.train.engines.deepspeed import _check_levels

    model = torch.nn.Linear(4, 4)
    muon = Sharded(nestopt.optimizer(model, ["ggd", "momentum"], rest="adamw"))
    _check_levels(muon, {"zero_optimization": {"stage": 3}})
    own = Sharded(nestopt.optimizer(model, [{"level": "ggd", "objective": "huber"}, "momentum"]))  # within a stack
    with pytest.raises(ConfigError, match=r"zero_optimization.stage.*give stage 2"):
        _check_levels(own, {"zero_optimization": {"stage": 3}})
    model.weight.allreduce = False  # as DeepSpeed marks the experts of its MoE
    with pytest.raises(ValueError, match="weight is an expert's"):
        _check_levels(Sharded(nestopt.optimizer(model, "adam")), {})
