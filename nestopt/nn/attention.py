"""A memory in the place of `torch.nn.MultiheadAttention`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.core.device import by_contract
from nestopt.core.level import Level
from nestopt.core.tree import State
from nestopt.nn.sequence_memory import SequenceMemory


class MemoryAttention(nn.Module):
    """A `SequenceMemory` that is called as `torch.nn.MultiheadAttention` is, for causal self-attention.

    In an `nn.TransformerEncoderLayer`, put it at `layer.self_attn`. Whatever its level, it is causal: a token is
    answered from itself and those before it, also where neither `attn_mask` nor `is_causal` asks for that.

    Args:
        embed_dim: width of the tokens.
        num_heads: memories side by side.
        level: any level but `cms`.
        batch_first: whether tokens are `[B, T, embed_dim]` (default), or `[T, B, embed_dim]`.
        options: other arguments of `SequenceMemory`.

    Attributes:
        memory: the `SequenceMemory`.
    """

    in_proj_bias = None
    """Torch's encoder layers look here, and at the next, for whether to run attention by a kernel of their own."""
    _qkv_same_embed_dim = False

    def __init__(
        self, embed_dim: int, num_heads: int, *, level: Level, batch_first: bool = True, **options: Any
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.batch_first = embed_dim, num_heads, batch_first
        self.memory = SequenceMemory(level, embed_dim, num_heads, **options)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
        *,
        state: Mapping[str, Any] | None = None,
        use_state: bool = False,
    ) -> tuple[Tensor, None] | tuple[Tensor, None, State]:
        """Answers to the tokens `query`, and None, for there are no weights to be given.

        Args:
            query: `[B, T, embed_dim]`, or `[T, B, embed_dim]` without `batch_first`.
            key, value: the same tensor as `query`, or None.
            key_padding_mask: `[B, T]`: True for padding, or floats, of which -inf is padding and all else a token.
            need_weights, average_attn_weights: change nothing.
            attn_mask: `[T, T]` or `[.., T, T]`, True or -inf where a token does not see another: it must be the causal
                one. That is checked, and waited for on a GPU, unless `is_causal` says so or torch is compiling.
            is_causal: `attn_mask` is the causal one, if it is given.
            state: from a former call, to go on with its sequences.
            use_state: also return the state after the last token.

        Raises:
            ValueError: for another key or value, a mask that is not causal or does not fit, or as `SequenceMemory`.
        """
        for name, other in (("key", key), ("value", value)):
            if other is not None and other is not query:
                raise ValueError(
                    f"MemoryAttention: {name} is another tensor than query; a memory attends to its own tokens, so "
                    f"give the same for all three (or leave {name} out)"
                )
        if query.ndim != 3:
            raise ValueError(
                f"MemoryAttention: query has the shape {list(query.shape)}; it must have 3 dimensions, "
                f"{'[batch, tokens, width]' if self.batch_first else '[tokens, batch, width]'}"
            )
        x = query if self.batch_first else query.transpose(0, 1)
        if attn_mask is not None:
            _check_causal(attn_mask, x.shape[1], is_causal)
        mask = None if key_padding_mask is None else ~_shut(key_padding_mask)
        y, new = self.memory(x, state, mask=mask)
        y = y if self.batch_first else y.transpose(0, 1)
        return (y, None, new) if use_state else (y, None)


def _shut(mask: Tensor) -> Tensor:
    """Return where a mask of bools or floats says that nothing is to be seen."""
    return mask if mask.dtype == torch.bool else mask == -torch.inf


def _check_causal(mask: Tensor, length: int, trusted: bool) -> None:
    if mask.shape[-2:] != (length, length):
        raise ValueError(
            f"MemoryAttention: attn_mask has the shape {list(mask.shape)}; for these tokens it must end in "
            f"{[length, length]}"
        )
    if trusted or torch.compiler.is_compiling():
        return
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    wrong = _shut(mask) != causal
    if mask.dtype != torch.bool:
        wrong = wrong | ~causal & (mask != 0)
    with by_contract("attn_mask"):
        differs = bool(wrong.any())
    if differs:
        raise ValueError(
            "MemoryAttention: attn_mask is not the causal mask; a memory is causal and can't leave out other tokens. "
            "Give nn.Transformer.generate_square_subsequent_mask, or None (padding goes in key_padding_mask)"
        )
