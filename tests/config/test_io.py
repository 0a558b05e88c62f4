"""YAML: what is refused, with its line, and what is written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestopt.config import ConfigError
from nestopt.config.files import write
from nestopt.config.io import dump, parse, read

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@given(plain)
def test_data_survive(data: object) -> None:
    again = parse(dump(data))
    assert again == data
    assert repr(again) == repr(data)  # the order of keys too, and 1 is not 1.0


def test_what_is_written_reads_well() -> None:
    data = {"stack": [{"level": "adam", "betas": [0.9, 0.95]}, "muon"], "none": None, "groups": []}
    same = {"shared": data["stack"], **data}
    assert dump(data) == "stack:\n- level: adam\n  betas: [0.9, 0.95]\n- muon\nnone: null\ngroups: []\n"
    assert "&" not in dump(same)
    assert dump("momentum") == "momentum\n"


@pytest.mark.parametrize(
    ("text", "line", "key", "first"),
    [
        ("optimizer:\n  lr: 1\n  stack: adam\n  lr: 2\n", 4, "lr", 2),
        ("a: {lr: 1,\n b: 2, lr: 3}\n", 2, "lr", 1),
        ("a: {lr: 1, lr: 1}\n", 1, "lr", 1),
        ("- x\n- b: 1\n  'b': 2\n", 3, "b", 2),
    ],
)
def test_a_key_given_twice(tmp_path: Path, text: str, line: int, key: str, first: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value) == f"{path}:{line}: the key {key!r} is given twice, first in line {first}"


def test_merge_keys_may_be_overridden() -> None:
    text = "base: &b {lr: 1, beta: 2}\nmid: &m {<<: *b, lr: 3}\nend: {<<: *m, lr: 4}\n"
    assert parse(text)["end"] == {"lr": 4, "beta": 2}


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: [1, 2\nb: 3\n", 2),
        ("a: 1\n  b: 2\n", 2),
        ("a: 1\n\tb: 2\n", 2),
        ("a: !!python/object/apply:os.system [ls]\n", 1),
        ("a: *nowhere\n", 1),
        ("a: 1\n---\nb: 2\n", 2),
        ("[1]: 2\n{a: 1}: 2\n", 1),
    ],
)
def test_what_is_not_yaml_is_told_with_its_line(tmp_path: Path, text: str, line: int) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert "\n" not in str(caught.value)


def test_what_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"a: \xff\xfe\n")
    with pytest.raises(ConfigError, match="not UTF-8 text"):
        read(path)
    with pytest.raises(ConfigError, match="not allowed"):
        parse("a: \x00")
    with pytest.raises(ConfigError, match="month"):
        parse("a: 2024-13-45")


def test_numbers_survive_to_the_last_bit() -> None:
    for number in (1e-8, 0.1 + 0.2, 5e-324, math.pi * 1e30, -0.0, math.inf):
        assert repr(parse(dump(number))) == repr(number)


def test_a_write_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "run.yaml"
    write("old\n", path)
    write("new\n", path)
    assert path.read_text() == "new\n"

    def full(fd: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write("newer\n", path)
    assert path.read_text() == "new\n"
    assert [p.name for p in path.parent.iterdir()] == ["run.yaml"]


def test_a_written_file_has_the_rights_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "any").touch()
    write("x\n", tmp_path / "ours")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "any").stat().st_mode
