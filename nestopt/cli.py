"""The command line."""
# PYTHON_ARGCOMPLETE_OK

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nestopt import arguments, terminal
from nestopt.config import Config, ConfigError, load
from nestopt.config.load import load_saved, names_file
from nestopt.core import Level
from nestopt.core.part import nearest
from nestopt.core.registry import registry

EXIT_FAILED, EXIT_USAGE, EXIT_INTERRUPTED = 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run `nestopt`. Returns the exit status: 0; 1 where training failed; 2 where something given
    can't be used; 130 for an interrupted run.
    """
    from nestopt.train.errors import CheckpointError, CorpusError, MissingExtra, TrainingError

    argv = sys.argv[1:] if argv is None else argv
    for option in terminal.switched_off(argv):
        if not option.startswith("no:"):
            print(f"nestopt: -p {option} is not allowed; give no:NAME to switch a plugin off", file=sys.stderr)
            return EXIT_USAGE
        registry.block(option.removeprefix("no:"))
    parser = arguments.parser()
    terminal.complete(parser)
    args, more = parser.parse_known_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    if more:  # key=value may come after options too, which argparse does not foresee
        if not hasattr(args, "given") or any(item.startswith("-") for item in more):
            parser.error(f"unknown: {' '.join(more)}")
        args.given += more
    try:
        return int(registry.get("command", args.command)().run(args))
    except (ConfigError, CorpusError, CheckpointError, MissingExtra) as error:
        print(f"nestopt: {error}", file=sys.stderr)
        status = EXIT_USAGE
    except TrainingError as error:
        print(f"nestopt: {error}", file=sys.stderr)
        status = EXIT_FAILED
    except OSError as error:  # a full disk, a folder that can't be written
        text = f"{error.filename}: {error.strerror}" if error.filename is not None else error
        print(f"nestopt: {text}", file=sys.stderr)
        status = EXIT_USAGE
    except KeyboardInterrupt:
        status = EXIT_INTERRUPTED
    except Exception:
        if not _one_of_several(args):
            raise
        sys.excepthook(*sys.exc_info())
        status = EXIT_FAILED
    if _one_of_several(args):  # torch's threads, in collectives that have failed, abort in the interpreter's own end
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _one_of_several(args: argparse.Namespace) -> bool:
    return hasattr(args, "watch") and args.watch.joined


def _config(given: Sequence[str], base: Config | None = None) -> Config:
    files = [item for item in given if "=" not in item]
    overrides = [item for item in given if "=" in item]
    if len(files) > 1:
        raise ConfigError(f"give one config file, not {len(files)}: {', '.join(files)}")
    if files:
        loaded = _load(Path(files[0]), overrides)
        if not isinstance(loaded, Config):
            raise ConfigError(f"{files[0]} is a stack; put it under optimizer: stack: to train with it")
        return loaded
    found = _load({} if base is None else base.to_data(), overrides)
    assert isinstance(found, Config)
    return found


def _load(source: Path | dict[str, Any], overrides: Sequence[str]) -> Config | Level:
    """Load it, or say of what is wrong whether it is in the file or on the command line."""
    try:
        return load(source, overrides)
    except ConfigError as error:
        raise error.said_in(lambda _: "on the command line") from None


def _like(path: str) -> Config | None:
    """Return the configuration of a new run with the model of the run at `path`; None where that is a file."""
    from nestopt.train.run import Run, locate

    place = locate(path)
    return Config().model_copy(update={"model": Run.open(place).config().model}) if place.is_dir() else None


def train(args: argparse.Namespace) -> int:
    """Do what `nestopt train` says."""
    from nestopt.train.engines.peers import watching

    with watching() as args.watch:
        return _train_watched(args)


def _train_watched(args: argparse.Namespace) -> int:
    from nestopt.train.loop import train as train_run
    from nestopt.train.run import Run
    from nestopt.train.trust import check_trusted

    given = list(args.given)
    if args.deepspeed is not None:
        from nestopt.train.engines.deepspeed_settings import read

        given += ["train.engine=deepspeed", f"train.deepspeed={json.dumps(read(args.deepspeed))}"]
    given += [f"data.path={json.dumps(args.data)}"] if args.data is not None else []
    if args.resume is not None:
        free = ("train.", "data.") if args.reset_data else ("train.",)
        fixed = [item for item in given if not item.startswith(free)]
        if fixed or args.out is not None or args.name is not None:
            what = ", ".join(fixed) or ("--out" if args.name is None else "--name")
            raise ConfigError(f"a resumed run has its config already; only train.* can be changed, not {what}")
        run = Run.open(args.resume)
        config = _config(given, run.config())
        if not args.trust:
            check_trusted(run.config(), run.path, given=config, training=True)
    else:
        given += [f"train.out={json.dumps(args.out)}"] if args.out is not None else []
        given += [f"train.name={json.dumps(args.name)}"] if args.name is not None else []
        config = _config(given, _like(args.init_from) if args.init_from is not None else None)
    if args.baseline:
        from nestopt.train.compare import like

        if args.resume is None and not any(item.startswith("train.clock=") for item in given):
            config.train.clock = (
                "cpu"  # other programs take seconds of a clock on the wall, from one model and not the next
            )
        for name in args.baseline:
            like(config, name)
    result = train_run(
        config, resume=args.resume, init_from=args.init_from, reset_data=args.reset_data, quiet=args.quiet
    )
    finished = result.finished
    if finished and args.baseline:
        from nestopt.train.compare import compare

        rows = compare(config, result, args.baseline, seeds=args.seeds, quiet=args.quiet)
        finished = len(rows) == args.seeds * (1 + 2 * len(args.baseline))
    return 0 if finished else EXIT_INTERRUPTED


def generate(args: argparse.Namespace) -> int:
    """Do what `nestopt generate` says."""
    import torch

    from nestopt.train.data.codec import codec_of
    from nestopt.train.folder import check_place
    from nestopt.train.generation import Writer
    from nestopt.train.run import Run
    from nestopt.train.sampling import choose
    from nestopt.train.trust import check_trusted

    if args.state is not None:
        check_place("--state", Path(args.state))
    run = Run.open(args.path)
    if not args.trust:
        check_trusted(run.config(), run.path, text=False)
    writer = Writer(run.load_model(precision=args.precision), learn=True if args.learn else "mixer")
    prompt = args.prompt
    if prompt is None:
        prompt = "" if args.prompt_file is not None or args.from_state is not None else "def "
    generator = torch.Generator().manual_seed(args.seed)
    text = codec_of(run.config())

    def next_token(logits: torch.Tensor) -> torch.Tensor:
        chosen = choose(
            logits.float(), temperature=args.temperature, top_k=args.top_k, top_p=args.top_p, generator=generator
        )
        print(text.add(int(chosen)), end="", flush=True)
        return chosen

    try:
        if args.from_state is not None:
            writer.load(args.from_state)
        if args.prompt_file is not None:
            writer.read(text.encode(_document(args.prompt_file)), quiet=not sys.stderr.isatty())
        writer.read(text.encode(prompt.encode()))
        print(prompt, end="", flush=True)
        writer.write(args.length, next_token)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    print(text.end())
    if args.state is not None:
        writer.save(args.state)
    return 0


def _document(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError.refuse("--prompt-file", path, f"it can't be read: {error.strerror}") from None


def forgetting(args: argparse.Namespace) -> int:
    """Do what `nestopt eval` says."""
    from nestopt.evidence.command import answer

    print(answer(args))
    return 0


def evidence(args: argparse.Namespace) -> int:
    """Do what `nestopt evidence` says."""
    from nestopt.evidence.suite import answer_evidence

    print(answer_evidence(args))
    return 0


def tune_reading(args: argparse.Namespace) -> int:
    """Do what `nestopt tune-reading` says."""
    from nestopt.train.reading import tune
    from nestopt.train.run import Run
    from nestopt.train.trust import check_trusted

    run, out = Run.open(args.path), None if args.out is None else Path(args.out)
    if not args.trust:
        check_trusted(run.config(), run.path)
    if out is not None and os.path.lexists(out):
        raise ConfigError.refuse("--out", args.out, "give a folder that is not there yet")
    print(tune(run, out=out, tuning=args.bytes, quiet=args.quiet))
    return 0


def describe(args: argparse.Namespace) -> int:
    """Do what `nestopt describe` says."""
    from nestopt.api import describe
    from nestopt.optim import optimizer
    from nestopt.train.run import Run, build_model, locate

    path = locate(args.path)
    if os.path.isdir(path):
        loaded: Config | Level = load_saved(Run.open(path).config_file, args.given)
    elif os.path.exists(path) or names_file(args.path) or os.sep in args.path:
        loaded = _load(path, args.given)
    elif args.path in terminal.level_names():
        loaded = _load({"level": args.path}, args.given)
    else:
        raise ConfigError(f"no file, run or level is called {args.path!r}.{nearest(args.path, terminal.level_names())}")
    if isinstance(loaded, Config):
        model = build_model(loaded)
        found = describe(model, optimizer(model, loaded))
    else:
        found = describe(loaded)
    print(found.to_mermaid() if args.format == "mermaid" else found.to_svg() if args.format == "svg" else found)
    return 0


_SCALE = ("gpus", "engine", "zero", "memory", "rates", "tflops", "bandwidth", "launch", "share", "tokens", "ranks")


def plan(args: argparse.Namespace) -> int:
    """Do what `nestopt plan` says."""
    from nestopt.train.planning import periods as plan

    config = _config(args.given)
    # 0 is given, too; it is equal to False
    asked = {name: value for name in _SCALE if (value := getattr(args, name)) is not None and value is not False}
    if asked:
        from nestopt.train.planning.command import answer

        print(answer(config, asked | {name: True for name in ("periods", "check") if getattr(args, name)}))
        return 0
    choices = plan.PERIODS if args.periods is None else [plan.choice(text) for text in args.periods]
    print(plan.table(plan.plan(config, choices, check=args.check, quiet=False)))
    return 0


def plugins(args: argparse.Namespace) -> int:
    """Do what `nestopt plugins` says."""
    if args.does == "new":
        from nestopt.plugins.new import write

        print(write(args.name, args.kind, Path(args.out)))
        return 0
    if args.does == "check":
        from nestopt.plugins.check import check

        return check(args.package)
    return terminal.show_plugins(errors=args.errors, as_json=args.json)


def runs(args: argparse.Namespace) -> int:
    """Do what `nestopt runs` says."""
    from nestopt.train import runs

    found = runs.find(args.paths)
    if args.plot is not None:
        runs.plot(found, args.plot)
    print(runs.as_json(found) if args.json else runs.table(found))
    return 0


def export(args: argparse.Namespace) -> int:
    """Do what `nestopt export` says."""
    from nestopt.train.exchange import export as write

    print(write(args.path, Path(args.out)))
    return 0


def import_(args: argparse.Namespace) -> int:
    """Do what `nestopt import` says."""
    from nestopt.train.exchange import import_ as read

    print(read(Path(args.folder), Path(args.out), args.prefix))
    return 0


def sweep(args: argparse.Namespace) -> int:
    """Do what `nestopt sweep` says."""
    from nestopt.train.sweep import Choices, sweep

    given = list(args.given)
    given += [f"data.path={json.dumps(args.data)}"] if args.data is not None else []
    given += [f"train.out={json.dumps(args.out)}"] if args.out is not None else []
    choices = Choices.of(given)
    configs = [_config([*choices.fixed, *chosen]) for chosen in choices]
    return sweep(configs, choices, name=args.name, quiet=args.quiet)


def doctor(args: argparse.Namespace) -> int:
    """Do what `nestopt doctor` says."""
    from nestopt.doctor import report

    text, healthy = report()
    print(text)
    return 0 if healthy else 1


if __name__ == "__main__":
    sys.exit(main())
