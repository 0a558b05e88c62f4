"""`nestopt sweep`: one run for each choice of values, and a table of all at the end."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from nestopt.config import Config, ConfigError
from nestopt.train import runs
from nestopt.train.errors import CorpusError, TrainingError
from nestopt.train.loop import train

EXIT_FAILED, EXIT_INTERRUPTED = 1, 130

_OPENS, _CLOSES = "[{(", "]})"


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a sweep chooses from; iterated, it gives each choice as overrides, the last key's values fastest.

    Attributes:
        fixed: a config file, and overrides that all runs have.
        values: by key, those that are tried.
    """

    fixed: list[str]
    values: dict[str, list[str]]

    @classmethod
    def of(cls, given: Sequence[str]) -> Choices:
        """Read what was given: `key=a,b,c` is three values, commas within brackets and quotes are part of one.

        Raises:
            ConfigError: there is nothing to choose, a value is empty, or a key is given twice.
        """
        fixed, values = [], dict[str, list[str]]()
        for item in given:
            key, equals, text = item.partition("=")
            parts = split(text) if equals else []
            if len(parts) < 2:
                fixed.append(item)
                continue
            if "" in parts:
                raise ConfigError.refuse(key, text, "a value between commas is empty")
            if key in values or key in ("train.out", "train.name"):
                raise ConfigError.refuse(key, text, "give each key once, and neither train.out nor train.name")
            values[key] = parts
        if not values:
            raise ConfigError("nothing to choose from; give a key with values between commas, such as train.seed=0,1,2")
        return cls(fixed, values)

    def __iter__(self) -> Iterator[list[str]]:
        for chosen in itertools.product(*self.values.values()):
            yield [f"{key}={value}" for key, value in zip(self.values, chosen, strict=True)]


def split(text: str) -> list[str]:
    """Return the parts of a text between commas, but for those in brackets or quotes."""
    parts, depth, quote = [""], 0, ""
    for sign in text:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        else:
            depth += (sign in _OPENS) - (sign in _CLOSES)
        if sign == "," and not quote and depth <= 0:
            parts.append("")
        else:
            parts[-1] += sign
    return [part.strip() for part in parts]


def sweep(configs: Sequence[Config], choices: Choices, *, name: str | None = None, quiet: bool = False) -> int:
    """Train all configurations, one after another, in a folder of their own, and print a table of them.

    A run that fails is said, and the others go on. `compare.png` in the folder shows all.

    Args:
        configs: one for each choice, in order; all are valid before the first begins.
        choices: that they came from.
        name: of the folder in `train.out`; None is `sweep-1`, or the next number.
        quiet: no progress and no reports of single runs.

    Returns:
        0, for an exit status; 1 where a run failed, 130 where one was interrupted, which ends the sweep.

    Raises:
        ConfigError: the folder is there already, or there are several processes.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("a sweep trains in one process; start it without torchrun, or train the runs one by one")
    folder = _folder(Path(configs[0].train.out), name)
    failed, interrupted = [], False
    for number, (config, chosen) in enumerate(zip(configs, choices, strict=True), start=1):
        print(f"{number} of {len(configs)}: {' '.join(chosen)}", flush=True)
        config.train.out, config.train.name = str(folder), None
        try:
            interrupted = not train(config, quiet=quiet).finished
        except (TrainingError, ConfigError, CorpusError) as error:
            failed.append(f"{' '.join(chosen)}: FAILED: {error}")
        if interrupted:
            break
    if any(folder.glob("*/config.yaml")):
        found = runs.find([str(folder)])
        print(runs.table(found))
        if any(each.records for each in found):
            runs.plot(found, folder / "compare.png")
            print(f"in {folder}: the runs, compare.png")
    for line in failed:
        print(line)
    return EXIT_INTERRUPTED if interrupted else EXIT_FAILED if failed else 0


def _folder(out: Path, name: str | None) -> Path:
    """Make a new folder in `out`."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        if name is not None:
            Config().train.name = name  # is it one?
            (out / name).mkdir()
            return out / name
    except FileExistsError:
        place = out if name is None or not out.is_dir() else out / name
        raise ConfigError.refuse("--name", name, f"{place} is there already; give another name") from None
    numbers = [int(match[1]) for child in out.iterdir() if (match := re.fullmatch(r"sweep-(\d+)", child.name))]
    folder = out / f"sweep-{max(numbers, default=0) + 1}"
    folder.mkdir()
    return folder
