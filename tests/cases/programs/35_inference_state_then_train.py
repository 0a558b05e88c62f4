"""pytorch inference-mode reports, recurrent_gemma (transformers#43203: state kept in the module between forwards,
double backward): a state made under inference_mode/no_grad, used in training; the same state used twice; forward
twice then backward; eval between.
"""

import sys

import torch

import nestopt

bad = []
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
    "cms",
]:
    torch.manual_seed(0)
    layer = nestopt.layer(name, dim=16) if name == "cms" else nestopt.layer(name, dim=16, heads=2)
    x = torch.randn(2, 10, 16)
    ref, sr = layer(x)
    sr = nestopt.nn.detach(sr)
    yr, _ = layer(x, sr)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            _, s = layer(x)
        try:
            y, _ = layer(x, s)
            y.square().sum().backward()
        except Exception as e:
            bad.append((name, mode.__name__, "training from that state: " + repr(e)[:150]))
            continue
        if not torch.allclose(y, yr, atol=1e-5):
            bad.append((name, mode.__name__, "differs"))
    before = nestopt.nn.clone(sr)
    a, _ = layer(x, sr)
    b, _ = layer(x, sr)
    if not torch.equal(a, b):
        bad.append((name, "same state twice gives two answers"))
    (a.sum() + b.sum()).backward()
    from nestopt.core.tree import leaves

    if any(not torch.equal(u, w) for (_, u), (_, w) in zip(leaves(before), leaves(sr))):
        bad.append((name, "the state given was changed"))
    with torch.inference_mode():
        try:
            layer.step(x[:, 0], s) if hasattr(layer, "step") else None
        except Exception as e:
            bad.append((name, "step in inference mode", repr(e)[:150]))
    y, s = layer(x)
    y.sum().backward()
    try:
        y2, s2 = layer(x, nestopt.nn.detach(s))
        y2.sum().backward()
    except Exception as e:
        bad.append((name, "tbptt", repr(e)[:150]))
for x in bad:
    print(x)
print("ok" if not bad else "")
sys.exit(bool(bad))
