"""KellerJordan/Muon #36, #8, #60; kozistr/pytorch_optimizer #371-373; pytorch#180561: Muon and None gradients, zero
gradients, conv shapes and their lr factor, rows/columns, scale, closures.
"""

import sys

import torch
from torch import nn

import nestopt

bad = []


def u(shape, g, level="muon", dtype=torch.float32, **k):
    p = nn.Parameter(torch.zeros(shape, dtype=dtype))
    o = nestopt.optim.Nested([p], level, lr=1.0)
    p.grad = g.to(dtype)
    o.step()
    return -p.detach().float()


torch.manual_seed(0)
for level in (
    "muon",
    "m3",
    "newton_schulz",
    "shampoo",
    "matrix_adagrad",
    "deep_momentum",
    "delta_momentum",
    "regression_optimum",
    "adam",
    "second_moment",
    "feature_momentum",
    "preconditioned_momentum",
):
    for dt in (torch.float32, torch.bfloat16, torch.float16):
        for name, g in {
            "zero": torch.zeros(4, 6),
            "one row": torch.zeros(4, 6).index_fill(0, torch.tensor([1]), 1.0),
            "1e-25": torch.randn(4, 6) * 1e-25,
            "1e25": torch.randn(4, 6) * 1e25,
            "1e4": torch.randn(4, 6) * 1e4,
            "rank1": torch.ones(4, 6),
        }.items():
            if dt == torch.float16 and name in ("1e25",):
                continue
            try:
                d = u((4, 6), g, level, dt)
                if not d.isfinite().all():
                    bad.append((level, str(dt), name, "not finite"))
                if name == "zero" and d.abs().max() > 0:
                    bad.append((level, str(dt), name, "moves by", d.abs().max().item()))
            except Exception as e:
                bad.append((level, str(dt), name, repr(e)[:100]))
# scale invariance
g = torch.randn(8, 6)
for level in ("muon", "m3", "newton_schulz"):
    ref = u((8, 6), g, level)
    for s in (1e-25, 1e-12, 1e12, 1e25):
        d = u((8, 6), g * s, level)
        if (d - ref).norm() > 0.05 * ref.norm():
            bad.append((level, f"scale {s}: |d-ref|/|ref| = {((d - ref).norm() / ref.norm()).item():.2g}"))
# conv: factor of the reshaped matrix
c = torch.randn(8, 3, 3, 3)
a, b = u((8, 3, 3, 3), c), u((8, 27), c.view(8, 27))
if not torch.allclose(a.view(8, 27), b, atol=1e-5):
    bad.append("conv differs from its matrix")
# 1xn, nx1
for sh in ((1, 5), (5, 1), (1, 1)):
    d = u(sh, torch.randn(sh))
    if not d.isfinite().all() or d.norm() < 0.3:
        bad.append((sh, d))
# None gradient: weight not decayed
p, q = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
o = nestopt.optim.Muon([p, q], weight_decay=0.5)
p.grad = torch.randn(3, 3)
o.step()
if not torch.equal(q, torch.ones(3, 3)):
    bad.append("None gradient was decayed")
if o.step(lambda: torch.tensor(3.0)) != 3.0:
    bad.append("closure's loss not returned")
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
