"""What the command line shows in a terminal: help with examples, lists as wide as it is, and completion."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from nestopt.config import Config, ConfigError
from nestopt.config.section import Section
from nestopt.core.part import is_subclass, nearest
from nestopt.core.registry import KINDS, OBJECTS, SLOW, Plugin, registry

EXAMPLES = {
    "train": """
  nestopt train                                         a small model on Python's standard library
  nestopt train --data my/texts --baseline transformer  on a text of your own, beside a Transformer
  nestopt train run.yaml train.steps=300 model.mixer=titans
  nestopt train --name wide model.dim=256               into runs/wide
  nestopt train --resume latest train.seconds=600       the newest run""",
    "generate": """
  nestopt generate runs/001 --prompt 'class ' --length 200
  nestopt generate runs/001 --prompt-file book.txt --state read.safetensors --length 0
  nestopt generate runs/001 --from-state read.safetensors --temperature 0""",
    "eval": """
  nestopt eval forgetting runs/001 --documents 4""",
    "forgetting": """
  nestopt eval forgetting runs/001
  nestopt eval forgetting runs/001 --data my/texts --bytes 1024 --documents 4""",
    "runs": """
  nestopt runs                                          those in the folder runs
  nestopt runs runs/001 runs/002 --plot both.png        these two, in what they differ, and a picture""",
    "sweep": """
  nestopt sweep optimizer.lr=0.01,0.02,0.04 train.steps=300
  nestopt sweep run.yaml model.mixer=titans,deltanet train.seed=0,1 --name mixers""",
    "evidence": """
  nestopt evidence list
  nestopt evidence languages --quick
  nestopt evidence recall --models hope deltanet transformer --budget 2h""",
    "tune-reading": """
  nestopt tune-reading runs/001
  nestopt tune-reading runs/001 --out runs/tuned""",
    "describe": """
  nestopt describe adamw                                a level by its name
  nestopt describe stack.yaml [0].period=4              a stack, or a config, in a file
  nestopt describe runs/001 --format svg > levels.svg""",
    "plan": """
  nestopt plan --periods static 16 16,64 --check        what choices cost, here
  nestopt plan run.yaml --gpus 8 --zero 1               what a run takes of 8 GPUs
  nestopt plan run.yaml --gpus 8 --engine fsdp2 --memory 40""",
    "levels": """
  nestopt levels
  nestopt levels '*momentum*'""",
    "plugins": """
  nestopt plugins
  nestopt plugins --errors -p no:lion
  nestopt plugins new sign_momentum
  nestopt plugins check nestopt-lion""",
    "new": """
  nestopt plugins new sign_momentum                     a level, in nestopt-sign-momentum
  nestopt plugins new cauchy --kind objective --out code""",
    "check": """
  nestopt plugins check nestopt-lion
  nestopt plugins check lion""",
    "doctor": """
  nestopt doctor""",
}


def command_names() -> list[str]:
    """Return the names of all commands, nestopt's own first, as its examples are in order."""
    names = registry.names("command")
    return [*(name for name in EXAMPLES if name in names), *(name for name in names if name not in EXAMPLES)]


def switched_off(argv: Sequence[str]) -> list[str]:
    """Return what stands behind each `-p` of a line, before it is read: what it names adds no commands."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-p", action="append", default=[])
    try:
        return list(parser.parse_known_args(argv)[0].p)
    except SystemExit:  # nothing stands behind one: the line says so once it is read
        return []


def add_command(commands: Any, name: str, help: str, examples: str = "") -> argparse.ArgumentParser:
    """Add a command with its examples, and with `-p`, which may stand anywhere on the line."""
    examples = EXAMPLES.get(name) or f"\n{examples}"
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=help,
        description=help,
        epilog=f"examples:{examples}" if examples.strip() else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_plugin_switch(parser)
    return parser


def add_plugin_switch(parser: argparse.ArgumentParser) -> None:
    """Add `-p no:NAME`, under a name of this parser's own: those of a command would else hide those before it."""
    own = f"plugin {parser.prog}"
    parser.add_argument(
        "-p", dest=own, action="append", default=[], metavar="no:NAME", help="switch the plugin NAME off"
    )


def whole(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` on, or to `most`."""

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            allowed = f"{least} or more" if most is None else f"{least} to {most}"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a whole number, {allowed}")
        return value

    return read


def number(least: float, most: float = float("inf"), *, above: bool = False) -> Callable[[str], float]:
    """Return a reader of finite numbers from `least` (or, `above` it) to `most`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not (least < value if above else least <= value) or not value <= most or value == float("inf"):
            start = f"above {least:g}" if above else f"{least:g} or more"
            end = "" if most == float("inf") else f", {most:g} at the most"
            raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a number {start}{end}")
        return value

    return read


def duration(text: str) -> float:
    """Return `90s`, `10m` or `2h` as seconds. Raises argparse.ArgumentTypeError for other text."""
    try:
        found = float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1:]]
    except (ValueError, KeyError):
        found = 0.0
    if not 0 < found < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not allowed; give a time above 0, such as 90s, 10m or 2h")
    return found


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, if the package argcomplete is there."""
    if "_ARGCOMPLETE" not in os.environ or importlib.util.find_spec("argcomplete") is None:
        return
    import argcomplete

    argcomplete.autocomplete(parser, validator=lambda given, start: given.startswith(start))


def completes(argument: argparse.Action, names: Callable[[], Iterable[str]], *, files: bool = True) -> None:
    """Let an argument be completed to one of `names`, or (`files`) to a file."""

    def found(prefix: str, **options: Any) -> list[str]:
        from argcomplete.completers import FilesCompleter

        return [*names(), *(FilesCompleter()(prefix, **options) if files else ())]

    argument.completer = found  # type: ignore[attr-defined]


def config_keys() -> list[str]:
    """Return every key of a configuration, as an override begins with it."""
    sections = ((name, field.annotation) for name, field in Config.model_fields.items())
    return [f"{name}.{key}=" for name, cls in sections if is_subclass(cls, Section) for key in cls.model_fields]


def level_names() -> list[str]:
    """Return the names of all levels."""
    return registry.names("level")


def show_levels(pattern: str) -> int:
    """Print the parts whose name fits a pattern, by kind. Raises ConfigError where none does; returns 0."""
    found = {kind: [name for name in registry.names(kind) if fnmatchcase(name, pattern)] for kind in KINDS}
    if not any(found.values()):
        hint = nearest(pattern, [name for kind in KINDS for name in registry.names(kind)])
        raise ConfigError(f"nothing is called {pattern!r}.{hint}")
    for kind, names in found.items():
        rows = []
        for name in names:
            owner = registry.owner(kind, name)
            thing = registry.get(kind, name)
            keys = (
                ", ".join(f"{key}={thing[key]}" for key in ("dim", "blocks", "heads") if key in thing)
                if kind in OBJECTS
                else ""
            )
            line = [keys] if keys else (thing.__doc__ or "").strip().splitlines() or [""]
            rows.append((name, line[0] + ("" if owner.startswith("nestopt") else f"  [plugin {owner}]")))
        if rows:
            print(f"{kind}:")
            _show(rows)
    return 0


def show_plugins(*, errors: bool = False, as_json: bool = False) -> int:
    """Print all plugins, and what they provide by which hook. Returns 1 if one was skipped, else 0.

    Args:
        errors: also the whole traceback of each.
        as_json: all that is known, for other programs.
    """
    plugins = registry.plugins()
    if as_json:
        print(json.dumps([_plugin_data(plugin) for plugin in plugins], indent=1))
    else:
        _show([(f"{plugin.name} ({plugin.source}):", _says(plugin)) for plugin in plugins], indent="")
    for plugin in plugins if errors and not as_json else ():
        if plugin.traceback:
            print(f"\n{plugin.name}:\n{plugin.traceback}", end="")
    return int(any(plugin.error for plugin in plugins))


def _says(plugin: Plugin) -> str:
    if plugin.blocked:
        return "switched off"
    by_kind = {kind: [name for of, name in plugin.provides if of == kind] for kind, _ in plugin.provides}
    what = ", ".join(
        f"{', '.join(f'{kind} {name}' for name in names)} [{KINDS[kind][1]}]" for kind, names in by_kind.items()
    )
    said = f"SKIPPED: {plugin.error}" if plugin.error else what or "nothing"
    return said + (f"; SLOW: its import takes {plugin.seconds:.1f} s" if plugin.seconds >= SLOW else "")


def _plugin_data(plugin: Plugin) -> dict[str, Any]:
    provides = [{"kind": kind, "name": name, "hook": KINDS[kind][1]} for kind, name in plugin.provides]
    return dataclasses.asdict(plugin) | {"provides": provides}


def _show(rows: Sequence[tuple[str, str]], indent: str = "  ") -> None:
    """Print two columns: in a terminal as wide as it is, between words; else a line a row, for other programs."""
    width = max(len(name) for name, _ in rows) if indent else 0
    if not sys.stdout.isatty() or importlib.util.find_spec("rich") is None:
        for name, text in rows:
            print(f"{indent}{name:<{width}}{indent or ' '}{text}")
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=bool(indent), overflow="fold")
    table.add_column(overflow="fold")  # of a word only that is wider than the column
    for name, text in rows:
        table.add_row(Text(name), Text(text))
    Console().print(Padding(table, (0, 0, 0, len(indent))))
