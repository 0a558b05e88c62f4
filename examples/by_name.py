"""A loop that has its optimizer by name from a file, as torchtune's and torchtitan's do, and their DCP checkpoints."""

import importlib
import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

ADAMW = """
_component_: nestopt.optim.AdamW  # was: torch.optim.AdamW
lr: 0.01
weight_decay: 0.1
"""

STACK = """
_component_: nestopt.optim.Nested  # any stack of levels that takes any parameter
stack: [momentum, {level: adam, period: 2}]
lr: 0.003
"""

ROUTED = """
_component_: nestopt.optimizer  # hidden matrices to muon, the rest to adamw: it asks for names, and so for the model
spec: muon
lr: 0.02
rest: {stack: adamw, lr: 0.003}
"""

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)


def instantiate(text: str, model: nn.Module) -> torch.optim.Optimizer:
    """What these frameworks do with such a section: the callable of that name, with the parameters."""
    section: dict[str, Any] = yaml.safe_load(text)
    module, _, name = section.pop("_component_").rpartition(".")
    component = getattr(importlib.import_module(module), name)
    return component(model if name == "optimizer" else model.parameters(), **section)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def digits(steps: Iterable[int]) -> Iterable[tuple[Tensor, Tensor]]:
    """Noisy pictures of ten random shapes, and which shape each is; a step's are made from its number."""
    shapes = torch.randn(10, 64, generator=torch.Generator().manual_seed(0))
    for step in steps:
        generator = torch.Generator().manual_seed(step + 1)
        labels = torch.randint(10, (64,), generator=generator)
        yield shapes[labels] + 1.5 * torch.randn(64, 64, generator=generator), labels


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: Iterable[int]) -> list[float]:
    losses = []
    for pictures, labels in digits(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(pictures), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    weights, states = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": weights, "optimizer": states}


def save(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    dcp.save(state(model, optimizer), checkpoint_id=folder)


def load(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str) -> None:
    found = state(model, optimizer)
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"], options=OPTIONS
    )


def main() -> None:
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # of DCP, in one process
    for name, text in (("AdamW", ADAMW), ("stack", STACK), ("routed", ROUTED)):
        model = network()
        optimizer = instantiate(text, model)
        losses = train(model, optimizer, range(30))
        with tempfile.TemporaryDirectory() as folder:
            save(model, optimizer, folder)
            again = network()
            resumed = instantiate(text, again)
            load(again, resumed, folder)
        losses += train(model, optimizer, range(30, 60))
        same = train(again, resumed, range(30, 60)) == losses[30:]
        print(f"{name}: loss {losses[0]:.3f}, then {losses[-1]:.3f}; resumed, the same losses: {same}")


if __name__ == "__main__":
    main()
