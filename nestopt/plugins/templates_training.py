"""Templates of what is in training: data, tasks, optimizers, models, schedules, callbacks, loggers and commands."""

from __future__ import annotations

_IMPORTS = "import nestopt\nimport pytest\n"

DATASET = '''\
import dataclasses

import nestopt
import numpy as np
from nestopt.train.data import Dataset


@dataclasses.dataclass(frozen=True)
class Text:
    """Bytes to train on, and bytes held out."""

    name: str
    train: np.ndarray
    held_out: np.ndarray


class $cls(Dataset):
    """Sums in words, made by a rule: replace `load` by one that reads your text.

    Args:
        lines: how many there are. Default 20,000.
        seed: of the numbers.
    """

    lines: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("lines", 1000)

    def load(self) -> Text:
        pairs = np.random.default_rng(self.seed).integers(0, 100, (self.lines, 2))
        text = "".join(f"{a} + {b} = {a + b}\\n" for a, b in pairs).encode()
        cut = len(text) * 19 // 20
        data = np.frombuffer(text, dtype=np.uint8)
        return Text("$name", data[:cut], data[cut:])
'''

DATASET_TESTS = """
def test_it_keeps_the_contract():
    check_dataset($module.$cls())


def test_a_configuration_names_it():
    config = nestopt.load({"data": {"dataset": {"dataset": "$name", "lines": 1000}}})
    text = config.data.dataset.load()
    assert bytes(text.train).startswith(b"85 + 63 = 148\\n")
    assert nestopt.load(config.to_data()) == config


def test_a_value_out_of_range_is_refused_by_name():
    with pytest.raises(nestopt.ConfigError, match="data.dataset.lines: 3 is not allowed"):
        nestopt.load({"data": {"dataset": {"dataset": "$name", "lines": 3}}})
"""

TASK = '''\
import nestopt
import torch
from nestopt.train.data import Examples, Task


class $cls(Task):
    """The largest number so far.

    Args:
        numbers: how many there are. Default 16.
    """

    numbers: int = 16
    tests = ("twice",)  # longer than in training

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("numbers", 2)

    @property
    def vocab(self) -> int:
        return self.numbers

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        length = 64 if part == "twice" else 32
        tokens = torch.randint(self.numbers, (count, length), generator=generator)
        return Examples(tokens, tokens.cummax(1).values)
'''

TASK_TESTS = """
def test_it_keeps_the_contract():
    check_task($module.$cls())


def test_targets_are_the_largest_so_far():
    tokens, targets, _ = $module.$cls(8).draw(3, torch.Generator().manual_seed(0))
    for row, right in zip(tokens.tolist(), targets.tolist()):
        assert right == [max(row[: place + 1]) for place in range(len(row))]


def test_a_configuration_names_it():
    config = nestopt.load({"data": {"task": {"task": "$name", "numbers": 12}}})
    assert config.data.task == $module.$cls(numbers=12)
    with pytest.raises(nestopt.ConfigError, match="data.task.numbers: 1 is not allowed"):
        nestopt.load({"data": {"task": {"task": "$name", "numbers": 1}}})
"""

CALLBACK = '''\
import math
from pathlib import Path

import nestopt
from nestopt.train.callbacks import Callback, Moment


class $cls(Callback):
    """Ends a run whose loss has risen far above its best, and notes each checkpoint in `checkpoints.txt`.

    Args:
        ratio: how far above the best is too far. Default 3.
    """

    ratio: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("ratio", 1.0)

    def on_eval(self, moment: Moment, bits_per_byte: float) -> None:
        scores = [record.get("eval/bits_per_byte", math.inf) for record in moment.records()]
        if bits_per_byte > self.ratio * min(scores):
            moment.stop(f"{bits_per_byte:.2f} bits per byte are {self.ratio:g} times the best")

    def on_checkpoint(self, moment: Moment, path: Path) -> None:
        with open(moment.run.path / "checkpoints.txt", "a", encoding="utf-8") as file:
            file.write(f"{moment.step} {path.name}\\n")
'''

CALLBACK_TESTS = """
def test_it_works_in_a_run(tmp_path):
    run = check_in_a_run($module.$cls(), tmp_path)
    assert (run / "checkpoints.txt").read_text().splitlines()[0] == "2 checkpoint.json"


def test_a_configuration_names_it():
    config = nestopt.load({"train": {"callbacks": [{"callback": "$name", "ratio": 2.0}]}})
    assert config.train.callbacks == [$module.$cls(ratio=2.0)]


def test_a_value_out_of_range_is_refused_by_name():
    with pytest.raises(nestopt.ConfigError, match=r"train.callbacks\\[0\\].ratio: 0.5 is not allowed"):
        nestopt.load({"train": {"callbacks": [{"callback": "$name", "ratio": 0.5}]}})
"""

LOGGER = '''\
from collections.abc import Mapping, Sequence
from typing import Any

import nestopt
from nestopt.config import Config
from nestopt.train.loggers import Logger
from nestopt.train.run import Run


class $cls(Logger):
    """Writes a line of text a record into a file of the run's folder: replace it by your own place.

    Args:
        file: its name. Default `log.txt`.
    """

    file: str = "log.txt"

    def begin(self, run: Run, config: Config, records: Sequence[Mapping[str, Any]]) -> None:
        # what is in `records` stands in the run's record already; what came later is measured again
        self._file = open(run.path / self.file, "w", encoding="utf-8")
        for record in records:
            self.log(record)

    def log(self, record: Mapping[str, Any]) -> None:
        print(*(f"{name}={value:.6g}" for name, value in record.items()), file=self._file, flush=True)

    def close(self) -> None:
        self._file.close()
'''

LOGGER_TESTS = """
def test_it_works_in_a_run_and_has_everything_once(tmp_path):
    run = check_in_a_run($module.$cls(), tmp_path)
    lines = (run / "log.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines if "train/loss" in line] == [f"step={n}" for n in range(1, 7)]


def test_a_configuration_names_it():
    config = nestopt.load({"train": {"loggers": [{"logger": "$name", "file": "x.txt"}]}})
    assert config.train.loggers == [$module.$cls(file="x.txt")]
"""

SCHEDULE = '''\
import nestopt
from nestopt.train.schedule import Schedule


class $cls(Schedule):
    """Up in a straight line, constant, and down along a power of what is left.

    Args:
        power: 1 is linear. Default 2.
    """

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("power", 0.0)

    def __call__(self, progress: float, warmup: float, decay: float) -> float:
        if progress < warmup:
            return progress / warmup
        return min(1.0, (1 - progress) / decay if decay else 1.0) ** self.power
'''

SCHEDULE_TESTS = """
def test_it_keeps_the_contract():
    check_schedule($module.$cls())


def test_it_is_the_equation():
    found = [$module.$cls()(progress, 0.2, 0.4) for progress in (0.1, 0.2, 0.5, 0.8, 1.0)]
    assert found == pytest.approx([0.5, 1, 1, 0.25, 0])


def test_a_configuration_names_it():
    config = nestopt.load({"train": {"decay_shape": "$name"}}, ["train.decay_shape.power=3"])
    assert config.train.decay_shape == $module.$cls(power=3.0)
"""

OPTIMIZER = '''\
from collections.abc import Iterable
from typing import Any

import nestopt


class $cls(nestopt.optim.Nested):
    """A momentum whose direction is divided by the root of a second moment: replace it by a stack of your own.

    Args:
        params: parameters, or groups of them.
        lr: learning rate. Default 0.001.
        beta: decay of the momentum. Default 0.9.
        weight_decay: decoupled. Default 0.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, beta: float = 0.9, weight_decay: float = 0.0) -> None:
        stack = nestopt.chain([nestopt.levels.momentum(beta), nestopt.levels.second_moment()])
        super().__init__(params, stack, lr=lr, weight_decay=weight_decay)
'''

OPTIMIZER_TESTS = """
def test_it_does_what_loops_for_torch_rely_on():
    check_optimizer(lambda params: $module.$cls(params, lr=0.01))


def test_it_is_known_by_its_name():
    assert nestopt.optim.$name is $module.$cls
"""

MODEL = '''\
import nestopt

$name = {
    "mixer": "deltanet",
    "mlp": {"level": "cms", "periods": [1]},
    "dim": 64,
    "blocks": 2,
    "heads": 4,
}
"""The section `model` of a configuration: replace it by your own."""
'''

MODEL_TESTS = """
def test_it_is_a_model():
    tokens = torch.randint(256, (2, 16))
    logits, _ = nestopt.model("$registered")(tokens)
    assert logits.shape == (2, 16, 256)


def test_a_configuration_names_it():
    assert nestopt.load({"model": "$registered"}, ["model.dim=32"]).model.dim == 32
"""

COMMAND = '''\
import argparse

import nestopt
from nestopt.command import Command


class $cls(Command):
    """How many numbers the model of a configuration has."""

    help = "how many parameters a configuration's model has"
    examples = "  nestopt $registered run.yaml"

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("config", metavar="CONFIG.yaml")

    def run(self, args: argparse.Namespace) -> int:
        model = nestopt.model(nestopt.load(args.config))
        print(f"{sum(param.numel() for param in model.parameters()):,}")
        return 0
'''

COMMAND_TESTS = """
def test_it_runs(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("model: {dim: 8, blocks: 1, heads: 1, mixers: [linear_attention]}")
    assert main(["$registered", str(tmp_path / "run.yaml")]) == 0
    assert int(capsys.readouterr().out.replace(",", "")) > 1000


def test_it_has_help(capsys):
    with pytest.raises(SystemExit):
        main(["$registered", "--help"])
    assert "nestopt $registered run.yaml" in capsys.readouterr().out


def test_a_file_that_is_not_there_is_refused_in_a_line(capsys):
    assert main(["$registered", "gone.yaml"]) == 2
    assert "gone.yaml" in capsys.readouterr().err
"""


HOOKS: dict[str, tuple[str, str, str, str, str]] = {
    "optimizer": (
        "nestopt_register_optimizers",
        OPTIMIZER,
        f"{_IMPORTS}from nestopt.testing import check_optimizer\n",
        OPTIMIZER_TESTS,
        "```python\noptimizer = nestopt.optim.$name(model.parameters(), lr=1e-3)\n```",
    ),
    "model": (
        "nestopt_register_models",
        MODEL,
        f"{_IMPORTS}import torch\n",
        MODEL_TESTS,
        '```python\nmodel = nestopt.model("$registered")\n```',
    ),
    "dataset": (
        "nestopt_register_datasets",
        DATASET,
        f"{_IMPORTS}from nestopt.testing import check_dataset\n",
        DATASET_TESTS,
        "```sh\nnestopt train data.dataset=$name\n```",
    ),
    "task": (
        "nestopt_register_tasks",
        TASK,
        f"{_IMPORTS}import torch\nfrom nestopt.testing import check_task\n",
        TASK_TESTS,
        "```sh\nnestopt train data.task=$name\nnestopt evidence $name\n```",
    ),
    "schedule": (
        "nestopt_register_schedules",
        SCHEDULE,
        f"{_IMPORTS}from nestopt.testing import check_schedule\n",
        SCHEDULE_TESTS,
        "```sh\nnestopt train train.decay_shape=$name\n```",
    ),
    "callback": (
        "nestopt_register_callbacks",
        CALLBACK,
        f"{_IMPORTS}from nestopt.testing import check_in_a_run\n",
        CALLBACK_TESTS,
        "```yaml\ntrain:\n  callbacks: [$name]\n```",
    ),
    "logger": (
        "nestopt_register_loggers",
        LOGGER,
        f"{_IMPORTS}from nestopt.testing import check_in_a_run\n",
        LOGGER_TESTS,
        "```yaml\ntrain:\n  loggers: [jsonl, $name]\n```",
    ),
    "command": (
        "nestopt_register_commands",
        COMMAND,
        f"{_IMPORTS}from nestopt.cli import main\n",
        COMMAND_TESTS,
        "```sh\nnestopt $registered run.yaml\n```",
    ),
}
