"""What `nestopt eval` answers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from nestopt.config import ConfigError
from nestopt.config.files import write
from nestopt.evidence.forgetting import documents_in, forgetting
from nestopt.train.data.sources import dataset_of
from nestopt.train.folder import make_place
from nestopt.train.run import Run
from nestopt.train.trust import check_trusted


def answer(args: argparse.Namespace) -> str:
    """Measure forgetting as the command line asks, draw it, and return the table and where it is.

    Raises:
        ConfigError, CorpusError, CheckpointError: something given can't be used; says what and why.
    """
    run = Run.open(args.path)
    config = run.config()
    if args.data:
        config.data.path = args.data
    elif not args.trust:
        check_trusted(config, run.path)
    folder = Path(args.out) if args.out else run.path
    make_place("--out", folder, "forgetting.json", "forgetting.png")
    corpus = dataset_of(config).load()
    text = torch.from_numpy(corpus.held_out).long()
    size = args.bytes or min(512, max(2, len(text) // (args.documents + 101)))
    try:
        model = run.load_model(precision=args.precision)
        documents, new = documents_in(text, size, args.documents)
        report = forgetting(model, documents, new, piece=config.data.window, progress=not args.quiet)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    write(json.dumps(report.to_dict(), indent=1) + "\n", folder / "forgetting.json")
    report.plot(folder / "forgetting.png")
    return f"{report.table()}\nin {folder}: forgetting.png, forgetting.json"
