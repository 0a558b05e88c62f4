"""nestopt in a loop of Hugging Face accelerate: made after `prepare` has placed the model. Needs accelerate."""

import tempfile

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nestopt


def digits() -> DataLoader:
    """Noisy pictures of ten random shapes, and which shape each is."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (512,), generator=generator)
    pictures = shapes[labels] + 1.5 * torch.randn(512, 64, generator=generator)
    return DataLoader(TensorDataset(pictures, labels), batch_size=32)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


class Loop:
    """Two micro-batches a step, clipped, with a schedule, and saved and loaded by accelerate."""

    def __init__(self, steps: int = 64) -> None:
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        self.model, self.data = self.accelerator.prepare(network(), digits())
        optimizer = nestopt.optimizer(self.model, "muon", lr=0.02, rest={"stack": "adamw", "lr": 3e-3})
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
        self.optimizer, self.schedule = self.accelerator.prepare(optimizer, schedule)

    def loss(self, pictures: Tensor, labels: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.model(pictures), labels)

    def epoch(self) -> list[float]:
        losses = []
        for pictures, labels in self.data:
            with self.accelerator.accumulate(self.model):
                loss = self.loss(pictures, labels)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.optimizer.step()
                self.schedule.step()
                self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses


def main() -> None:
    loop = Loop()
    losses = [loss for _ in range(7) for loss in loop.epoch()]
    with tempfile.TemporaryDirectory() as folder:
        loop.accelerator.save_state(folder)
        again = Loop()
        again.accelerator.load_state(folder)
    same = again.epoch() == loop.epoch()
    print(f"loss {losses[0]:.3f}, then {losses[-1]:.4f}; resumed, the same losses: {same}")


if __name__ == "__main__":
    main()
