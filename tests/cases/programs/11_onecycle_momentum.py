"""pytorch (copied-optimizer #19308, OneCycleLR/CyclicLR with momentum): cycling momentum needs 'momentum' or 'betas'
in the defaults; M3 has three betas. The level must get the cycled value.
"""

import sys

import torch
from torch import nn
from torch.optim import lr_scheduler as S

import nestopt

r = {}
for name, make in {
    "SGD": lambda p: nestopt.optim.SGD(p, 0.1, momentum=0.9),
    "AdamW": lambda p: nestopt.optim.AdamW(p, 0.1),
    "Muon": lambda p: nestopt.optim.Muon(p, 0.1),
    "M3": lambda p: nestopt.optim.M3(p, 0.1),
    "Shampoo": lambda p: nestopt.optim.Shampoo(p, 0.1),
    "Nested muon": lambda p: nestopt.optim.Nested(p, "muon", 0.1),
    "DeltaMomentum": lambda p: nestopt.optim.DeltaMomentum(p, 0.1),
}.items():
    for sch in ("OneCycleLR", "CyclicLR"):
        p = nn.Parameter(torch.randn(4, 4))
        o = make([p])
        try:
            s = (
                S.OneCycleLR(o, 0.1, total_steps=20)
                if sch == "OneCycleLR"
                else S.CyclicLR(o, 0.01, 0.1, step_size_up=4)
            )
            for _ in range(8):
                p.grad = torch.randn(4, 4)
                o.step()
                s.step()
            assert p.isfinite().all()
            o.load_state_dict(o.state_dict())
            p.grad = torch.randn(4, 4)
            o.step()
            s.step()
            r[name, sch] = "ok"
        except ValueError as e:
            r[name, sch] = "refused: " + str(e)[:90]
        except Exception as e:
            r[name, sch] = "CRASH " + repr(e)[:120]
for k, v in r.items():
    print(k, v)
sys.exit(any(v.startswith("CRASH") for v in r.values()))
