"""pytorch/pytorch#196083: state_dict()/load_state_dict() in one process leave both optimizers with the same tensors."""

import sys

import torch
from torch import nn

import nestopt

bad = []
for level in ("momentum", "adam", "muon", "m3", "shampoo", "deep_momentum"):
    for period in (1, 2):
        p, q = (nn.Parameter(torch.ones(4, 4)) for _ in range(2))
        a = nestopt.optim.Nested([{"params": [p], "period": period}], level, lr=0.1)
        b = nestopt.optim.Nested([{"params": [q], "period": period}], level, lr=0.1)
        for _ in range(3):
            p.grad = torch.randn(4, 4)
            a.step()
        sd = a.state_dict()
        kept = {k: v.clone() for k, v in sd["state"][0].items()}
        b.load_state_dict(sd)
        for _ in range(3):
            q.grad = torch.randn(4, 4)
            b.step()
        for k, v in kept.items():
            if not torch.equal(a.state[p][k], v):
                bad.append((level, period, k, "b's steps changed a's state"))
        snap = a.state_dict()
        before = {k: v.clone() for k, v in snap["state"][0].items()}
        p.grad = torch.randn(4, 4)
        a.step()
        moved = [k for k, v in before.items() if not torch.equal(snap["state"][0][k], v)]
        if moved and period == 1:
            print("note: state_dict() is live (as in torch):", level, moved)
        # tensor lr
        c = nestopt.optim.Nested([nn.Parameter(torch.ones(4, 4))], level, lr=torch.tensor(0.1))
        d = nestopt.optim.Nested([nn.Parameter(torch.ones(4, 4))], level, lr=torch.tensor(0.2))
        d.load_state_dict(c.state_dict())
        if d.param_groups[0]["lr"] is c.param_groups[0]["lr"]:
            bad.append((level, "lr tensor shared"))
print(bad or "ok")
sys.exit(bool(bad))
