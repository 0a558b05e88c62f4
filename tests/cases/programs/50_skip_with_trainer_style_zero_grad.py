"""Variation of 13/14: the Hugging Face Trainer clears gradients by model.zero_grad(); nestopt's own
on_nonfinite='skip' is the guard. A skipped batch must leave nothing behind, period 1 too.
"""

import sys

import torch
from torch import nn

import nestopt

bad = []


def mk():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


for level in ("adamw", "muon", "dgd", "ggd"):
    m, r = mk(), mk()
    o, ro = nestopt.optimizer(m, level, lr=0.05, on_nonfinite="skip"), nestopt.optimizer(r, level, lr=0.05)
    for s in range(5):
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(s))
        if s == 2:
            (m(5 * x).square().mean() * float("inf")).backward()
            o.step()
            m.zero_grad()
        m(x).square().mean().backward()
        o.step()
        m.zero_grad()
        r(x).square().mean().backward()
        ro.step()
        r.zero_grad()
    d = max((p - q).abs().max().item() for p, q in zip(m.parameters(), r.parameters()))
    if not d < 1e-6:
        bad.append((level, d))
print(bad or "ok")
sys.exit(bool(bad))
