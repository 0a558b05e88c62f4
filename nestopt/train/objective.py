"""What is trained for, as a module: engines wrap it, and hook into its call."""

from __future__ import annotations

from typing import Literal

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

    def forward(
        self,
        tokens: Tensor,
        starts: Tensor | None = None,
        scale: Tensor | None = None,
        targets: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss, in nats, of all tokens `[B, T + 1]` but the first, or of `targets`.

        Args:
            tokens: of windows.
            starts: `[B, T + 1]`, True where a document begins, whose first token is not counted either.
            scale: the sum of losses times this in the place of their mean, which is of as many as one batch counts.
            targets, mask: of a task's tokens `[B, T]`, as for `HopeLM.loss`.
        """
        reduction: Literal["mean", "sum"] = "mean" if scale is None else "sum"
        loss, _ = self.lm.loss(tokens, starts=starts, targets=targets, mask=mask, learn=self.learn, reduction=reduction)
        return loss if scale is None else loss * scale
