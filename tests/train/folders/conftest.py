"""A small text, and a run on it that has ended."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from nestopt.cli import main
from nestopt.train.loop import train
from nestopt.train.run import Run
from tests.train.folders.small import small


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("levels remember gradients and tokens alike. " * 200)
    return path


@pytest.fixture(scope="session")
def ended(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that has ended, never to be changed."""
    return train(small(text, tmp_path_factory.mktemp("ended")), quiet=True).run


@pytest.fixture
def copy(ended: Run, tmp_path: Path) -> Run:
    """Of it, to be damaged."""
    shutil.copytree(ended.path, tmp_path / "001")
    return Run(tmp_path / "001")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Run a command that must be refused in a sentence; gives that."""

    def go(*args: object) -> str:
        status = main([str(arg) for arg in args])
        said = capsys.readouterr().err.strip().splitlines()
        assert status == 2, said
        assert said
        assert said[-1].startswith("nestopt: "), said
        assert len(said) == 1, said
        return said[-1]

    return go
