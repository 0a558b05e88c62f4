"""deepspeed #8432 (overflow poisons Muon's momentum), pytorch GradScaler #67590: a step with infinite gradients must
be skipped whole - momenta, clocks, group sums, layer inputs.
"""

import sys

import torch
from torch import nn

import nestopt

bad = []


def mk():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


for level in ("muon", "m3", "adamw", "dgd", "ggd"):
    for period in (1, 2):
        m, r = mk(), mk()

        def opt(mm, **k):
            torch.manual_seed(3)
            return nestopt.optimizer(mm, level, lr=0.01, groups=[{"match": ".*weight", "period": period}], **k)

        try:
            o, ro = opt(m, on_nonfinite="skip"), opt(r)
            for s in range(8):
                g = torch.Generator().manual_seed(s)
                x = torch.randn(5, 6, generator=g)
                if s in (2, 5):  # an overflow, only in m
                    o.zero_grad()
                    (m(x * 3).sum() * float("inf")).backward()
                    o.step()
                    o.zero_grad()
                o.zero_grad()
                m(x).square().mean().backward()
                o.step()
                ro.zero_grad()
                r(x).square().mean().backward()
                ro.step()
            d = max((p - q).abs().max().item() for p, q in zip(m.parameters(), r.parameters()))
            if d > 1e-6 or d != d:
                bad.append(
                    (level, f"period={period}", "on_nonfinite=skip: differs from never having had the bad batch by", d)
                )
        except Exception as e:
            bad.append((level, period, repr(e)[:200]))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
