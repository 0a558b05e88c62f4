"""pytorch#167319's kind, by the commonest road: a LambdaLR whose lambda uses numpy makes group['lr'] an np.float64;
state_dict() is promised to load under weights_only=True.
"""

import io
import sys

import numpy as np
import torch
from torch import nn

import nestopt

r = {}
for name, make in {
    "optimizer(muon)": lambda m: nestopt.optimizer(m, "muon", lr=0.02),
    "AdamW": lambda m: nestopt.optim.AdamW(m.parameters(), lr=0.02),
}.items():
    m = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    o = make(m)
    s = torch.optim.lr_scheduler.LambdaLR(o, lambda e: 0.5 * (1 + np.cos(np.pi * e / 10)))
    for _ in range(3):
        o.zero_grad()
        m(torch.randn(2, 4)).sum().backward()
        o.step()
        s.step()
    b = io.BytesIO()
    torch.save(o.state_dict(), b)
    b.seek(0)
    try:
        torch.load(b, weights_only=True)
        r[name] = "ok"
    except Exception as e:
        r[name] = "NOT LOADABLE: " + type(e).__name__ + " " + type(o.param_groups[0]["lr"]).__name__
print(r)
sys.exit(any(v != "ok" for v in r.values()))
