"""keras#21885, KellerJordan/Muon#60: the learning-rate factor of Muon depends on which dimension is the output.
transformers' Conv1D (GPT-2) and nn.Bilinear/ConvTranspose keep weights the other way round: the same function must
get the same update.
"""

import sys

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import nestopt

bad = []


class A(nn.Module):
    def __init__(s, t):
        super().__init__()
        torch.manual_seed(0)
        W = [torch.randn(64, 16), torch.randn(16, 64), torch.randn(3, 16)]
        s.emb = nn.Embedding(5, 16)
        if t:
            s.up, s.down = Conv1D(64, 16), Conv1D(16, 64)
            s.up.weight.data = W[0].T.contiguous()
            s.down.weight.data = W[1].T.contiguous()
        else:
            s.up, s.down = nn.Linear(16, 64), nn.Linear(64, 16)
            s.up.weight.data = W[0].clone()
            s.down.weight.data = W[1].clone()
        for l in (s.up, s.down):
            l.bias.data.zero_()
        s.head = nn.Linear(16, 3)

    def forward(s, x):
        return s.head(s.down(torch.tanh(s.up(s.emb(x)))))


for level in ("muon", "m3", {"level": "muon", "scale": "match_rms_adamw"}, "shampoo", "dgd"):
    try:
        ms = A(False), A(True)
        ms[1].emb.load_state_dict(ms[0].emb.state_dict())
        ms[1].head.load_state_dict(ms[0].head.state_dict())
        os = [nestopt.optimizer(m, level, lr=0.1) for m in ms]
        for m, o in zip(ms, os):
            o.zero_grad()
            m(torch.arange(5)).square().mean().backward()
            before = m.up.weight.detach().clone(), m.down.weight.detach().clone()
            o.step()
            m.d = [(w - b) for w, b in zip((m.up.weight.detach(), m.down.weight.detach()), before)]
        for n, a, b in zip(("up", "down"), ms[0].d, ms[1].d):
            ratio = (b.norm() / a.norm()).item()
            if not 0.95 < ratio < 1.05:
                bad.append((level, n, f"Conv1D's step is {ratio:.3f} times the Linear's"))
    except Exception as e:
        bad.append((level, repr(e)[:150]))
for x in bad:
    print(x)
print(os[1].explain())
print("ok" if not bad else "")
sys.exit(bool(bad))
