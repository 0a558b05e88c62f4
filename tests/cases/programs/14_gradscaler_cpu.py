"""pytorch#67590, Lightning#21426: GradScaler skips steps; the optimizer must not have ticked; dgd's inputs of the
skipped batch must be dropped, also when gradients are cleared by model.zero_grad().
"""

import sys

import torch
from torch import nn

import nestopt

bad = []


def mk():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


for clear in ("optimizer", "model", "grad=None"):
    for level in ("adamw", "muon", "dgd", "ggd"):
        m, r = mk(), mk()
        o, ro = nestopt.optimizer(m, level, lr=0.05), nestopt.optimizer(r, level, lr=0.05)
        sc = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)

        def clearit(mm, oo):
            if clear == "optimizer":
                oo.zero_grad()
            elif clear == "model":
                mm.zero_grad()
            else:
                for p in mm.parameters():
                    p.grad = None

        if level == "ggd":
            o._watcher and o.watch(m, sc.get_scale)
        for s in range(5):
            g = torch.Generator().manual_seed(s)
            x = torch.randn(5, 6, generator=g)
            if s == 2:
                clearit(m, o)
                sc.scale(m(10 * x).sum() * float("inf")).backward()
                sc.step(o)
                sc.update()
            clearit(m, o)
            sc.scale(m(x).square().mean()).backward()
            sc.step(o)
            sc.update()
            clearit(r, ro)
            r(x).square().mean().backward()
            ro.step()
        d = max((p - q).abs().max().item() for p, q in zip(m.parameters(), r.parameters()))
        if not d < 1e-5:
            bad.append((level, "cleared by", clear, d))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
