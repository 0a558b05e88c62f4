"""pytorch/pytorch#43706: loading casts float32 state to bfloat16 parameters. All levels, bf16/fp16 params: resume
must be bit-exact and keep dtypes.
"""

import io
import sys

import torch
from torch import nn

import nestopt

bad = []
LEVELS = [
    "gd",
    "momentum",
    "delta_momentum",
    "deep_momentum",
    "adam",
    "adamw",
    "second_moment",
    "matrix_adagrad",
    "shampoo",
    "muon",
    "m3",
    "feature_momentum",
    "regression_optimum",
    "preconditioned_momentum",
    ["momentum", "muon"],
]
for dt in (torch.bfloat16, torch.float16):
    for level in LEVELS:
        try:
            torch.manual_seed(0)
            p = nn.Parameter(torch.randn(6, 4).to(dt))
            o = nestopt.optim.Nested([p], level, lr=0.01)
            gs = [torch.randn(6, 4).to(dt) for _ in range(8)]
            for g in gs[:4]:
                p.grad = g.clone()
                o.step()
            b = io.BytesIO()
            torch.save(o.state_dict(), b)
            b.seek(0)
            q = nn.Parameter(p.detach().clone())
            torch.manual_seed(9)
            o2 = nestopt.optim.Nested([q], level, lr=0.01)
            o2.load_state_dict(torch.load(b, weights_only=True))
            for k, v in o.state[p].items():
                if o2.state[q][k].dtype != v.dtype or not torch.equal(o2.state[q][k], v):
                    bad.append((str(dt), level, k, "state differs"))
            for g in gs[4:]:
                p.grad = g.clone()
                q.grad = g.clone()
                o.step()
                o2.step()
            if not torch.equal(p, q):
                bad.append((str(dt), level, "resume differs"))
        except Exception as e:
            bad.append((str(dt), level, repr(e)[:200]))
print(bad or "ok")
sys.exit(bool(bad))
