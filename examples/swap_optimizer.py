"""Change one line of a training loop: torch's optimizer for nestopt's, then for a stack of levels."""

import torch
from torch import nn

import nestopt


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy pictures of ten random shapes, and which shape each is."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (512,), generator=generator)
    return shapes[labels] + 1.5 * torch.randn(512, 64, generator=generator), labels


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 60) -> float:
    pictures, labels = digits()
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)  # torch's own, as before
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures), labels)
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


def main() -> None:
    model = network()
    theirs = train(model, torch.optim.AdamW(model.parameters(), lr=3e-3))
    model = network()
    ours = train(model, nestopt.optim.AdamW(model.parameters(), lr=3e-3))
    print(f"loss after 60 steps: torch.optim.AdamW {theirs:.6f}, nestopt.optim.AdamW {ours:.6f}")

    model = network()
    optimizer = nestopt.optimizer(model, "muon", lr=0.05, rest={"stack": "adamw", "lr": 3e-3})
    print(optimizer.explain())
    print(f"loss after 60 steps: muon for the hidden matrices, adamw for the rest {train(model, optimizer):.6f}")


if __name__ == "__main__":
    main()
