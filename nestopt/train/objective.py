"""What is trained for, as a module: engines wrap it, and hook into its call."""

from __future__ import annotations

from torch import Tensor, nn

from nestopt.models import HopeLM
from nestopt.nn.hope import Learn


class Objective(nn.Module):
    """The mean loss of a language model on windows of tokens.

    Args:
        lm: the model.
        learn: what writes its memories, as for `HopeLM.forward`.
    """

    def __init__(self, lm: HopeLM, learn: Learn = True) -> None:
        super().__init__()
        self.lm, self.learn = lm, learn

    def forward(self, tokens: Tensor) -> Tensor:
        """Tokens `[B, T + 1]` to the mean loss, in nats, of all but the first."""
        loss, _ = self.lm.loss(tokens, learn=self.learn)
        return loss
