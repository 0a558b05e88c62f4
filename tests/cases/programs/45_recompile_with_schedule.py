"""pytorch#107076, #120934, #130467, #133898, KellerJordan/Muon#40: a compiled optimizer step must not be compiled
anew at each learning rate. capturable step under torch.compile, tensor lr, OneCycle/cosine schedule; also
compile=True lanes with a float lr.
"""

import sys

import torch
import torch._dynamo as D
from torch import nn
from torch._dynamo.utils import counters

import nestopt

bad = []
for level in ("momentum", "adamw", "muon"):
    D.reset()
    counters.clear()
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(4, 4)) for _ in range(2)]
    qs = [nn.Parameter(p.detach().clone()) for p in ps]
    o = nestopt.optim.Nested(ps, level, lr=torch.tensor(0.1), capturable=True)
    r = nestopt.optim.Nested(qs, level, lr=0.1)
    s, sr = (torch.optim.lr_scheduler.CosineAnnealingLR(x, 10) for x in (o, r))
    n = 0
    f = torch.compile(o.step, backend="eager")
    for i in range(8):
        for p, q in zip(ps, qs):
            p.grad = torch.randn(4, 4)
            q.grad = p.grad.clone()
        f()
        r.step()
        s.step()
        sr.step()
        if i == 2:
            base = counters["stats"]["unique_graphs"]
    extra = counters["stats"]["unique_graphs"] - base
    d = max((p - q).abs().max().item() for p, q in zip(ps, qs))
    print(
        level,
        "graphs after 3 steps:",
        base,
        "more later:",
        extra,
        "| off by",
        d,
        "| lr is",
        type(o.param_groups[0]["lr"]).__name__,
    )
    if extra or d > 1e-2:
        bad.append((level, extra, d))
    # a checkpoint with a float learning rate
    o.load_state_dict({**o.state_dict(), "param_groups": [{**g, "lr": 0.05} for g in o.state_dict()["param_groups"]]})
    print("   after loading a float lr, lr is", type(o.param_groups[0]["lr"]).__name__)
print(bad or "ok")
sys.exit(bool(bad))
