"""The same stack of levels in Python and in YAML, described, and set to work."""

from pathlib import Path

import torch
from torch import nn

import nestopt
from nestopt.levels import momentum, newton_schulz

STACK = nestopt.chain(
    nestopt.parallel(
        fast=momentum(),
        slow=nestopt.nest(outer=momentum(0.5, period=16), inner=momentum(0.95, period=4)),
        weights=[1.0, 0.5],
    ),
    newton_schulz(),
)


def main() -> None:
    loaded = nestopt.load(Path(__file__).with_name("stack.yaml"))
    print("the YAML file holds the same stack:", loaded == STACK)
    print(nestopt.describe(STACK, shape=(64, 64)))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = nestopt.optimizer(model, STACK, lr=0.02, rest={"stack": "adam", "lr": 0.01})
    x = torch.randn(256, 16)
    y = x[:, :1] * x[:, 1:2]
    for step in range(101):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    print("state of one matrix:", ", ".join(optimizer.state[model[2].weight]))


if __name__ == "__main__":
    main()
