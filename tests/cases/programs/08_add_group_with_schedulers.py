"""pytorch#53712, #20997, #104361, #79888; finetuning-scheduler#30: groups added in mid-training, with schedulers,
then resumed.
"""

import sys

import torch
from torch import nn
from torch.optim import lr_scheduler as S

import nestopt

bad = []
for level in ("momentum", "adam", "adamw", "muon", "m3", "shampoo", "second_moment", "matrix_adagrad"):
    a, b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    try:
        o = nestopt.optim.Nested(a.parameters(), level, lr=0.1)
        sch = S.ReduceLROnPlateau(o, patience=0)
        for _ in range(3):
            a.weight.grad = torch.randn(4, 4)
            o.step()
        o.add_param_group({"params": list(b.parameters()), "lr": 0.05})
        fresh = nestopt.optim.Nested([nn.Parameter(b.weight.detach().clone())], level, lr=0.05)
        f = fresh.param_groups[0]["params"][0]
        for i in range(3):
            g = torch.randn(4, 4)
            a.weight.grad = g
            b.weight.grad = g.clone()
            f.grad = g.clone()
            o.step()
            fresh.step()
        if not torch.allclose(b.weight, f, atol=1e-6):
            bad.append((level, "added group differs from a fresh optimizer"))
        try:
            sch.step(1.0)
            sch.step(2.0)
        except IndexError as e:
            bad.append((level, "plateau " + repr(e)))
        c, d = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        c.load_state_dict(a.state_dict())
        d.load_state_dict(b.state_dict())
        o2 = nestopt.optim.Nested(c.parameters(), level, lr=0.1)
        try:
            o2.load_state_dict(o.state_dict())
            bad.append((level, "loaded 2 groups into 1"))
        except ValueError:
            pass
        o2.add_param_group({"params": list(d.parameters()), "lr": 0.05})
        o2.load_state_dict(o.state_dict())
        for _ in range(2):
            g = torch.randn(4, 4)
            for w in (a, b, c, d):
                w.weight.grad = g.clone()
            o.step()
            o2.step()
        if not (torch.equal(a.weight, c.weight) and torch.equal(b.weight, d.weight)):
            bad.append((level, "resume differs"))
    except Exception as e:
        bad.append((level, repr(e)[:200]))
print(bad or "ok")
sys.exit(bool(bad))
