"""What the command line takes, command by command."""

from __future__ import annotations

import argparse

from nestopt import terminal
from nestopt._version import VERSION
from nestopt.core.precision import PRECISIONS
from nestopt.core.registry import registry
from nestopt.plugins import templates


def parser() -> argparse.ArgumentParser:
    """Return what reads the command line; of what it gives, `command` is the command's name, or None."""
    parser = argparse.ArgumentParser(
        prog="nestopt", description="Nested learning: levels that are optimizers and layers."
    )
    parser.add_argument("--version", action="version", version=f"nestopt {VERSION}")
    terminal.add_plugin_switch(parser)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher puts it there
    commands = parser.add_subparsers(metavar="COMMAND", dest="command")

    for name in terminal.command_names():
        command = registry.get("command", name)()
        command.arguments(terminal.add_command(commands, name, command.help, command.examples))
    return parser


def add_train(train: argparse.ArgumentParser) -> None:
    """Add what `train` takes."""
    given = train.add_argument(
        "given", nargs="*", metavar="CONFIG.yaml | key=value", help="a config file, and values that go before it"
    )
    terminal.completes(given, terminal.config_keys)
    train.add_argument("--data", metavar="PATH", help="train on this file or folder of text")
    train.add_argument("--out", metavar="FOLDER", help="where runs are kept (default: runs)")
    train.add_argument("--resume", metavar="RUN", help="go on with an interrupted run; `latest` is the newest")
    train.add_argument(
        "--reset-data",
        action="store_true",
        help="with --resume: begin the data anew, with other --data or data.*",
    )
    train.add_argument(
        "--init-from", metavar="RUN | FILE", help="begin a new run with these weights, of a run or a safetensors file"
    )
    _add_trust(train)
    train.add_argument("--name", metavar="NAME", help="of the run's folder (default: the next number)")
    train.add_argument(
        "--baseline",
        type=lambda names: names.split(","),
        metavar="NAME,...",
        help="then train models of as many parameters on the same text, for as many tokens and for as many seconds, "
        "and measure all still and learning as they read: transformer, deltanet, titans, any level on tokens",
    )
    train.add_argument(
        "--seeds",
        type=terminal.whole(1),
        default=1,
        metavar="N",
        help="with --baseline: train all so often (default: 1)",
    )
    train.add_argument(
        "--deepspeed", metavar="FILE.json", help="train with DeepSpeed, under these settings of its own (any stage)"
    )
    train.add_argument("-q", "--quiet", action="store_true", help="no progress, no report")


def add_generate(generate: argparse.ArgumentParser) -> None:
    """Add what `generate` takes."""
    generate.add_argument("path", metavar="RUN")
    generate.add_argument(
        "--prompt", help="text to go on from (default: 'def '; none, after --prompt-file or --from-state)"
    )
    generate.add_argument("--prompt-file", metavar="FILE", help="read this document, of any length, before the prompt")
    generate.add_argument("--length", type=terminal.whole(0), default=400, help="tokens to add (default: 400)")
    generate.add_argument(
        "--temperature", type=terminal.number(0), default=0.8, help="0: the likeliest byte (default: 0.8)"
    )
    generate.add_argument("--top-k", type=terminal.whole(1), help="choose among the k likeliest")
    generate.add_argument(
        "--top-p", type=terminal.number(0, 1, above=True), help="choose among the fewest with this probability together"
    )
    generate.add_argument("--seed", type=terminal.whole(0, 2**64 - 1), default=0)
    generate.add_argument(
        "--learn",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether an mlp that learns in context does; mixers remember what was read in any case (default: it does)",
    )
    _add_precision(generate)
    _add_trust(generate)
    generate.add_argument("--state", metavar="FILE", help="save at the end what the model then remembers")
    generate.add_argument("--from-state", metavar="FILE", help="go on from what --state saved")


def add_tune_reading(tune: argparse.ArgumentParser) -> None:
    """Add what `tune-reading` takes."""
    tune.add_argument("path", metavar="RUN")
    tune.add_argument("--bytes", type=terminal.whole(2), default=32768, help="held out, to choose by (default: 32768)")
    tune.add_argument("--out", metavar="FOLDER", help="write the model with these settings, as a run of its own")
    _add_trust(tune)
    tune.add_argument("-q", "--quiet", action="store_true", help="no progress")


def add_describe(describe: argparse.ArgumentParser) -> None:
    """Add what `describe` takes."""
    terminal.completes(describe.add_argument("path", metavar="CONFIG.yaml | RUN | LEVEL"), terminal.level_names)
    terminal.completes(
        describe.add_argument("given", nargs="*", metavar="key=value"), terminal.config_keys, files=False
    )
    describe.add_argument("--format", choices=["text", "mermaid", "svg"], default="text")


def add_levels(levels: argparse.ArgumentParser) -> None:
    """Add what `levels` takes."""
    pattern = levels.add_argument(
        "pattern", nargs="?", default="*", metavar="PATTERN", help='such as "*momentum*" (default: all)'
    )
    terminal.completes(pattern, terminal.level_names, files=False)


def add_plugins(plugins: argparse.ArgumentParser) -> None:
    """Add what `plugins` takes: nothing, or one of two commands."""
    plugins.add_argument("--errors", action="store_true", help="also the whole traceback of each error")
    plugins.add_argument("--json", action="store_true", help="for other programs: all that is known of each")
    does = plugins.add_subparsers(metavar="DOES", dest="does", title="instead of listing them")
    new = terminal.add_command(does, "new", "write a package with a plugin, and tests that pass")
    new.add_argument("name", metavar="NAME", help="such as sign_momentum; the package is nestopt-sign-momentum")
    new.add_argument(
        "--kind", choices=templates.KINDS, default="level", metavar="KIND", help=f"{', '.join(templates.KINDS)}"
    )
    new.add_argument("--out", metavar="FOLDER", default=".", help="where the package's folder is made (default: here)")
    check = terminal.add_command(does, "check", "try all that an installed package provides")
    check.add_argument("package", metavar="PACKAGE", help="its name, or the plugin's")


def add_runs(runs: argparse.ArgumentParser) -> None:
    """Add what `runs` takes."""
    runs.add_argument(
        "paths", nargs="*", metavar="RUN | FOLDER", help="runs, and folders of runs (default: the folder runs)"
    )
    runs.add_argument("--plot", metavar="FILE", help="draw the held-out and training loss of all in one picture")
    runs.add_argument("--json", action="store_true", help="for other programs: all that is known of each")


def add_export(export: argparse.ArgumentParser) -> None:
    """Add what `export` takes."""
    export.add_argument("path", metavar="RUN", help="a run's folder, an older checkpoint-N.json of it, or weights")
    export.add_argument("out", metavar="OUT", help="a new folder")


def add_import(import_: argparse.ArgumentParser) -> None:
    """Add what `import` takes."""
    import_.add_argument("folder", metavar="FOLDER", help="of torch.distributed.checkpoint; its pickle is not run")
    import_.add_argument(
        "out", metavar="OUT", help="a new folder, for a run that was exported; OUT.safetensors, for weights alone"
    )
    import_.add_argument(
        "--prefix",
        default="model.",
        help="what names of weights begin with, and is taken off (default: model.; all are taken where none does)",
    )


def add_sweep(sweep: argparse.ArgumentParser) -> None:
    """Add what `sweep` takes."""
    given = sweep.add_argument(
        "given",
        nargs="*",
        metavar="CONFIG.yaml | key=a,b,c",
        help="a config file, and values; each key with commas is tried at each of its values, with those of all others",
    )
    terminal.completes(given, terminal.config_keys)
    sweep.add_argument("--data", metavar="PATH", help="train on this file or folder of text")
    sweep.add_argument("--out", metavar="FOLDER", help="where runs are kept (default: runs)")
    sweep.add_argument("--name", metavar="NAME", help="of the folder in it (default: sweep-1, or the next number)")
    sweep.add_argument("-q", "--quiet", action="store_true", help="no progress; only the table at the end")


def _add_trust(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--trust",
        action="store_true",
        help="do what the run's config asks for outside of its folder: DeepSpeed's own files, downloads, plugins' data",
    )


def _add_precision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of the products of memories (default: as the run was trained)"
    )


def add_eval(measure: argparse.ArgumentParser) -> None:
    """Add what `eval` takes."""
    reports = measure.add_subparsers(required=True, metavar="REPORT")
    forgetting = terminal.add_command(
        reports, "forgetting", "what learning while reading gives, and how much is left after more text"
    )
    forgetting.add_argument("path", metavar="RUN")
    forgetting.add_argument("--data", metavar="PATH", help="read this file or folder, not the run's held-out text")
    forgetting.add_argument(
        "--bytes", type=terminal.whole(1), metavar="N", help="of a document (default: 512, or what there is)"
    )
    forgetting.add_argument("--documents", type=terminal.whole(1), default=8, help="side by side (default: 8)")
    forgetting.add_argument("--out", metavar="FOLDER", help="for forgetting.png and forgetting.json (default: RUN)")
    _add_precision(forgetting)
    _add_trust(forgetting)
    forgetting.add_argument("-q", "--quiet", action="store_true", help="no progress")


def add_evidence(evidence: argparse.ArgumentParser) -> None:
    """Add what `evidence` takes."""
    evidence.add_argument("task", metavar="list | CLAIM | TASK", help="list says what there is")
    evidence.add_argument(
        "--models", nargs="+", metavar="NAME", help="the first is judged (default: the claim's): any level on tokens"
    )
    evidence.add_argument(
        "--tasks", nargs="+", metavar="NAME", help="some of the claim's (default: all, without which it can't be a yes)"
    )
    evidence.add_argument(
        "--seeds", type=terminal.whole(1), metavar="N", help="(default: 3, and 5 where these do not decide it)"
    )
    evidence.add_argument(
        "--budget",
        type=terminal.duration,
        metavar="TIME",
        help="of CPU for all training, such as 10m (default: the claim's)",
    )
    evidence.add_argument(
        "--quick", action="store_true", help="few steps of few tasks, to see that it works: no verdict"
    )
    evidence.add_argument("--out", metavar="DIR", help="for evidence.json and evidence.png (default: evidence/TASK)")
    evidence.add_argument("-q", "--quiet", action="store_true", help="do not say what is being trained")


def add_plan(plan: argparse.ArgumentParser) -> None:
    """Add what `plan` takes."""
    given = plan.add_argument("given", nargs="*", metavar="CONFIG.yaml | key=value", help="a config file, and values")
    terminal.completes(given, terminal.config_keys)
    plan.add_argument(
        "--periods", nargs="+", metavar="C,C", help="choices to compare, such as 16 16,64; static is one static mlp"
    )
    plan.add_argument("--check", action="store_true", help="also run each, and print how far off the expectation was")
    plan.add_argument("--gpus", type=int, metavar="N", help="instead: memory, time and traffic of the run on N GPUs")
    plan.add_argument("--engine", metavar="NAME", help="single, ddp, fsdp2 or deepspeed (default: the config's)")
    plan.add_argument("--zero", type=int, metavar="STAGE", help="of DeepSpeed, 0 to 3 (default: the config's)")
    plan.add_argument("--memory", type=float, metavar="GB", help="of a GPU (default: 80, or what one here has)")
    plan.add_argument(
        "--rates",
        metavar="FILE.json",
        help="how fast a GPU is, from benchmarks/gpu.py; or measured, here; or stated (default: measured if it can be)",
    )
    plan.add_argument(
        "--tflops", metavar="DTYPE=N,...", help="stated: peaks (default: bfloat16=989.4,tf32=494.7,float32=67, H100)"
    )
    plan.add_argument("--bandwidth", type=float, metavar="GB/s", help="stated: peak (default: 3350)")
    plan.add_argument("--share", type=float, help="stated: what is reached of the peaks (default: 0.75)")
    plan.add_argument("--launch", type=float, metavar="US", help="stated: microseconds an operation (default: 5)")
    plan.add_argument("--tokens", type=int, help="of the whole run (default: steps x batch x window)")
    plan.add_argument("--ranks", action="store_true", help="each process's tensors, states and traffic instead")
