"""One token of a layer as a program of its own: `torch.export`, for a machine that has torch and not nestopt."""

from typing import Any

import torch
from torch import Tensor, nn

import nestopt


class Step(nn.Module):
    """`layer.step`: a token of each sequence and the state, to what the layer answers and the state after it."""

    def __init__(self, layer: nestopt.nn.SequenceMemory) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        return self.layer.step(x, state)


def export(layer: nestopt.nn.SequenceMemory, batch: int = 1) -> torch.export.ExportedProgram:
    """Export the step of a layer whose state keeps its shape: matrix memories, and deep ones with `chunk=1`.

    Raises:
        ValueError: the state of this layer grows, as that of attention and of chunks does.
    """
    with torch.no_grad():
        state, x = layer.init_state(batch), torch.zeros(batch, layer.dim)
        _, after = layer.step(x, state)
        shapes = [[leaf.shape for leaf in torch.utils._pytree.tree_leaves(tree)] for tree in (state, after)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{layer.level.label}: its state grows from token to token; give chunk=1, or another level"
            )
        return torch.export.export(Step(layer.eval()), (x, state))


def main() -> None:
    torch.manual_seed(0)
    for level in ("gated_deltanet", {"level": "titans", "chunk": 1}):
        layer = nestopt.layer(level, dim=32, heads=4)
        torch.export.save(export(layer), "step.pt2")

        program = torch.export.load("step.pt2").module()  # nothing of nestopt's from here on
        x, state, answers = torch.randn(1, 10, 32), layer.init_state(1), []
        with torch.no_grad():
            for token in x.unbind(1):
                y, state = program(token, state)
                answers.append(y)
            whole, _ = layer(x)
        apart = (torch.stack(answers, 1) - whole).abs().max()
        print(f"{layer.level.label}: token by token from the file, differs by at most {apart:.0e}")


if __name__ == "__main__":
    main()
