"""DeepSpeed#8438 (Muon off under zero.Init), #6771/#5489 (frozen parameters and checkpoints), #7746 (bf16 resume
dtype), Megatron-LM#656 (untied): a model with a frozen layer and tied ends, 2 ranks, ZeRO 1 and 3 with zero.Init;
steps equal to one process, saved at 3 and loaded at 1, goes on equal.
"""

import os
import socket
import sys
import tempfile

import torch
import torch.multiprocessing as mp
from torch import nn


class M(nn.Module):
    def __init__(s):
        super().__init__()
        torch.manual_seed(0)
        s.emb = nn.Embedding(11, 8)
        s.a, s.b = nn.Linear(8, 8), nn.Linear(8, 8)
        s.frozen = nn.Linear(8, 8)
        s.frozen.requires_grad_(False)
        s.head = nn.Linear(8, 11, bias=False)
        s.head.weight = s.emb.weight

    def forward(s, t):
        h = s.emb(t)
        return nn.functional.cross_entropy(
            s.head(s.b(torch.tanh(s.frozen(s.a(h)))))[:, :-1].flatten(0, 1), t[:, 1:].flatten()
        )


def data(i):
    return torch.randint(11, (4, 6), generator=torch.Generator().manual_seed(i))


def w(rank, port, folder, out):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
        DS_ACCELERATOR="cpu",
    )
    torch.set_num_threads(1)
    import deepspeed
    import torch.distributed as dist

    import nestopt.train.deepspeed as D

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend="gloo")

    def engine(stage):
        ds = {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": stage}, "gradient_clipping": 0.0}
        if stage == 3:
            with deepspeed.zero.Init(config_dict_or_path=ds):
                m = M()
        else:
            m = M()
        return D.initialize(m, "muon", ds, lr=0.05, rest={"stack": "adamw", "lr": 0.01})[:2]

    def train(e, r):
        ls = []
        for i in r:
            l = e(data(i)[rank * 2 : rank * 2 + 2])
            e.backward(l)
            e.step()
            t = l.detach().clone()
            dist.all_reduce(t)
            ls.append(t.item() / 2)
        return ls

    for stage in (1, 3):
        try:
            e, o = engine(stage)
            ls = train(e, range(3))
            D.save(e, f"{folder}/{stage}")
            more = train(e, range(3, 6))
            f, _ = engine(1)
            D.load(f, f"{folder}/{stage}")
            again = train(f, range(3, 6))
            n = sum(len(g["params"]) for g in o.param_groups)
            if rank == 0:
                out[stage] = (ls, more, again)
        except Exception as x:
            if rank == 0:
                import traceback

                out[stage] = traceback.format_exc()[-900:]
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    s = socket.socket()
    s.bind(("127.0.0.1", 0))
    port = s.getsockname()[1]
    s.close()
    out = mp.Manager().dict()
    mp.spawn(w, (port, tempfile.mkdtemp(), out), 2)
    import nestopt

    m = M()
    o = nestopt.optimizer(m, "muon", lr=0.05, rest={"stack": "adamw", "lr": 0.01})
    ref = []
    for i in range(6):
        o.zero_grad()
        l = m(data(i))
        l.backward()
        o.step()
        ref.append(l.item())
    bad = []
    for stage in (1, 3):
        if isinstance(out[stage], str):
            bad.append((stage, out[stage]))
            continue
        ls, more, again = out[stage]
        for n, a, b in (("steps", ls + more, ref), ("resumed", again, ref[3:])):
            d = max(abs(x - y) for x, y in zip(a, b))
            print("stage", stage, n, "loss off by", d)
            if d > 1e-3:
                bad.append((stage, n, d))
    print(bad or "ok")
    sys.exit(bool(bad))
