"""vllm speculators#821, Megatron-LM#4486, verl-SpeCo#91: fully_shard and Muon by hand - a [1, N] weight, uneven rows,
more ranks than rows, a parameter no batch reaches. nestopt.optimizer on the DTensors must be one process's steps, or
refuse in words.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import nestopt


class M(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.a, s.b, s.thin, s.never, s.c = (
            nn.Linear(6, 5),
            nn.Linear(5, 6),
            nn.Linear(6, 1),
            nn.Linear(6, 6),
            nn.Linear(6, 2),
        )

    def forward(s, x):
        h = s.b(torch.tanh(s.a(x)))
        return s.c(h * torch.sigmoid(s.thin(h)))


LEVELS = ("gd", "momentum", "adamw", "second_moment", "muon", "m3", "shampoo", "delta_momentum", "deep_momentum", "dgd")


def train(m, o):
    for s in range(3):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(s))
        o.zero_grad()
        m(x).square().mean().backward()
        o.step()


def w(rank, path, out):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    for level in LEVELS:
        m = M()
        fully_shard(m, mesh=mesh)
        try:
            torch.manual_seed(1)
            o = nestopt.optimizer(m, level, lr=0.02, rest="gd")
            train(m, o)
            v = torch.cat([p.detach().full_tensor().flatten() for p in m.parameters()]).tolist()
            said = "ran"
        except Exception as e:
            v, said = None, type(e).__name__ + ": " + str(e).strip().replace("\n", " ")[:170]
        if rank == 0:
            out[level] = (said, v)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    out = mp.Manager().dict()
    mp.spawn(w, (tempfile.mktemp(), out), 2)
    bad = []
    for level in LEVELS:
        said, v = out[level]
        if v is None:
            clear = "nestopt" in said or "fully_shard" in said
            print(level, "->", said)
            bad += [] if clear else [(level, "unclear error")]
        else:
            m = M()
            torch.manual_seed(1)
            o = nestopt.optimizer(m, level, lr=0.02, rest="gd")
            train(m, o)
            e = (torch.tensor(v) - torch.cat([p.detach().flatten() for p in m.parameters()])).abs().max().item()
            print(level, "-> ran, off by", e)
            if e > 2e-4:
                bad.append((level, "silently another step: off by", e))
    print(bad or "ok")
    sys.exit(bool(bad))
