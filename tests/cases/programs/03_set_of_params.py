"""pytorch/pytorch#6031: an unordered set of parameters makes checkpoints load wrongly; torch refuses sets in groups.
nestopt.optimizer should refuse (its groups are built from it, in the set's order).
"""

import sys

import torch
from torch import nn

import nestopt

ps = {nn.Parameter(torch.randn(3, 3)) for _ in range(3)}
r = {}
for name, make in {
    "torch.optim.AdamW(set)": lambda: torch.optim.AdamW(ps),
    "torch group": lambda: torch.optim.AdamW([{"params": ps}]),
    "Nested(set)": lambda: nestopt.optim.Nested(ps, "gd"),
    "Nested group": lambda: nestopt.optim.Nested([{"params": ps}], "gd"),
    "nestopt.optimizer(set)": lambda: nestopt.optimizer(ps, "adamw"),
}.items():
    try:
        make()
        r[name] = "accepted"
    except TypeError as e:
        r[name] = "refused: " + str(e)[:60]
print(r)
sys.exit(r["nestopt.optimizer(set)"] == "accepted")
