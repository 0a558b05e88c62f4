"""fla#838, #1086/#1088 (mask and cu_seqlens), #103 (empty sequences in offsets), mamba#783 (tail of padding): packed
sequences.
"""

import sys

import torch

import nestopt

bad, notes = [], []
for name in [
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
]:
    torch.manual_seed(0)
    layer = nestopt.layer(name, dim=16, heads=2)
    x = torch.randn(1, 30, 16)

    def try_(label, **k):
        try:
            layer(x, **k)
            return "accepted"
        except ValueError as e:
            return "refused: " + str(e)[:90]
        except Exception as e:
            return "CRASH " + repr(e)[:120]

    r = {
        "mask and cu": try_("", mask=torch.ones(1, 30, dtype=torch.bool), cu_seqlens=[0, 10, 30]),
        "empty": try_("", cu_seqlens=[0, 10, 10, 30]),
        "short": try_("", cu_seqlens=[0, 10, 20]),
        "long": try_("", cu_seqlens=[0, 10, 40]),
        "decreasing": try_("", cu_seqlens=[0, 20, 10, 30]),
        "fraction": try_("", cu_seqlens=[0, 10.5, 30]),
        "int32": try_("", cu_seqlens=torch.tensor([0, 10, 30], dtype=torch.int32)),
        "no zero": try_("", cu_seqlens=[10, 30]),
    }
    for k, v in r.items():
        if v.startswith("CRASH") or (v == "accepted") != (k in ("int32",)):
            bad.append((name, k, v))
    ys, st = layer(x, cu_seqlens=[0, 1, 13, 30])
    parts = [layer(x[:, a:b]) for a, b in ((0, 1), (1, 13), (13, 30))]
    if not torch.allclose(ys, torch.cat([p[0] for p in parts], 1), atol=1e-4):
        bad.append((name, "packed differs from alone"))
    n = torch.randn(3, 5, 16)
    a, _ = layer(n, st)
    for i, p in enumerate(parts):
        b, _ = layer(n[i : i + 1], p[1])
        if not torch.allclose(a[i], b[0], atol=1e-4):
            bad.append((name, f"going on from packed state {i} differs by {(a[i] - b[0]).abs().max().item():.2g}"))
    # going on packed, from states
    y2, _ = layer(x, state=st, cu_seqlens=[0, 1, 13, 30]) if True else None
    ref = torch.cat([layer(x[:, a:b], p[1])[0] for (a, b), p in zip(((0, 1), (1, 13), (13, 30)), parts)], 1)
    if not torch.allclose(y2, ref, atol=1e-4):
        bad.append((name, f"packed continuation differs by {(y2 - ref).abs().max().item():.2g}"))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
