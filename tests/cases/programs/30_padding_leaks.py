"""fla#1272 (padding fades the state), state-spaces/mamba#66, transformers#31540, #32677, #48256 (right-padded prefill
corrupts the cache): what stands at padded places must not matter - outputs, next state, gradients; left, right,
interior, whole rows.
"""

import sys

import torch

import nestopt

bad = []
L = [
    "attention",
    "window_attention",
    "linear_attention",
    "retnet",
    "gated_linear",
    "deltanet",
    "gated_deltanet",
    "oja",
    "omega",
    "ttt",
    "titans",
    "dla",
    "self_modifying",
    "cms",
]
for name in L:
    torch.manual_seed(0)
    try:
        layer = nestopt.layer(name, dim=16) if name == "cms" else nestopt.layer(name, dim=16, heads=2)
    except Exception as e:
        bad.append((name, "make", repr(e)[:100]))
        continue
    x = torch.randn(3, 20, 16)
    m = torch.ones(3, 20, dtype=torch.bool)
    m[0, :7] = False
    m[1, 13:] = False
    m[2, 5:9] = False
    for poison in (1e4, float("nan"), float("inf")):
        try:
            y1, s1 = layer(x, mask=m)
            z = torch.where(m[..., None], x, torch.full_like(x, poison))
            z.requires_grad_()
            y2, s2 = layer(z, mask=m)
            if not torch.allclose(y1[m], y2[m], atol=1e-5):
                bad.append((name, poison, "outputs depend on padding"))
            n = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(1))
            a, _ = layer(n, s1)
            b, _ = layer(n, s2)
            if not torch.allclose(a, b, atol=1e-5):
                bad.append((name, poison, "state depends on padding"))
            layer.zero_grad()
            y2[m].square().sum().backward()
            if any(p.grad is not None and not p.grad.isfinite().all() for p in layer.parameters()):
                bad.append((name, poison, "gradient not finite"))
            if not z.grad[m].isfinite().all():
                bad.append((name, poison, "input gradient not finite"))
        except Exception as e:
            bad.append((name, poison, repr(e)[:150]))
    # rows alone
    try:
        for r in range(3):
            alone, sa = layer(x[r : r + 1, m[r]])
            if not torch.allclose(alone[0], y1[r][m[r]], atol=1e-4):
                bad.append((name, f"row {r} differs from alone by", (alone[0] - y1[r][m[r]]).abs().max().item()))
            c1, _ = layer(n[r : r + 1], sa)
            if not torch.allclose(c1[0], a[r], atol=1e-4):
                bad.append(
                    (
                        name,
                        f"row {r}: going on from the padded state differs by {(c1[0] - a[r]).abs().max().item():.2g} of {c1.abs().max().item():.2g}",
                    )
                )
        dead = m.clone()
        dead[1] = False
        y, s = layer(x, mask=dead)
        if not y.isfinite().all():
            bad.append((name, "whole row padded: not finite"))
        y3, _ = layer(n, s)
        f3, _ = layer(n[1:2])
        if not torch.allclose(y3[1], f3[0], atol=1e-4):
            bad.append((name, "a row of padding alone is not a new sequence", (y3[1] - f3[0]).abs().max().item()))
    except Exception as e:
        bad.append((name, "alone", repr(e)[:150]))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
