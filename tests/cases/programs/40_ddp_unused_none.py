"""KellerJordan/Muon#37, #36, #38: under DDP a parameter without a gradient on one rank hangs or is skipped on that
rank only. 2 gloo ranks: weights equal on both and equal to one process.
"""

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import nestopt


class M(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.a, s.b, s.never, s.c = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(s, x, use_b):
        h = torch.tanh(s.a(x))
        h = h + s.b(h) if use_b else h
        return s.c(h)


LEVELS = ("adamw", "muon", "m3", "dgd", "shampoo")


def w(rank, path, out):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2)
    for level in LEVELS:
        m = M()
        d = nn.parallel.DistributedDataParallel(m, find_unused_parameters=True)
        o = nestopt.optimizer(m, level, lr=0.02)
        for s in range(3):
            x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(s))[rank]
            o.zero_grad()
            d(x, use_b=rank == 0).square().mean().backward()
            o.step()
        v = torch.cat([p.detach().flatten() for p in m.parameters()])
        both = [torch.empty_like(v) for _ in range(2)]
        dist.all_gather(both, v)
        if rank == 0:
            n = m.never.weight
            out[level] = (
                float((both[0] - both[1]).abs().max()),
                bool(torch.equal(n, M().never.weight)),
                both[0].tolist(),
            )
    dist.barrier()
    dist.destroy_process_group()


def one(level):
    m = M()
    o = nestopt.optimizer(m, level, lr=0.02)
    for s in range(3):
        x = torch.randn(2, 8, 6, generator=torch.Generator().manual_seed(s))
        o.zero_grad()
        for r in (0, 1):
            (m(x[r], use_b=r == 0).square().mean() / 2).backward()
        o.step()
    return torch.cat([p.detach().flatten() for p in m.parameters()])


if __name__ == "__main__":
    out = mp.Manager().dict()
    mp.spawn(w, (tempfile.mktemp(), out), 2)
    bad = []
    for level in LEVELS:
        d, never, v = out[level]
        e = (torch.tensor(v) - one(level)).abs().max().item()
        if d > 1e-6:
            bad.append((level, "ranks differ by", d))
        if not never:
            bad.append((level, "an unused parameter moved"))
        if e > 1e-3:
            bad.append((level, "differs from one process by", e))
    print(bad or "ok")
    sys.exit(bool(bad))
