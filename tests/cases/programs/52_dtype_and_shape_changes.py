"""ColossalAI#5539, fastai#1629, transformers#3519: after some steps the model is cast
(.double()/.bfloat16()/.float()) or a parameter grown by .data: go on in the new dtype, or an error in words; complex,
integer, sparse, empty and 0-d parameters.
"""

import sys

import torch
from torch import nn

import nestopt

bad = []


def words(e):
    return isinstance(e, (RuntimeError, ValueError, TypeError)) and any(
        w in str(e) for w in ("state", "shape", "dtype", "parameter", "weight", "give")
    )


for level in (
    "momentum",
    "adam",
    "adamw",
    "muon",
    "m3",
    "shampoo",
    "deep_momentum",
    "second_moment",
    "delta_momentum",
    ["momentum", "muon"],
):
    for start, to in (
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float16, torch.float32),
    ):
        for n in (1, 3):
            try:
                torch.manual_seed(0)
                m = nn.ParameterList(nn.Parameter(torch.randn(5, 4)) for _ in range(n)).to(start)
                o = nestopt.optim.Nested(m.parameters(), level, lr=0.01)
                for _ in range(3):
                    for p in m:
                        p.grad = torch.randn_like(p)
                    o.step()
                for p in m:
                    p.grad = None
                m.to(to)
                for _ in range(3):
                    for p in m:
                        p.grad = torch.randn_like(p)
                    o.step()
                if not all(p.isfinite().all() and p.dtype == to for p in m):
                    bad.append((str(level), start, to, "not finite or dtype"))
            except Exception as e:
                bad.append((str(level), f"{start}->{to}", n, type(e).__name__ + ": " + str(e)[:110]))
    p = nn.Parameter(torch.randn(5, 4))
    o = nestopt.optim.Nested([p], level, lr=0.01)
    p.grad = torch.randn(5, 4)
    o.step()
    p.grad = None
    p.data = torch.randn(7, 4)
    p.grad = torch.randn(7, 4)
    try:
        o.step()  # deep_momentum's MLP is of the columns, and may go on
        if level != "deep_momentum":
            bad.append((str(level), "grown parameter accepted"))
    except Exception as e:
        if not words(e):
            bad.append((str(level), "grown parameter", repr(e)[:120]))
for label, make in {
    "complex": lambda: nn.Parameter(torch.randn(3, 3, dtype=torch.cfloat)),
    "integer": lambda: nn.Parameter(torch.ones(3, 3, dtype=torch.int64), requires_grad=False),
    "empty": lambda: nn.Parameter(torch.zeros(0, 4)),
    "0-d": lambda: nn.Parameter(torch.tensor(1.0)),
}.items():
    for level in ("adamw", "momentum", "muon"):
        try:
            p = make()
            o = nestopt.optim.Nested([p], level, lr=0.1)
            p.grad = torch.ones_like(p) if p.is_floating_point() else None
            o.step()
            o.load_state_dict(o.state_dict())
            if label in ("complex", "integer"):
                bad.append((label, level, "accepted"))
        except Exception as e:
            if not words(e):
                bad.append((label, level, repr(e)[:120]))
e = nn.Embedding(5, 4, sparse=True)
o = nestopt.optimizer(e, "adamw")
e(torch.tensor([1])).sum().backward()
try:
    o.step()
    bad.append("sparse accepted")
except RuntimeError as x:
    bad += [] if "sparse" in str(x) else [repr(x)]
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
