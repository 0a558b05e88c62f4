"""recurrent layers under activation checkpointing (transformers#30320, #28056, #43203): same outputs and gradients,
state written once; both kinds; with a state; autocast inside.
"""

import sys

import torch
from torch.utils.checkpoint import checkpoint

import nestopt

bad = []
for name in [
    "attention",
    "window_attention",
    "retnet",
    "gated_deltanet",
    "oja",
    "omega",
    "ttt",
    "titans",
    "dla",
    "self_modifying",
    "cms",
    {"level": "cms", "learn": "context", "periods": [4, 8]},
]:
    for auto in (False, True):
        try:
            torch.manual_seed(0)
            layer = (
                nestopt.layer(name, dim=16)
                if name == "cms" or isinstance(name, dict)
                else nestopt.layer(name, dim=16, heads=2)
            )
            x = torch.randn(2, 20, 16)

            def f(z, s):
                return layer(z, s)

            def run(mode):
                layer.zero_grad()
                z = x.clone().requires_grad_()
                with torch.autocast("cpu", torch.bfloat16, enabled=auto):
                    _, s = layer(x[:, :7])
                    if mode is None:
                        y, s2 = f(z, s)
                    elif mode == "non":
                        y, s2 = checkpoint(f, z, s, use_reentrant=False)
                    else:
                        y, s2 = checkpoint(lambda zz: f(zz, s), z, use_reentrant=True)
                    y3, _ = layer(x[:, :3], s2 if mode != "re" else nestopt.nn.detach(s2))
                (y.float().square().sum() + (y3.float().square().sum() if mode != "re" else 0)).backward()
                return (
                    y.detach().float(),
                    {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None},
                    z.grad.clone(),
                )

            y0, g0, z0 = run(None)
            y1, g1, z1 = run("non")
            if not torch.allclose(y0, y1, atol=1e-5):
                bad.append((str(name), auto, "outputs differ"))
            d = max(((g0[k] - g1[k]).abs().max() / (g0[k].abs().max() + 1e-6)).item() for k in g0)
            if not d < (1e-4 if not auto else 5e-2):
                bad.append((str(name), f"autocast={auto}", "gradients differ under checkpointing by", d))
        except Exception as e:
            bad.append((str(name), auto, repr(e)[:200]))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
