"""From files and to files."""

from __future__ import annotations

from pathlib import Path

import pytest

from nestopt import levels as L
from nestopt.config import Config, ConfigError, load, save
from nestopt.core import Chain, Gate, Level, chain, nest, parallel
from nestopt.core.memories import Matrix

RUN = """
model:
  mixer: {level: titans, rule: [{level: momentum, beta: {gate: 0.5}}, adam]}
  heads: 2
optimizer:
  stack:
  - {level: momentum, beta: 5e-1, period: 16}
  - newton_schulz
  rest: {level: adamw, eps: 1e-6}
"""


def test_a_run(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN)
    config = load(path, ["optimizer.stack[0].period=4", "train.steps=3", "optimizer.rest.betas=[0.5, 0.6]"])
    assert isinstance(config, Config)
    assert config.model.mixer == L.titans(rule=chain(L.momentum(Gate(0.5)), L.adam()))
    assert config.optimizer.stack == chain(momentum_every_4=L.momentum(0.5, period=4), newton_schulz=L.newton_schulz())
    assert config.optimizer.rest.stack == L.adamw((0.5, 0.6), eps=1e-6)
    assert config.train.steps == 3
    save(config, tmp_path / "out" / "again.yaml")
    assert load(str(tmp_path / "out" / "again.yaml")) == config


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("momentum\n", L.momentum()),
        ("- momentum\n- {level: adam, eps: 1.0e-3}\n", chain(L.momentum(), L.adam(eps=1e-3))),
        ("level: titans\nmemory: matrix\n", L.titans(memory=Matrix())),
    ],
)
def test_a_stack_on_its_own(tmp_path: Path, text: str, level: Level) -> None:
    path = tmp_path / "stack.yaml"
    path.write_text(text)
    loaded = load(path)
    assert loaded == level
    save(loaded, tmp_path / "again.yaml")
    assert load(tmp_path / "again.yaml") == loaded


def test_overrides_of_a_stack(tmp_path: Path) -> None:
    path = tmp_path / "stack.yaml"
    path.write_text("- momentum\n- adam\n")
    assert load(path, ["[0].beta=0.5", "period=2"]) == Chain({"momentum": L.momentum(0.5), "adam": L.adam()}, period=2)
    assert load({"level": "momentum"}, ["beta={gate: 0.3}"]) == L.momentum(Gate(0.3))


def test_a_deep_stack_survives(tmp_path: Path) -> None:
    stack = nest(
        L.momentum(0.5, period=8),
        chain(a=parallel(L.titans(rule=L.adam()), L.momentum(Gate(0.4)), weights=[0.5, 2]), b=L.muon(scale=None)),
    )
    save(stack, tmp_path / "deep.yaml")
    assert load(tmp_path / "deep.yaml") == stack


def test_an_empty_file_is_the_default_run(tmp_path: Path) -> None:
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing yet\n")
    assert load(path) == load({}) == Config()
    assert load(path, ["train.seed=3"]).train.seed == 3


def test_an_override_may_mend_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {stack: not_installed}\ndata: {dataset: gone}\n")
    config = load(path, ["optimizer.stack=adam", "data.dataset=stdlib", "optimizer.rest.lr=1"])
    assert config.optimizer.stack == L.adam()
    assert config.optimizer.rest.lr == 1


def test_errors_name_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {stack: [adam, {level: momentum, bta: 1}]}\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: optimizer.stack[1].bta: 1 is not allowed; momentum has no key 'bta'.")
    assert (caught.value.path, caught.value.source) == ("optimizer.stack[1].bta", str(path))
    path.write_text("[adam, {level: momentum, bta: 1}]\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert str(caught.value).startswith(f"{path}: [1].bta: 1 is not allowed;")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "hope.yaml").touch()
    with pytest.raises(ConfigError, match=r"no file '.*hpe.yaml': it is not in '.*'\. Did you mean 'hope.yaml'\?"):
        load(tmp_path / "hpe.yaml")
    with pytest.raises(ConfigError, match=r"the folder '.*nowhere' does not exist"):
        load(tmp_path / "nowhere" / "hope.yaml")
    with pytest.raises(ConfigError, match="is a folder; give a YAML file"):
        load(tmp_path)


def test_a_file_that_holds_neither(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("3\n")
    with pytest.raises(ConfigError, match="give a mapping with the sections"):
        load(path)


def test_a_mapping_is_not_changed() -> None:
    data = {"optimizer": {"stack": "momentum"}}
    load(data, ["optimizer.stack.beta=0.5"])
    assert data == {"optimizer": {"stack": "momentum"}}
