"""`nestopt train` in one of several processes, in which something fails: FAULT RANK CALL, and what `nestopt` is given.

What is given as `RANK:key=value` is given to that process only.
"""

import dataclasses
import os
import signal
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from nestopt import cli
from nestopt.core.registry import registry
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.train import training
from nestopt.train.checkpoints import file
from nestopt.train.data.builtin import Files
from nestopt.train.data.windows import Windows
from nestopt.train.engines import alike
from nestopt.train.objective import Objective
from nestopt.train.training import Training

RANK = os.environ.get("RANK", "0")
WHERE = {
    "step": (Objective, "forward"),
    "optimizer": (Sharded, "step"),
    "data": (Windows, "batch"),
    "save": (file, "save"),
    "evaluate": (training, "measured"),
    "build": (training, "build_model"),
    "sample": (Training, "_sample"),
}


def fault(kind, result):
    """What comes of a call that fails."""
    if kind == "raise":
        raise ValueError("broken on purpose")
    if kind in ("SIGKILL", "SIGTERM"):
        os.kill(os.getpid(), getattr(signal, kind))
    if kind == "exit":
        os._exit(0)
    if kind == "nan":
        return result * float("nan")
    if kind == "backward":  # while gradients of later layers are on their way
        result[0].embedding.weight.register_hook(lambda _: fault("raise", None))
        return result[1]
    if kind == "gradient":  # the loss is finite, and only one gradient is not
        return result[1] + 0.0 * (result[0].norm.weight.sum() * 0.0).sqrt()
    return result


def arm(kind, where, calls):
    owner, name = WHERE[where]
    whole, count = getattr(owner, name), 0

    def failing(*args, **kwargs):
        nonlocal count
        count += 1
        found = whole(*args, **kwargs)
        if count not in calls:
            return found
        print(f"\nFAULT AT {time.time()}", file=sys.stderr, flush=True)
        return fault(kind, (args[0].lm, found) if kind in ("gradient", "backward") else found)

    setattr(owner, name, failing)


def differ(what):
    """Let this process have another version of something, a plugin more, or another text."""
    if what == "torch":
        torch.__version__ = "2.9.0"
    elif what == "nestopt":
        alike.VERSION = "0.0.1"
    elif what == "plugin":
        registry.add(types.SimpleNamespace(), "failing")
    elif what == "text":
        whole = Files.load
        Files.load = lambda self: dataclasses.replace(text := whole(self), train=text.train[::-1].copy())


def main():
    kind, _, where = sys.argv[1].partition(":")
    if sys.argv[2] == RANK and where:
        arm(kind, where, {int(call) for call in sys.argv[3].split(",")})
    elif sys.argv[2] == RANK and kind.startswith("differ-"):
        differ(kind.removeprefix("differ-"))
    given = []
    for item in sys.argv[4:]:
        rank, colon, own = item.partition(":")
        if colon and rank.isdigit():
            given += [own] if rank == RANK else []
        else:
            given.append(item)
    return cli.main(given)


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
