"""pytorch#110758, #106951, bitsandbytes#1185, ultralytics#26013: gradients and parameters with other strides
(channels_last, transposed, expanded, views).
"""

import sys

import torch
from torch import nn

import nestopt

bad = []
shapes = {
    "plain": lambda: torch.randn(6, 4),
    "transposed": lambda: torch.randn(4, 6).T,
    "expanded grad": None,
    "channels_last": lambda: torch.randn(6, 3, 3, 3).to(memory_format=torch.channels_last),
    "view of a larger": lambda: torch.randn(10, 10)[2:8, 1:5],
    "(2,1,100)": lambda: torch.randn(2, 1, 100),
}
for level in (
    "gd",
    "momentum",
    "adam",
    "adamw",
    "muon",
    "m3",
    "shampoo",
    "second_moment",
    "deep_momentum",
    ["momentum", "second_moment"],
):
    for n in (1, 3):
        for name, mk in shapes.items():
            for gform in ("as param", "contiguous", "other"):
                try:
                    torch.manual_seed(1)
                    data = [(torch.randn(6, 4) if mk is None else mk()) for _ in range(n)]
                    if data[0].ndim == 3 and level in ("muon", "m3", "shampoo", "deep_momentum"):
                        pass
                    ps = [nn.Parameter(d) for d in data]
                    qs = [nn.Parameter(d.detach().clone(memory_format=torch.contiguous_format)) for d in data]
                    torch.manual_seed(2)
                    a = nestopt.optim.Nested(ps, level, lr=0.1)
                    torch.manual_seed(2)
                    b = nestopt.optim.Nested(qs, level, lr=0.1)
                    for s in range(3):
                        for p, q in zip(ps, qs):
                            g = torch.randn(1).expand(p.shape) if mk is None else torch.randn(p.shape)
                            p.grad = (
                                g
                                if mk is None
                                else torch.empty_like(p).copy_(g)
                                if gform == "as param"
                                else g.contiguous()
                                if gform == "contiguous"
                                else g.transpose(0, 1).contiguous().transpose(0, 1)
                            )
                            q.grad = g.contiguous()
                        torch.manual_seed(s)
                        a.step()
                        torch.manual_seed(s)
                        b.step()
                    d = max((p - q).abs().max().item() for p, q in zip(ps, qs))
                    if not d < 1e-3:
                        bad.append((level, n, name, gform, d))
                except Exception as e:
                    bad.append((level, n, name, gform, repr(e)[:140]))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
