"""A Titans layer in a network of one's own, taught to recall: it sees pairs, then a key, and answers with its value."""

import torch
from torch import nn

import nestopt

KEYS, VALUES, PAIRS = 8, 8, 3


class Recall(nn.Module):
    def __init__(self, dim: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(KEYS + VALUES, dim)
        self.memory = nestopt.layer("titans", dim=dim, heads=2)
        self.head = nn.Linear(dim, VALUES)

    def forward(self, tokens: torch.Tensor, state: dict | None = None) -> tuple[torch.Tensor, dict]:
        x = self.embedding(tokens)
        y, state = self.memory(x, state)
        return self.head(x + y), state


def batch(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`key value key value … key` of each sequence, and the value that belongs to the last key."""
    keys = torch.rand(size, KEYS).argsort(1)[:, :PAIRS]
    values = torch.randint(VALUES, (size, PAIRS))
    asked = torch.randint(PAIRS, (size, 1))
    pairs = torch.stack([keys, KEYS + values], dim=2).flatten(1)
    return torch.cat([pairs, keys.gather(1, asked)], dim=1), values.gather(1, asked)[:, 0]


def main(steps: int = 200) -> None:
    torch.manual_seed(0)
    model = Recall()
    optimizer = nestopt.optimizer(model, "adam", lr=0.01)
    for step in range(steps):
        tokens, wanted = batch(32)
        loss = nn.functional.cross_entropy(model(tokens)[0][:, -1], wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.3f}")

    # the state that comes out goes in again: whole or in pieces, the answer is the same
    tokens, wanted = batch(256)
    with torch.no_grad():
        whole, _ = model(tokens)
        _, state = model(tokens[:, :4])
        rest, _ = model(tokens[:, 4:], state)
    right = (whole[:, -1].argmax(1) == wanted).float().mean()
    print(f"right on {right:.0%} of new sequences (by chance: on one in eight)")
    print(f"in two pieces: differs by at most {(whole[:, 4:] - rest).abs().max():.0e}")


if __name__ == "__main__":
    main()
