"""Softmax attention by torch's kernels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attend as `F.scaled_dot_product_attention`; of meta tensors, as that would on a GPU.

    torch takes tensors without data through the unfused formula, whose scores of every pair no GPU keeps: costs and
    memory that are counted so would be another computation's. They go through the operation that CUDA chooses: flash
    attention for 16 bits without a mask, else the one that is efficient with memory.

    Args:
        q: queries `[B, H, T, D]`.
        k, v: keys and values `[B, H, S, D]`.
        attn_mask: bool, True for a pair that is attended to; to be broadcast to `[B, H, T, S]`.
        is_causal: each query sees the keys up to its own place.
    """
    if q.device.type != "meta":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
    if attn_mask is None and q.dtype in (torch.float16, torch.bfloat16):
        return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]
    bias = None
    if attn_mask is not None:  # as CUDA makes it of a mask
        bias = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -torch.inf)
        bias = bias.expand(*q.shape[:3], k.shape[2])
    graph = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    return _aten._scaled_dot_product_efficient_attention(q, k, v, bias, graph, 0.0, is_causal)[0]
