"""The commands that nestopt brings, registered by the hook that plugins use."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from nestopt import arguments, cli, terminal
from nestopt.command import Command
from nestopt.core.hookspecs import Register, hookimpl


def _command(
    help: str,
    run: Callable[[argparse.Namespace], int],
    takes: Callable[[argparse.ArgumentParser], None] = lambda parser: None,
) -> type[Command]:
    """Return a class of two functions."""
    methods = {"run": lambda self, args: run(args), "arguments": lambda self, parser: takes(parser)}
    return type("Own", (Command,), {"__doc__": help, "help": help, **methods})


@hookimpl
def nestopt_register_commands(register: Register) -> None:
    """Register the commands, in the order of the help."""
    register(
        "train",
        _command(
            "train a language model (alone: on Python's standard library, about 4 minutes)",
            cli.train,
            arguments.add_train,
        ),
    )
    register("generate", _command("let a trained model write", cli.generate, arguments.add_generate))
    register("eval", _command("measure what a trained model does", cli.forgetting, arguments.add_eval))
    register(
        "evidence",
        _command("try a claim: models trained alike on tasks, and a verdict", cli.evidence, arguments.add_evidence),
    )
    register("runs", _command("list runs, and compare them", cli.runs, arguments.add_runs))
    register(
        "sweep", _command("train one run for each choice of values, and compare them", cli.sweep, arguments.add_sweep)
    )
    register(
        "export",
        _command("write a run as a folder of torch.distributed.checkpoint", cli.export, arguments.add_export),
    )
    register(
        "import",
        _command(
            "make a run, or weights, of a folder of torch.distributed.checkpoint", cli.import_, arguments.add_import
        ),
    )
    register(
        "tune-reading",
        _command(
            "choose how fast a trained model learns as it reads: rate, period, keep; no training",
            cli.tune_reading,
            arguments.add_tune_reading,
        ),
    )
    register(
        "describe",
        _command("the levels of a config, a run or a level's name, in order", cli.describe, arguments.add_describe),
    )
    register(
        "plan",
        _command(
            "what a training step costs, per number of levels and period of the mlp", cli.plan, arguments.add_plan
        ),
    )
    register(
        "levels",
        _command(
            "the levels and parts that can be used by name",
            lambda args: terminal.show_levels(args.pattern),
            arguments.add_levels,
        ),
    )
    register(
        "plugins",
        _command(
            "the plugins that were found, and what is wrong with those skipped; new ones, and checks",
            cli.plugins,
            arguments.add_plugins,
        ),
    )
    register("doctor", _command("versions, devices, and what is missing", cli.doctor))
