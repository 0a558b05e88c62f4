"""facebookresearch/optimizers#13: eigendecomposition fails in mid-training on an ill-conditioned / non-finite
preconditioner. One huge or NaN gradient: what is said, are parameters half-updated, and does it go on after?
"""

import sys

import torch
from torch import nn

import nestopt

bad = []
for level in ("shampoo", "matrix_adagrad", "muon", "adamw"):
    for kind, value in {"NaN": float("nan"), "inf": float("inf"), "1e20": 1e20}.items():
        torch.manual_seed(0)
        ps = [nn.Parameter(torch.randn(5, 4)) for _ in range(2)] + [nn.Parameter(torch.randn(300, 300))]
        o = nestopt.optim.Nested(ps, level, lr=0.01)
        for _ in range(3):
            for p in ps:
                p.grad = torch.randn_like(p)
            o.step()
        before = [p.detach().clone() for p in ps]
        for p in ps:
            p.grad = torch.randn_like(p)
        ps[1].grad.fill_(value)
        try:
            o.step()
            said = "ok"
        except Exception as e:
            said = type(e).__name__ + ": " + str(e)[:70]
        moved = [not torch.equal(p, b) for p, b in zip(ps, before)]
        after = []
        for _ in range(25):
            for p in ps:
                p.grad = torch.randn_like(p)
            try:
                o.step()
                after.append("ok")
            except Exception as e:
                after.append(type(e).__name__)
        print(
            level,
            kind,
            "|",
            said,
            "| moved",
            moved,
            "| after:",
            {a: after.count(a) for a in set(after)},
            "finite",
            [bool(p.isfinite().all()) for p in ps],
        )
        if "LinAlg" in said or any("LinAlg" in a for a in after):
            bad.append(
                (
                    level,
                    kind,
                    "raw LinAlgError, parameters half-updated" if any(moved) and not all(moved) else "raw LinAlgError",
                )
            )
print(bad or "ok")
sys.exit(bool(bad))
