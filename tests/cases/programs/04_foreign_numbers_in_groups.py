"""pytorch/pytorch#167319 (OmegaConf ListConfig as betas) : state_dict() is promised to be plain and load under
weights_only=True; numbers come from configs as list subclasses and numpy scalars.
"""

import io
import sys

import numpy as np
import torch
from torch import nn

import nestopt


class ListConfig(list):
    pass


class F(float):
    pass


def trial(make):
    p = nn.Parameter(torch.randn(4, 4))
    try:
        o = make([p])
    except Exception as e:
        return "refused: " + repr(e)[:110]
    p.grad = torch.randn(4, 4)
    o.step()
    b = io.BytesIO()
    torch.save(o.state_dict(), b)
    b.seek(0)
    try:
        torch.load(b, weights_only=True)
        return "ok"
    except Exception as e:
        return "NOT LOADABLE: " + str(e).strip().splitlines()[-1][:0] + type(e).__name__


from nestopt.levels import momentum

r = {
    "AdamW betas=list subclass": trial(lambda p: nestopt.optim.AdamW(p, betas=ListConfig([0.9, 0.99]))),
    "AdamW lr=np.float64": trial(lambda p: nestopt.optim.AdamW(p, lr=np.float64(1e-3))),
    "AdamW lr=np.float32": trial(lambda p: nestopt.optim.AdamW(p, lr=np.float32(1e-3))),
    "AdamW wd=np.float64": trial(lambda p: nestopt.optim.AdamW(p, weight_decay=np.float64(1e-3))),
    "optimizer lr=np.float64": trial(lambda p: nestopt.optimizer(p, "muon", lr=np.float64(1e-3))),
    "Nested lr=np.float64": trial(lambda p: nestopt.optim.Nested(p, "muon", lr=np.float64(1e-3))),
    "momentum(np.float64)": trial(lambda p: nestopt.optim.Nested(p, momentum(np.float64(0.9)), lr=1e-3)),
    "Nested period=np.int64": trial(lambda p: nestopt.optim.Nested(p, "muon", period=np.int64(2))),
    "M3 betas=list subclass": trial(lambda p: nestopt.optim.M3(p, betas=ListConfig([0.9, 0.99, 0.9]))),
    "Muon ns_coefficients=list subclass": trial(
        lambda p: nestopt.optim.Muon(p, ns_coefficients=ListConfig([3.4445, -4.775, 2.0315]))
    ),
}
for k, v in r.items():
    print(k, "->", v)
sys.exit(any(v.startswith("NOT") for v in r.values()))
