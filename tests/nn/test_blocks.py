"""A memory in the places of other modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nestopt.levels import attention, deltanet, gated_deltanet, titans
from nestopt.nn import MemoryAttention, MemoryBlock, SequenceMemory
from tests.nn.tools import F64, same


def test_a_block_is_a_residual_around_a_normed_memory() -> None:
    block = MemoryBlock(titans(chunk=4), 8, 2, conv=2).double()
    x = torch.randn(2, 6, 8, dtype=F64)
    true = x + block.memory(F.rms_norm(x, (8,), block.norm.weight, block.norm.eps))[0]
    same(block(x), true)
    assert block.memory.conv is not None
    assert block.memory.conv.kernel_size == (2,)


def test_blocks_stand_in_a_sequential_and_learn() -> None:
    model = nn.Sequential(MemoryBlock(gated_deltanet(), 8, 2), MemoryBlock(titans(), 8, 2), nn.Linear(8, 3))
    y = model(torch.randn(2, 5, 8))
    y.square().sum().backward()
    assert y.shape == (2, 5, 3)
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())


def attention_like(**options: object) -> MemoryAttention:
    return MemoryAttention(8, 2, level=deltanet(), **options).double()  # type: ignore[arg-type]


def test_it_is_called_as_multihead_attention_is() -> None:
    module = attention_like()
    x = torch.randn(2, 5, 8, dtype=F64)
    true, _ = module.memory(x)
    y, weights = module(x, x, x)
    same(y, true)
    assert weights is None
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    floats = nn.Transformer.generate_square_subsequent_mask(5)
    for mask in (causal, floats, floats.expand(4, 5, 5)):
        same(module(x, x, x, attn_mask=mask)[0], true)
        same(module(x, x, x, need_weights=False, attn_mask=mask, is_causal=True)[0], true)
    first = attention_like(batch_first=False)
    first.load_state_dict(module.state_dict())
    same(first(x.transpose(0, 1))[0], true.transpose(0, 1))


def test_padding_is_as_in_multihead_attention() -> None:
    module = attention_like()
    x = torch.randn(2, 5, 8, dtype=F64)
    padding = torch.tensor([[False] * 5, [True, True, False, False, True]])
    y, _ = module(x, x, x, key_padding_mask=padding)
    same(y[1, 2:4], module(x[1:, 2:4])[0][0])
    floats = torch.zeros(2, 5, dtype=F64).masked_fill(padding, -torch.inf)
    same(module(x, key_padding_mask=floats)[0], y)


def test_its_state_goes_in_and_comes_out() -> None:
    module = attention_like()
    x = torch.randn(2, 5, 8, dtype=F64)
    first, _, state = module(x[:, :3], use_state=True)
    second, _ = module(x[:, 3:], state=state)
    same(torch.cat([first, second], 1), module(x)[0])


def test_says_what_it_can_not_do() -> None:
    module = attention_like()
    x = torch.randn(2, 5, 8, dtype=F64)
    with pytest.raises(ValueError, match="key is another tensor than query"):
        module(x, x.clone(), x)
    with pytest.raises(ValueError, match="value is another tensor than query"):
        module(x, x, x + 1)
    with pytest.raises(ValueError, match=r"query has the shape \[5, 8\].*\[batch, tokens, width\]"):
        module(x[0])
    with pytest.raises(ValueError, match="attn_mask is not the causal mask"):
        module(x, attn_mask=torch.zeros(5, 5, dtype=torch.bool))
    alibi = nn.Transformer.generate_square_subsequent_mask(5) - torch.ones(5, 5).tril(-1)
    with pytest.raises(ValueError, match="attn_mask is not the causal mask"):
        module(x, attn_mask=alibi)
    with pytest.raises(ValueError, match=r"attn_mask has the shape \[4, 4\].*\[5, 5\]"):
        module(x, attn_mask=torch.zeros(4, 4), is_causal=True)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_it_replaces_the_attention_of_an_encoder_layer(norm_first: bool, training: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first).double()
    layer.self_attn = MemoryAttention(8, 2, level=titans()).double()  # type: ignore[assignment]
    layer.train(training)
    x, mask = torch.randn(2, 5, 8, dtype=F64), nn.Transformer.generate_square_subsequent_mask(5, dtype=F64)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])

    def feed(z: torch.Tensor) -> torch.Tensor:
        return layer.linear2(F.relu(layer.linear1(z)))

    with torch.set_grad_enabled(training):
        floats = torch.zeros(2, 5, dtype=F64).masked_fill(padding, -torch.inf)
        y = layer(x, src_mask=mask, src_key_padding_mask=floats, is_causal=True)
        mixed = layer.self_attn.memory(layer.norm1(x) if norm_first else x, mask=~padding)[0]
        h = x + mixed
        true = h + feed(layer.norm2(h)) if norm_first else layer.norm2(layer.norm1(h) + feed(layer.norm1(h)))
    same(y, true)


@pytest.mark.parametrize("norm_first", [True, False])
def test_it_runs_in_a_whole_encoder_without_grad(norm_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm_first)
    layer.self_attn = MemoryAttention(8, 2, level=attention())  # type: ignore[assignment]
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(2, 5, 8), nn.Transformer.generate_square_subsequent_mask(5)
    with torch.no_grad():
        y = encoder(x, mask=mask)
        changed = encoder(x.index_fill(1, torch.tensor([4]), 1.0), mask=mask)
        unmasked = encoder(x, src_key_padding_mask=torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(changed[:, :4], y[:, :4])
    torch.testing.assert_close(unmasked, y)
    assert isinstance(encoder.layers[1].self_attn.memory, SequenceMemory)
