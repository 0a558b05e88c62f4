"""What delta gradient descent costs the network that it trains: it needs the inputs of layers, and captures them."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

import nestopt
from benchmarks.rows import Missing
from benchmarks.timing import Call, failure
from benchmarks.work import FLOAT

LR = 1e-3
PLAIN = "forward and backward"
SGD_STEP = "step of torch SGD fused"
MODES = {"corrected": "nestopt dgd", "paper": "nestopt dgd, mode='paper'"}


def captured(mode: str) -> str:
    return f"forward and backward, {MODES[mode]} captures"


def stepped(mode: str) -> str:
    return f"step of {MODES[mode]}"


@dataclasses.dataclass(frozen=True)
class Size:
    width: int = 384
    layers: int = 4
    tokens: int = 1024


TINY = Size(16, 2, 8)


class Block(nn.Module):
    """The MLP of a GPT block: norm, four times as wide, GELU, back, residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


class Task:
    """A stack of blocks with data to run them on."""

    def __init__(self, size: Size) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.model = nn.Sequential(*(Block(size.width) for _ in range(size.layers)))
            self.x = torch.randn(size.tokens, size.width)
        self.owner: object = None

    def clear(self) -> None:
        """Drop the gradients, as a loop does between steps."""
        self.model.zero_grad(set_to_none=True)

    def forward_backward(self) -> None:
        self.model(self.x).square().mean().backward()

    def renew(self) -> None:
        """New gradients, and inputs where they are captured."""
        self.clear()
        self.forward_backward()


def calls(size: Size) -> tuple[dict[str, Call], dict[str, str]]:
    """Candidates by name, and those that can't be had with the reason."""
    plain, sgd_task = Task(size), Task(size)
    sgd = torch.optim.SGD(sgd_task.model.parameters(), lr=LR, fused=True)
    found = {
        PLAIN: Call(plain.forward_backward, plain.clear),
        SGD_STEP: Call(sgd.step, sgd_task.renew),
    }
    problems = {}
    for mode in MODES:
        try:
            capturing, watching = dgd(size, mode)
            stepping, optimizer = dgd(size, mode)
        except Missing as error:
            problems[captured(mode)] = str(error)
        except Exception as error:
            problems[captured(mode)] = failure(error)
        else:
            capturing.owner = watching  # hooks of an optimizer that is gone may be gone, too
            found[captured(mode)] = Call(capturing.forward_backward, capturing.clear)
            found[stepped(mode)] = Call(optimizer.step, stepping.renew)
    return found, problems


def dgd(size: Size, mode: str) -> tuple[Task, nestopt.optim.Nested]:
    """A task whose optimizer captures inputs.

    Raises:
        Missing: there is no level `dgd`.
        RuntimeError: it steps as plain gradient descent does, so nothing was captured and its time would say nothing.
    """
    try:
        level = nestopt.levels.dgd(mode=mode)
    except AttributeError as error:
        raise Missing(f"not there: {error}") from None
    task = Task(size)
    matrices = [layer.weight for block in task.model for layer in (block.up, block.down)]
    vectors = [param for param in task.model.parameters() if param.ndim < 2]
    optimizer = nestopt.optim.Nested([{"params": matrices, "stack": level}, {"params": vectors}], lr=1.0)
    optimizer.watch(task.model)
    task.forward_backward()
    weights = [block.up.weight for block in task.model]
    plain = [(weight - weight.grad).detach() for weight in weights]
    optimizer.step()
    for group in optimizer.param_groups:
        group["lr"] = LR
    # what the inputs say moves weights by a percent at that rate, rounding by 1e-7
    if any(
        (weight - other).abs().max() < 1e-6 * other.abs().max() for weight, other in zip(weights, plain, strict=True)
    ):
        raise RuntimeError("dgd steps as gd does: the inputs were not captured")
    return task, optimizer


def flops(size: Size) -> dict[str, float]:
    """Of matrix products and solutions: forward, gradients of the weights, and of all inputs but the first.

    What mode="paper" captures is one more product of each weight's shape; what the other does, rows' products with each
    other where there are more rows than inputs. Its step solves systems of the smaller of both.
    """
    wide, tokens = 4 * size.width, size.tokens
    product = 2 * tokens * wide * size.width
    # the input of the first block reaches the loss through the norm's weights too, so its gradient is needed
    everything = 3 * 2 * size.layers * product
    capture = step = 0.0
    for out, into in ((wide, size.width), (size.width, wide)):
        if tokens < into:  # the rows X are kept: u - u Xᵀ (I + X Xᵀ)⁻¹ X
            step += 2 * into * tokens**2 + tokens**3 / 3 + 4 * out * into * tokens + 2 * out * tokens**2
        else:
            capture += 2 * tokens * into**2
            step += into**3 / 3 + 2 * out * into**2
    return {
        PLAIN: everything,
        captured("paper"): everything + 2 * size.layers * product,
        captured("corrected"): everything + size.layers * capture,
        stepped("corrected"): size.layers * step,
    }


def step_bytes(size: Size) -> dict[str, float]:
    """Of a step: parameter and gradient, and in mode="paper" the layers' products of weight and inputs."""
    entries = size.layers * (8 * size.width**2 + 7 * size.width)
    matrices = size.layers * 8 * size.width**2
    return {SGD_STEP: 3 * FLOAT * entries, stepped("paper"): FLOAT * (3 * entries + matrices)}
