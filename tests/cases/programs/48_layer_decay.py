"""timm#2532 (layer decay without effect), #2691 (frozen parameters shift the scales), #2712 (a token gets the head's
rate), electra#64 (off by one): layer-wise rates with a ViT-like model, frozen parts, tied weights, a scheduler.
"""

import sys

import torch
from torch import nn

import nestopt

bad = []


class V(nn.Module):
    def __init__(s):
        super().__init__()
        s.cls_token = nn.Parameter(torch.zeros(1, 1, 16))
        s.reg_token = nn.Parameter(torch.zeros(1, 4, 16))
        s.pos_embed = nn.Parameter(torch.zeros(1, 9, 16))
        s.patch = nn.Conv2d(3, 16, 4, 4)
        s.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(3))
        s.norm = nn.LayerNorm(16)
        s.head = nn.Linear(16, 5)


def rates(m, **k):
    o = nestopt.optimizer(m, "adamw", lr=1.0, layer_decay=0.5, **k)
    return {n: g["lr"] for g in o.param_groups for n in g["param_names"]}, o


r, o = rates(V())
print({n: v for n, v in r.items() if "blocks" not in n or "linear1.weight" in n})
lowest = min(r.values())
for n in ("cls_token", "reg_token", "pos_embed", "patch.weight"):
    if r[n] != lowest:
        bad.append((n, "has", r[n], "and the lowest rate is", lowest))
if r["head.weight"] != 1.0:
    bad.append(("head", r["head.weight"]))
b = [r[f"blocks.{i}.linear1.weight"] for i in range(3)]
if not (b[1] == 2 * b[0] and b[2] == 2 * b[1]):
    bad.append(("blocks", b))
m = V()
m.blocks[1].requires_grad_(False)
m.patch.requires_grad_(False)
f, _ = rates(m)
for n, v in f.items():
    if v != r[n]:
        bad.append(("freezing changed", n, r[n], v))
s = torch.optim.lr_scheduler.CosineAnnealingLR(o, 10)
ratio = r["blocks.0.linear1.weight"] / r["head.weight"]
for p in (q for g in o.param_groups for q in g["params"]):
    p.grad = torch.zeros_like(p)
for _ in range(5):
    o.step()
    s.step()
now = {n: g["lr"] for g in o.param_groups for n in g["param_names"]}
if abs(now["blocks.0.linear1.weight"] / now["head.weight"] - ratio) > 1e-6:
    bad.append("schedule lost the ratio")
print(bad or "ok")
sys.exit(bool(bad))
