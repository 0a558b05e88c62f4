"""Blocks of a mixer and a continuum."""

from __future__ import annotations

import pytest
import torch

from nestopt.core.tree import leaves
from nestopt.levels import attention, cms, deltanet, self_modifying
from nestopt.nn import CMS, HopeAttentionBlock, HopeBlock, SelfModifyingTitans, SequenceMemory

LOCAL = cms(periods=(2, 3), learn="context", teach="local")


def tokens(seed: int = 0, length: int = 9) -> torch.Tensor:
    return torch.randn(2, length, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_block_is_its_two_halves() -> None:
    block = HopeBlock(8, 2, deltanet(), LOCAL).double()
    assert isinstance(block.mixer, SequenceMemory)
    assert isinstance(block.mlp, CMS)
    x = tokens()
    mixed, mixer = block.mixer(block.norm(x))
    y, mlp = block.mlp(x + mixed)
    found, state = block(x)
    torch.testing.assert_close(found, y, rtol=0, atol=0)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves({"mixer": mixer, "mlp": mlp})), rtol=0, atol=0)


def test_what_it_is_made_of_by_default() -> None:
    assert HopeBlock(8, 2).mixer.level == self_modifying()
    assert HopeBlock(8, 2).mlp.level == cms(periods=(1,))
    assert HopeAttentionBlock(8, 2, LOCAL).mixer.level == attention()
    assert HopeAttentionBlock(8, 2, LOCAL, conv=0).mixer.conv is None
    layer = SelfModifyingTitans(8, 2, self_modifying(chunk=4, projection_chunk=4), conv=0)
    assert layer.level == self_modifying(chunk=4, projection_chunk=4)
    assert SelfModifyingTitans(8, 2).level == self_modifying()


@pytest.mark.parametrize(
    "block", [HopeBlock(8, 2, self_modifying(chunk=2, projection_chunk=4), LOCAL), HopeAttentionBlock(8, 2, LOCAL)]
)
def test_two_calls_are_one(block: HopeBlock) -> None:
    block, x = block.double(), tokens()
    whole, _ = block(x)
    first, state = block(x[:, :4])
    second, _ = block(x[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)


def test_each_half_writes_when_it_is_told_to() -> None:
    block = HopeBlock(8, 2, deltanet(), LOCAL, conv=0).double()
    _, before = block(tokens())

    def changed(learn: object) -> set[str]:
        _, after = block(tokens(1), before, learn=learn)
        return {half for half in before if not _same(before[half], after[half])}

    assert changed(True) == {"mixer", "mlp"}
    assert changed("mixer") == {"mixer"}
    assert changed("mlp") == {"mlp"}
    assert changed(False) == set()
    with pytest.raises(ValueError, match="learn='mixers' is not allowed"):
        block(tokens(), learn="mixers")  # type: ignore[arg-type]


def _same(a: dict, b: dict) -> bool:  # type: ignore[type-arg]
    return all(x.equal(y) for (_, x), (_, y) in zip(leaves(a), leaves(b), strict=True))


def test_padding_is_not_read() -> None:
    block, x = HopeBlock(8, 2, deltanet(), LOCAL).double(), tokens()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, 6:] = False
    y, state = block(x, mask=mask)
    alone, own = block(x[:1, :6])
    torch.testing.assert_close(y[:1, :6], alone, rtol=1e-10, atol=1e-10)
    more = tokens(1)
    torch.testing.assert_close(block(more, state)[0][:1], block(more[:1], own)[0], rtol=1e-10, atol=1e-10)
