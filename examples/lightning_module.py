"""nestopt in a `LightningModule`: `configure_optimizers` is all that changes. Needs lightning."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import nestopt


def digits() -> DataLoader:
    """Noisy pictures of ten random shapes, and which shape each is."""
    generator = torch.Generator().manual_seed(0)
    shapes = torch.randn(10, 64, generator=generator)
    labels = torch.randint(10, (512,), generator=generator)
    pictures = shapes[labels] + 1.5 * torch.randn(512, 64, generator=generator)
    return DataLoader(TensorDataset(pictures, labels), batch_size=64)


class Classifier(L.LightningModule):
    def __init__(self, steps: int = 80) -> None:
        super().__init__()
        self.steps = steps
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        pictures, labels = batch
        loss = nn.functional.cross_entropy(self.net(pictures), labels)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = nestopt.optimizer(self, "muon", lr=0.02, rest={"stack": "adamw", "lr": 3e-3})
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(steps: int = 80, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return L.Trainer(max_steps=steps, accelerator="cpu", **quiet, **options)


def main() -> None:
    L.seed_everything(0)
    model = Classifier()
    trainer(enable_checkpointing=False).fit(model, digits())
    print(f"loss {model.losses[0]:.3f}, then {model.losses[-1]:.4f}")


if __name__ == "__main__":
    main()
