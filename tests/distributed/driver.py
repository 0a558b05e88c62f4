"""Started by `torchrun`: runs jobs one after another in the same processes, which saves their start.

Reads a list of [function of `cases.py`, arguments by name] from the JSON file given; writes beside it what each gave in
the first process, or by what it was refused.
"""

import json
import os
import sys
import time
from pathlib import Path

import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[2]))

from nestopt.train.errors import CheckpointError
from tests.distributed import cases


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    ends = []
    for name, arguments in json.loads(path.read_text()):
        if os.environ["RANK"] == "0":  # for whoever looks for what did not return
            print(f"{name} {arguments}", file=sys.stderr, flush=True)
        begun = time.perf_counter()
        try:
            ends.append({"gave": getattr(cases, name)(**arguments)})
        except (ValueError, TypeError, RuntimeError, CheckpointError) as error:
            if not arguments.get("refuse"):
                raise
            ends.append({"refused": f"{type(error).__name__}: {error}"})
        ends[-1]["seconds"] = time.perf_counter() - begun
    dist.barrier()
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        path.with_suffix(".done").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
