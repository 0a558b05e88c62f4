"""xtuner#2030, Megatron-LM#4731, torchtitan#4692, modded-nanogpt#47: Muon must orthogonalise the logical matrices of
a fused weight. nestopt splits nn.MultiheadAttention's by itself; here nn.LSTM / nn.GRU gates and GPT-2's c_attn.
Equal to unfused, or said in explain().
"""

import sys

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import nestopt

bad = []


def blocks(p, before, parts, dim):
    return [(p.detach() - before).chunk(parts, dim)]


def svals(d):
    s = torch.linalg.svdvals(d.float())
    return (s / s.mean()).aminmax()


torch.manual_seed(0)
models = {
    "nn.MultiheadAttention": (nn.MultiheadAttention(32, 4, batch_first=True), "in_proj_weight", 3, 0),
    "nn.LSTM weight_hh_l0": (nn.LSTM(32, 32, batch_first=True), "weight_hh_l0", 4, 0),
    "nn.GRU weight_hh_l0": (nn.GRU(32, 32, batch_first=True), "weight_hh_l0", 3, 0),
}
g = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32))
models["GPT-2 c_attn"] = (g, "transformer.h.0.attn.c_attn.weight", 3, 1)
for name, (m, pn, parts, dim) in models.items():
    o = nestopt.optimizer(m, "muon", lr=0.1, rest="gd")
    p = dict(m.named_parameters())[pn]
    b = p.detach().clone()
    p.grad = torch.randn_like(p)
    ref = []
    for c in p.grad.chunk(parts, dim):
        q = nn.Parameter(torch.zeros_like(c))
        oo = nestopt.optim.Nested([q], "muon", lr=0.1)
        q.grad = c.clone()
        oo.step()
        ref.append(q.detach())
    o.step()
    d = p.detach() - b
    r = torch.cat(ref, dim)
    e = ((d - r).norm() / r.norm()).item()
    why = [l for l in str(o.explain()).splitlines() if l.split()[:1] == [pn]]
    print(f"{name}: {e:.2f} from the step of its {parts} matrices; explain: {why}")
    if e > 0.05 and not any("parts" in w or "queries" in w or "matrices" in w for w in why):
        bad.append((name, e))
print(bad or "ok")
sys.exit(bool(bad))
