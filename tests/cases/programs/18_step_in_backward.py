"""pytorch tutorials#2568 (optimizer in backward): one optimizer per parameter, stepped in its post-accumulate hook,
must be the ordinary run.
"""

import sys

import torch
from torch import nn

import nestopt

bad = []


def mk():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False)
    )


for level in ("momentum", "adamw", "muon", "m3", "shampoo", "dgd"):
    m, r = mk(), mk()
    ro = nestopt.optimizer(r, level, lr=0.02, route="all")
    own = {p: nestopt.optim.Nested([p], level, lr=0.02) for p in m.parameters()}
    if level == "dgd":
        for o in own.values():
            o.watch(m)

    def hook(p):
        own[p].step()
        own[p].zero_grad()

    for p in m.parameters():
        p.register_post_accumulate_grad_hook(hook)
    try:
        for s in range(4):
            x = torch.randn(9, 6, generator=torch.Generator().manual_seed(s))
            ro.zero_grad()
            r(x).square().mean().backward()
            ro.step()
            m(x).square().mean().backward()
    except Exception as e:
        bad.append((level, repr(e)[:150]))
        continue
    d = max((p - q).abs().max().item() for p, q in zip(m.parameters(), r.parameters()))
    if not d < 2e-3 if level in ("muon", "m3") else not d < 1e-5:
        bad.append((level, d))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
