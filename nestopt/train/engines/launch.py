"""Which process this is, as torchrun, DeepSpeed's launcher and SLURM each say it."""

from __future__ import annotations

import os
import re
import socket
import warnings

from nestopt.config import ConfigError

_SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


def processes() -> int:
    """Return how many processes were started together: 1 outside any launcher."""
    return int(os.environ.get("WORLD_SIZE") or _slurm().get("WORLD_SIZE", "1"))


def prepare() -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT where only SLURM's own variables say them.

    Raises:
        ConfigError: under `srun` on several machines without a MASTER_ADDR.
    """
    if "RANK" in os.environ or not (found := _slurm()):
        return
    os.environ.update(found)
    nodes = os.environ.get("SLURM_JOB_NODELIST", "")
    if "MASTER_ADDR" not in os.environ:
        if re.search(r"[\[,]", nodes):
            raise ConfigError.refuse(
                "MASTER_ADDR",
                None,
                f"the job runs on {nodes}: before srun, export "
                "MASTER_ADDR=$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)",
            )
        os.environ["MASTER_ADDR"] = nodes or "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", str(20000 + int(os.environ.get("SLURM_JOB_ID", "9500")) % 20000))


def hush() -> None:
    """Keep advice from people who can't take it: torch's to DeepSpeed and itself, about names of its functions, and
    FSDP2's about operations in place on what modules give, of which there are none here.
    """
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module .* returned a view tensor", UserWarning)


def alone() -> None:
    """Say of this process that it is the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in alone.items():
        os.environ.setdefault(name, value)


def _slurm() -> dict[str, str]:
    """Return what SLURM says of a step of several tasks; nothing in an allocation's own shell."""
    if "SLURM_STEP_ID" not in os.environ or not all(name in os.environ for name in _SLURM.values()):
        return {}
    return {name: os.environ[theirs] for name, theirs in _SLURM.items()}
