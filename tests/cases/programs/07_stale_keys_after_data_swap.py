"""HomebrewML/HeavyBall#56: after validation state_dict() meets tensors that are no parameters (KeyError). Here: EMA
swap by .data in and out, model.to(dtype) with swap, set_data; state_dict must go on, and be of the parameters.
"""

import copy
import sys

import torch
from torch import nn

import nestopt

bad = []
for level in ("momentum", "adam", "muon", "m3", "shampoo"):
    m, r = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)), None
    r = copy.deepcopy(m)
    o, ro = (nestopt.optimizer(x, level, lr=0.01, route="hidden_matrices") for x in (m, r))
    for s in range(6):
        x = torch.randn(3, 6, generator=torch.Generator().manual_seed(s))
        for mm, oo in ((m, o), (r, ro)):
            oo.zero_grad()
            mm(x).square().sum().backward()
            oo.step()
        # swap EMA weights in by .data, save, swap back
        old = [p.data for p in m.parameters()]
        for p in m.parameters():
            p.data = torch.zeros_like(p.data)
        sd = o.state_dict()
        for p, d in zip(m.parameters(), old):
            p.data = d
        if s == 3:
            with torch.no_grad():
                m.load_state_dict(copy.deepcopy(m.state_dict()), assign=False)
        if len(sd["state"]) != len(list(m.parameters())):
            bad.append((level, len(sd["state"])))
    for p, q in zip(m.parameters(), r.parameters()):
        if not torch.equal(p, q):
            bad.append((level, "diverged", (p - q).abs().max().item()))
print(bad or "ok")
sys.exit(bool(bad))
