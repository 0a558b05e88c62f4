"""Started by `torchrun`: runs several trainings one after another in the same processes, which saves their start.

Reads a list of [config data, folder to resume or None] from the JSON file given; writes how each ended, and what it
measured, beside it.
"""

import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from nestopt.config import Config
from nestopt.train.checkpoint import CheckpointError
from nestopt.train.loop import train
from nestopt.train.metrics import read


def main(path: Path) -> None:
    dist.init_process_group("gloo")
    ends = []
    for data, resume in json.loads(path.read_text()):
        try:
            config = Config.from_data(data) if data is not None else None
            run = train(config, resume=resume, quiet=True).run
            ends.append({"folder": str(run.path), "records": read(run.metrics_file)})
        except (ValueError, CheckpointError) as error:
            ends.append({"refused": str(error)})
    dist.barrier()
    dist.destroy_process_group()
    if os.environ["RANK"] == "0":
        path.with_suffix(".done").write_text(json.dumps(ends))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
