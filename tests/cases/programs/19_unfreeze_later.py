"""pytorch#79888, Lightning#8720, luxonis-train#432: parameters frozen when the optimizer is made and unfrozen later.
torch.optim.AdamW(model.parameters()) trains them from then on; nestopt.optimizer(model) leaves them out.
"""

import logging
import sys

import torch
from torch import nn

import nestopt

logging.basicConfig(level=logging.WARNING)
r = {}
for name, make in {
    "torch AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.1),
    "nestopt.optim.AdamW": lambda m: nestopt.optim.AdamW(m.parameters(), lr=0.1),
    "nestopt.optimizer(model, adamw)": lambda m: nestopt.optimizer(m, "adamw", lr=0.1),
    "nestopt.optimizer(model, muon)": lambda m: nestopt.optimizer(m, "muon", lr=0.1),
}.items():
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    m[0].requires_grad_(False)
    o = make(m)
    w = m[0].weight.detach().clone()
    said = "0.weight" in str(getattr(o, "explain", lambda: "")()) if "nestopt.optimizer" in name else ""
    m[0].requires_grad_(True)
    for _ in range(3):
        o.zero_grad()
        m(torch.randn(3, 4)).square().sum().backward()
        o.step()
    r[name] = ("trained" if not torch.equal(w, m[0].weight) else "NEVER TRAINED, nothing said") + (
        f" (explain names it: {said})" if said != "" else ""
    )
for k, v in r.items():
    print(k, "->", v)
sys.exit(any("NEVER" in v for v in r.values()))
