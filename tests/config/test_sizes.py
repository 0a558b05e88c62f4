from __future__ import annotations

import pytest
import torch

import nestopt
from nestopt.config import Config, ConfigError
from nestopt.config.sizes import NAMES

SIZES = {"340m": 340e6, "760m": 760e6, "1.3b": 1.3e9}


@pytest.mark.parametrize("name", NAMES)
def test_a_model_is_as_large_as_its_name_says(name: str) -> None:
    with torch.device("meta"):
        model = nestopt.model(name)
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(SIZES[name.split("-")[1]], rel=0.02)


def test_a_config_may_name_its_model() -> None:
    config = Config.from_data({"model": "hope-340m"})
    assert (config.model.dim, config.model.blocks, config.model.mlp.periods) == (1024, 24, (256, 1024))
    assert Config.from_data(config.to_data()) == config


@pytest.mark.parametrize("refused", [nestopt.model, lambda name: Config.from_data({"model": name})])
def test_a_name_that_is_none(refused) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match=r"'hope-350m'.*Did you mean 'hope-340m'\?"):
        refused("hope-350m")
