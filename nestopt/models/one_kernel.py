"""What an accelerator does in one kernel, and torch on meta tensors in many."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_HALF = (torch.bfloat16, torch.float16)
_aten = torch.ops.aten
_present = False


@contextlib.contextmanager
def one_kernel() -> Iterator[None]:
    """Take attention and RMSNorm on meta tensors in one kernel each, as on CUDA. Torch itself spells both out there."""
    global _present  # noqa: PLW0603  # torch has one table of kernels
    if _present:
        yield
        return
    _present = True
    try:
        with torch.library._scoped_library("aten", "IMPL") as kernels:
            # before autograd, as where torch chooses among its own
            kernels.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
            kernels.impl("rms_norm", _rms_norm, "AutogradMeta")
            yield
    finally:
        _present = False


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """As CUDA chooses: FlashAttention for short numbers without a mask, else the memory-efficient kernel."""
    if enable_gqa:
        heads = query.shape[-3] // key.shape[-3]
        key, value = (x.repeat_interleave(heads, dim=-3) for x in (key, value))
    if attn_mask is None and query.dtype in _HALF:
        flash = _aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient, learns = _aten._scaled_dot_product_efficient_attention, torch.is_grad_enabled()
    return efficient(query, key, value, attn_mask, learns, dropout_p, is_causal, scale=scale)[0]


def _rms_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None
) -> Tensor:
    """LayerNorm without a bias, whose kernels read and write what RMSNorm's do, and a mean for each row."""
    if weight is not None and weight.dtype != input.dtype:  # torch spells it out on CUDA, too
        return _aten.rms_norm.default.decompose(input, normalized_shape, weight, eps)
    return torch.layer_norm(input, normalized_shape, weight, None, eps or 1e-6)
