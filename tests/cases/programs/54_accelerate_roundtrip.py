"""accelerate#805 and resume reports: prepare, accumulate, clip, save_state, load_state, with a scheduler; pickle of
the prepared optimizer; on a fresh optimizer equal to going on.
"""

import pickle
import sys
import tempfile

import torch
from accelerate import Accelerator
from torch import nn

import nestopt

bad = []


def build(level):
    torch.manual_seed(0)
    m = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2))
    a = Accelerator(cpu=True, gradient_accumulation_steps=2)
    o = nestopt.optimizer(m, level, lr=0.05)
    s = torch.optim.lr_scheduler.CosineAnnealingLR(o, 20)
    return a, *a.prepare(m, o, s)


def train(a, m, o, s, r):
    for i in r:
        with a.accumulate(m):
            a.backward(m(torch.randn(5, 6, generator=torch.Generator().manual_seed(i))).square().mean())
            if a.sync_gradients:
                a.clip_grad_norm_(m.parameters(), 0.1)
            o.step()
            s.step()
            o.zero_grad()


for level in ("adamw", "muon", "m3", "shampoo", "dgd"):
    try:
        x = build(level)
        train(*x, range(6))
        d = tempfile.mkdtemp()
        x[0].save_state(d)
        y = build(level)
        y[0].load_state(d)
        train(*x, range(6, 12))
        train(*y, range(6, 12))
        e = max((p - q).abs().max().item() for p, q in zip(x[1].parameters(), y[1].parameters()))
        if e:
            bad.append((level, "resume off by", e))
        pickle.loads(pickle.dumps(x[2]))
    except Exception as e:
        bad.append((level, repr(e)[:200]))
print(bad or "ok")
sys.exit(bool(bad))
