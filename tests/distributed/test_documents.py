"""Documents where weights are in pieces: each process has documents of its own, and all gather weights together."""

from __future__ import annotations

import os
import socket
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from nestopt.levels import cms
from nestopt.train.engines.fsdp_methods import users
from tests.models.test_documents import CONTEXT, gradients, make, starts_of, tokens_of
from tests.nn.tools import same

pytestmark = pytest.mark.distributed

CONTINUUM = cms(teach="loss", **{**CONTEXT, "periods": (16, 48)})
MODELS: dict[str, dict[str, Any]] = {"two mixers": {}, "hope, segments": {"mlp": CONTINUUM, "segment": 32}}
ROWS = [[0, 5, 90, 91], [], [], [1, 2, 3, 150]]  # two of each process


def compare(rank: int, port: int) -> None:
    """In a process of its own: gradients under FSDP2 are those of one process."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    tokens, starts, own = tokens_of(4, 201), starts_of(ROWS, 201), slice(2 * rank, 2 * rank + 2)
    for name, options in MODELS.items():
        whole, cut = make(name, **options), make(name, **options)
        true = gradients(whole.loss(tokens, starts=starts, reduction="sum")[0], whole)
        cut.lockstep = True
        for part, methods in users(cut):
            fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
            for method in methods:
                register_fsdp_forward_method(part, method)
        cut.loss(tokens[own], starts=starts[own], reduction="sum")[0].backward()
        for key, param in cut.named_parameters():
            mine = torch.zeros_like(true[key]) if param.grad is None else 2 * param.grad.full_tensor()  # type: ignore[attr-defined]
            same(mine, true[key], 1e-9)
    dist.barrier()
    dist.destroy_process_group()


def test_in_lockstep_gradients_are_those_of_one_process() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(compare, (port,), nprocs=2)
