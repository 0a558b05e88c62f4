"""The Hope block: a mixer of tokens, then a continuum of MLPs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor, nn

from nestopt.core.level import Level
from nestopt.core.precision import Precision
from nestopt.core.tree import State
from nestopt.levels.continuum.level import Cms
from nestopt.levels.presets import Attention
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.nn.cms import CMS
from nestopt.nn.factory import mixer as make_mixer

T = TypeVar("T")

Learn = bool | Literal["mixer", "mlp"]
"""What writes its memories: all, nothing, or one of a block's two halves."""


class HopeBlock(nn.Module):
    r"""A mixer, then a continuum of MLPs, which has its own norms and residuals (NL eq. 94-97).

    $x \leftarrow x + \mathrm{mixer}(\mathrm{norm}(x))$, then $x \leftarrow \mathrm{mlp}(x)$.

    Args:
        dim: width of the tokens.
        heads: of the mixer.
        mixer: any level on tokens. Default `self_modifying`.
        mlp: the continuum. Default one MLP, on the fastest clock, which is a Transformer's.
        precision: of the products of both, as of a `SequenceMemory`.
        options: other arguments of the mixer's `SequenceMemory` or `TitansMixer`.
    """

    def __init__(
        self,
        dim: int,
        heads: int = 4,
        mixer: Level | None = None,
        mlp: Cms | None = None,
        *,
        precision: Precision = "float32",
        **options: Any,
    ) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.mixer = make_mixer(SelfModifying() if mixer is None else mixer, dim, heads, precision=precision, **options)
        self.mlp = CMS(dim, Cms(periods=(1,)) if mlp is None else mlp, precision=precision)

    def init_state(self, batch: int) -> State:
        """Return the state of `batch` sequences before their first token."""
        return {"mixer": self.mixer.init_state(batch), "mlp": self.mlp.init_state(batch)}

    def forward(
        self,
        x: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        learn: Learn = True,
    ) -> tuple[Tensor, State]:
        """Run tokens `[B, T, dim]` through the block: as many, and the state after the last.

        Args:
            x: tokens.
            state: from a former call; None begins new sequences.
            mask: `[B, T]`, True for tokens, False for padding.
            learn: whether memories are written: all, none, the `"mixer"` only, or the `"mlp"` only.
        """
        state = self.init_state(x.shape[0]) if state is None else state
        x, mixer = self.mixed(x, state["mixer"], mask=mask, learn=learn)
        x, mlp = self.mlp(x, state["mlp"], mask=mask, learn=writes(learn, "mlp"))
        return x, {"mixer": mixer, "mlp": mlp}

    def mixed(
        self, x: Tensor, state: Mapping[str, Any], *, mask: Tensor | None = None, learn: Learn = True
    ) -> tuple[Tensor, State]:
        r"""Return the first half: $x + \mathrm{mixer}(\mathrm{norm}(x))$, and the mixer's state."""
        y, mixer = self.mixer(self.norm(x), state, mask=mask, learn=writes(learn, "mixer"))
        return x + y, mixer


class HopeAttentionBlock(HopeBlock):
    """A `HopeBlock` whose mixer is softmax attention (NL sec. 8.3, Hope-Attention).

    Args:
        dim: width of the tokens.
        heads: of the attention.
        mlp: the continuum. Default one MLP, on the fastest clock, which makes it a Transformer's block.
        options: other arguments of the mixer's `SequenceMemory`, and `precision`.
    """

    def __init__(self, dim: int, heads: int = 4, mlp: Cms | None = None, **options: Any) -> None:
        super().__init__(dim, heads, Attention(), mlp, **options)


def to_the_last(mlps: Sequence[T], blocks: int) -> list[T]:
    """Return one for each block: the last has the last, and where there are fewer the first comes again and again."""
    last = list(mlps)[-blocks:]
    return [mlps[0]] * (blocks - len(last)) + last


def writes(learn: Learn, half: Literal["mixer", "mlp"]) -> bool:
    """Return whether `learn` lets this half of a block write."""
    if learn not in (True, False, "mixer", "mlp"):
        raise ValueError(f'learn={learn!r} is not allowed; give True, False, "mixer" or "mlp"')
    return learn is True or learn == half
