"""Mutated configurations: each gives what it describes, or a ConfigError, and soon."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import nestopt
from nestopt.config import Config, ConfigError, load
from nestopt.models.size import available
from nestopt.train.loop import train
from nestopt.train.run import Run, build_model
from tests.config.mutations import mutated

SOON_S = 2.0


@contextmanager
def soon() -> Iterator[None]:
    """At most so much of this process's time."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < SOON_S


def build(path: Path) -> str:
    """How far a configuration comes: `refused`, `loaded`, or `built`, with an optimizer, where its model is small."""
    try:
        found = load(path)
        if not isinstance(found, Config) or max(found.model.dim, found.model.blocks * 16, found.model.vocab) > 512:
            return "loaded"
        nestopt.optimizer(build_model(found), found)
    except ConfigError:
        return "refused"
    return "built"


def outcomes(seeds: range, folder: Path) -> dict[str, int]:
    path, count = folder / "mutated.yaml", {"refused": 0, "loaded": 0, "built": 0}
    worst = (0.0, -1)
    for seed in seeds:
        path.write_text(mutated(seed), encoding="utf-8")
        begun = time.process_time()
        try:
            count[build(path)] += 1
        except Exception as error:
            pytest.fail(f"seed {seed}: {type(error).__name__}: {error}")
        worst = max(worst, (time.process_time() - begun, seed))
    print(f"{len(seeds):,} tried, {count}, the slowest took {worst[0]:.2f} s (seed {worst[1]})")
    assert worst[0] < SOON_S, f"seed {worst[1]}"
    assert min(count.values()) > len(seeds) / 50  # each of them happens
    return count


def test_a_few_mutated_configurations(tmp_path: Path) -> None:
    outcomes(range(150), tmp_path)


@pytest.mark.slow
def test_thousands_of_mutated_configurations(tmp_path: Path) -> None:
    """With -s, it says what became of them; a quarter of the 10,000 of docs/reliability.md."""
    outcomes(range(0, 10_000, 4), tmp_path)


LAUGHS = "a0: &a0 [lol]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 12))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        pytest.param(LAUGHS, "more than 100,000 items", id="aliases of aliases"),
        pytest.param(MERGES, "more than 100,000 keys", id="merges of merges"),
        pytest.param("train: &a {out: *a}", "nested more than 40 deep", id="an alias of itself"),
        pytest.param("&a [*a]", "nested more than 40 deep", id="a stack of itself"),
        pytest.param(f"model: {'[' * 200}{']' * 200}", "nested more than 40 deep", id="200 levels"),
        pytest.param(f"model: {'{a: ' * 5000}1{'}' * 5000}", "nested more than 40 deep", id="5,000 levels"),
        pytest.param("train: {out: !!timestamp x}", "'x' is no timestamp", id="no timestamp"),
        pytest.param("train: {clip: !!float ''}", "'' is no float", id="no float"),
        pytest.param("train: {clip: !!int ''}", "'' is no int", id="no int"),
        pytest.param("train: {clip: !!bool x}", "'x' is no bool", id="no bool"),
        pytest.param('train: {out: "a\\0b"}', "without NUL", id="NUL in a path"),
        pytest.param(f"train: {{out: {'x' * 300}}}", "255", id="a long name"),
        pytest.param(f"data: {{path: {'x/' * 3000}}}", "4,095", id="a long path"),
        pytest.param(f"train: {{steps: 0x{'f' * 5000}}}", "train.steps", id="a long number"),
        pytest.param(f"x: [{'1, ' * 200_000}1]", "more than 262,144 characters", id="a long file"),
        pytest.param(
            "model: {dim: 1000000007}", "model.heads: 4 is not allowed; give a divisor of", id="a large prime"
        ),
        pytest.param("model: {dim: 4611686018427387847, heads: 1000000}", "give a divisor of", id="a larger one"),
        pytest.param(
            "model: {blocks: 1.0e+9}", "model.blocks: 1000000000.0 is not allowed; give 1024 or less", id="blocks"
        ),
        pytest.param("optimizer: {groups: [{match: '(a+)+$'}]}", "fewer repetitions", id="repeated repeats"),
        pytest.param("optimizer: {groups: [{match: '(a|a)*b'}]}", "fewer repetitions", id="repeated choices"),
        pytest.param(f"optimizer: {{groups: [{{match: '{'a?' * 40}'}}]}}", "fewer repetitions", id="many options"),
        pytest.param("optimizer: {groups: [{match: '.*.*.*.*.*x'}]}", "fewer repetitions", id="many stars"),
        pytest.param("optimizer: {groups: [{match: 'a{4294967296}'}]}", "regular expression", id="a large count"),
        pytest.param(f"optimizer: {{groups: [{{match: '{'(' * 3000}'}}]}}", "regular expression", id="deep groups"),
    ],
)
def test_what_would_hang_or_break_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    with soon(), pytest.raises(ConfigError) as caught:
        load(path)
    assert words in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize(
    "pattern", [r"blocks\.\d+\.mixer", "(q|k|v)_proj.*weight$", ".*attn.*weight", r"^blocks\.(0|1)\.", "(ab)+"]
)
def test_patterns_that_people_write(pattern: str) -> None:
    assert Config.from_data({"optimizer": {"groups": [{"match": pattern}]}}).optimizer.groups[0].match == pattern


@pytest.mark.parametrize("path", ["a\0b", "x" * 300, "x/" * 3000, "/dev/zero"])
def test_a_path_that_no_file_has(path: str) -> None:
    with soon(), pytest.raises(ConfigError):
        load(path)
    with pytest.raises(ConfigError):
        Run.open(path)


def test_data_that_hold_themselves() -> None:
    stack: list[object] = []
    stack.append(stack)
    for given in (stack, {"level": "chain", "levels": stack}):
        with soon(), pytest.raises(ConfigError, match="nested more than 40 deep"):
            nestopt.build("level", given)
        with soon(), pytest.raises(ConfigError, match="nested more than 40 deep"):
            load({"model": {"mixer": given}})
    with soon(), pytest.raises(ConfigError, match="leads more than 40 deep"):
        load({}, [f"{'a.' * 500}b=1"])


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("mixer=cms", "model.mixer: "),
        ("mixer=dgd", "model.mixer: dgd can't run on tokens"),
        ("mixers=[attention, dgd]", "model.mixers[1]: dgd can't run on tokens"),
        ("mlp=adam", "model.mlp: 'adam' is not allowed; give a cms"),
        ("dim=100000000", "model.dim: 100000000 is not allowed; the model's weights would take 320 PB"),
        ("vocab=100000000000", "model.vocab: 100000000000 is not allowed; the model's weights would take 128 TB"),
        ("conv=10000000000", "model.conv: 10000000000 is not allowed; the model's weights would take 12.8 TB"),
        ("mlp.memory.hidden=100000000000", "model.mlp.memory.hidden: 100000000000 is not allowed; the model's weights"),
    ],
)
def test_what_no_model_can_be_made_of(override: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        nestopt.model(load({}, [f"model.{override}"]))
    assert words in str(caught.value)


def test_what_takes_no_memory_may_be_of_any_size() -> None:
    with torch.device("meta"):
        assert nestopt.model({"dim": 131072, "blocks": 1}).embedding.weight.shape == (256, 131072)


@pytest.mark.parametrize("key", ["data.batch", "data.window", "model.dim"])
def test_a_batch_that_does_not_fit_is_refused(key: str, tmp_path: Path) -> None:
    config = load({}, [f"{key}=1000000000", f"train.out={tmp_path}", "train.device=cpu"])
    there = available(torch.device("cpu"))
    assert there is not None
    with pytest.raises(
        ConfigError, match=rf"{key}: 1000000000 is not allowed; .* would take .*B of memory or more, and there"
    ):
        train(config, quiet=True)
    assert not list(tmp_path.iterdir())


def test_a_run_whose_config_is_a_stack(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("[momentum, adam]\n")
    with pytest.raises(ConfigError, match="is a stack, not the configuration of a run"):
        Run(tmp_path).config()


@pytest.mark.parametrize(
    ("section", "path", "words"),
    [
        ({"stack": "m3", "route": "all"}, "optimizer.stack", "m3 takes matrices, and"),
        ({"groups": [{"match": "", "stack": "adam"}]}, "optimizer.stack", "muon gets none of the"),
        ({"groups": [{"match": "nowhere"}]}, "optimizer.groups[0].match", "matches no parameter"),
    ],
)
def test_an_optimizer_that_does_not_fit_the_model(section: object, path: str, words: str) -> None:
    config = Config.from_data({"model": {"dim": 16, "heads": 2, "blocks": 1}, "optimizer": section})
    with pytest.raises(ConfigError, match=words) as caught:
        nestopt.optimizer(build_model(config), config)
    assert caught.value.path == path
