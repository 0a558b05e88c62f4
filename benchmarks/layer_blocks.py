"""The blocks of a transformer, which the layers are to be held against."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import layer_flops as flops
from benchmarks.layer_rows import Layer, Row, tokens
from benchmarks.layer_size import Size

ATTENTION, MLP = "attention block", "mlp block"


def rows() -> list[Row]:
    return [Row(ATTENTION, _attention, flops.attention), Row(MLP, _mlp, flops.mlp)]


@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values `[B, H, room, D/H]`, of which the first `length` are there."""

    keys: Tensor
    values: Tensor
    length: int


class AttentionBlock(nn.Module):
    """x + out(causal attention(qkv(norm(x))))."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(x)
        return self._joined(x, F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def stream(self, x: Tensor, cache: Cache) -> tuple[Tensor, Cache]:
        """One token after those in the cache, into which it is written: nothing is copied as the cache grows."""
        q, k, v = self._heads(x)
        end = cache.length + x.shape[1]
        cache.keys[:, :, cache.length : end], cache.values[:, :, cache.length : end] = k, v
        y = F.scaled_dot_product_attention(q, cache.keys[:, :, :end], cache.values[:, :, :end])
        return self._joined(x, y), Cache(cache.keys, cache.values, end)

    def _heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    def _joined(self, x: Tensor, y: Tensor) -> Tensor:
        return x + self.out(y.transpose(1, 2).flatten(-2))


class MlpBlock(nn.Sequential):
    """x + MLP(norm(x)), D → 4D → D."""

    def __init__(self, dim: int) -> None:
        super().__init__(nn.LayerNorm(dim), nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def _attention(size: Size) -> Layer:
    block = AttentionBlock(size.dim, size.heads)

    def jump(batch: int, position: int) -> Cache:
        pairs = torch.randn(2, batch, size.heads, position + size.chunk, size.dim // size.heads)
        return Cache(*pairs, position)

    return Layer(block, block, [tokens(size)], stream=block.stream, jump=jump)


def _mlp(size: Size) -> Layer:
    block = MlpBlock(size.dim)
    return Layer(block, block, [tokens(size)], stream=lambda x, state: (block(x), state))
