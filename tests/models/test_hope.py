from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestopt.core import Level
from nestopt.core.memories import Window
from nestopt.core.tree import leaves, nested
from nestopt.levels import attention, cms, deltanet, linear_attention, titans
from nestopt.models import HopeLM

MIXERS = {
    "attention": attention(),
    "window": attention(memory=Window(4)),
    "linear_attention": linear_attention(),
    "deltanet": deltanet(),
    "titans": titans(),
    "titans, chunks": titans(chunk=4, read="chunk"),
}


def make(mixer: Level, **options: object) -> HopeLM:
    return HopeLM(**{"vocab": 11, "dim": 8, "blocks": 2, "heads": 2, "mixer": mixer, **options})  # type: ignore[arg-type]


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("name", MIXERS)
def test_streaming_is_parallel(name: str, dtype: torch.dtype, error: float) -> None:
    model = make(MIXERS[name]).to(dtype)
    tokens = torch.randint(11, (2, 8))
    whole, end = model(tokens)
    state, pieces = model.init_state(2), []
    for piece in tokens.split([1, 1, 4, 2], dim=1):
        logits, state = model(piece, state)
        pieces.append(logits)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=error, atol=error)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=error, atol=error)


@pytest.mark.parametrize("name", MIXERS)
def test_no_token_sees_a_later_one_and_sequences_do_not_meet(name: str) -> None:
    model = make(MIXERS[name]).double()
    tokens = torch.randint(10, (2, 7))
    other = tokens.clone()
    other[0, 4] = 10
    other[1] += 1
    before, after = model(tokens)[0], model(other)[0]
    torch.testing.assert_close(after[0, :4], before[0, :4], rtol=0, atol=1e-12)
    assert not torch.isclose(after[0, 4], before[0, 4]).any()
    assert not torch.isclose(after[0, 6], before[0, 6]).any()  # it still knows


@pytest.mark.parametrize("name", MIXERS)
def test_every_parameter_gets_a_gradient_as_it_starts(name: str) -> None:
    model = make(MIXERS[name], mlp=cms(periods=(1, 4))).double()
    tokens = torch.arange(12).reshape(2, 6) % 11
    logits, _ = model(tokens)
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    dead = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any(dim=-1).all()]
    assert dead == []


def test_is_made_of_what_it_is_told() -> None:
    model = make(deltanet(), blocks=3, mlp=cms(periods=(1, 4)), conv=2)
    assert [block.mixer.level for block in model.blocks] == [deltanet()] * 3
    assert [block.mlp.level.periods for block in model.blocks] == [(1, 4)] * 3
    assert model.blocks[0].mixer.conv.weight.shape == (8, 1, 2)
    assert make(attention(), conv=0).blocks[0].mixer.conv is None
    assert isinstance(HopeLM().blocks[0].mixer.level, attention)


def test_its_first_guess_is_nearly_even() -> None:
    tokens = torch.randint(256, (4, 64))
    logits, _ = HopeLM()(tokens[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), rel=0.1)


@pytest.mark.parametrize("name", MIXERS)
def test_generating_is_guessing_from_the_whole_again_and_again(name: str) -> None:
    model = make(MIXERS[name]).double()
    prompt = torch.randint(11, (2, 3))
    tokens = prompt
    for _ in range(5):
        tokens = torch.cat([tokens, greedy(model(tokens)[0][:, -1])[:, None]], 1)
    made, _ = model.generate(prompt, 5, greedy)
    assert made.tolist() == tokens.tolist()
    assert model.generate(prompt, 0, greedy)[0].tolist() == prompt.tolist()


@pytest.mark.parametrize("name", MIXERS)
def test_a_state_survives_a_flat_file(name: str) -> None:
    model = make(MIXERS[name])
    tokens = torch.randint(11, (2, 5))
    _, state = model(tokens)
    again, _ = model(tokens, nested(dict(leaves(state))))
    torch.testing.assert_close(again, model(tokens, state)[0], rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_tokens_may_be_any_integers(dtype: torch.dtype) -> None:
    model = make(attention())
    tokens = torch.randint(11, (1, 4))
    torch.testing.assert_close(model(tokens.to(dtype)), model(tokens))


@pytest.mark.parametrize(
    ("tokens", "error", "message"),
    [
        (torch.zeros(1, 3), TypeError, "float32"),
        (torch.zeros(1, 3, dtype=torch.bool), TypeError, "bool"),
        (torch.tensor([[0, 11]]), ValueError, "from 0 to 11 are given; they must be from 0 to 10"),
        (torch.tensor([[-1, 3]]), ValueError, "from -1 to 3"),
        (torch.zeros(1, 0, dtype=torch.int64), ValueError, r"shape \[1, 0\]"),
        (torch.zeros(3, dtype=torch.int64), ValueError, r"shape \[3\]"),
    ],
)
def test_says_what_is_wrong_with_tokens(tokens: Tensor, error: type[Exception], message: str) -> None:
    model = make(attention())
    with pytest.raises(error, match=message):
        model(tokens)
    with pytest.raises(error, match=message):
        model.generate(tokens, 1, greedy)


def test_says_what_else_is_wrong() -> None:
    model, tokens = make(attention()), torch.zeros(2, 3, dtype=torch.int64)
    _, state = model(tokens)
    with pytest.raises(ValueError, match=r"HopeLM: state\['block_0'\]\['mixer'\]\['conv'\] is of a batch of 2"):
        model(tokens[:1], state)
    with pytest.raises(ValueError, match="another layer"):
        make(deltanet())(tokens, state)
    with pytest.raises(ValueError, match="length=-1"):
        model.generate(tokens, -1, greedy)
    with pytest.raises(ValueError, match="blocks=0"):
        HopeLM(blocks=0)
    with pytest.raises(ValueError, match="heads=3 does not divide dim=128"):
        HopeLM(heads=3)


@pytest.mark.parametrize("name", MIXERS)
def test_short_floats_are_near_long_ones(name: str) -> None:
    # of the whole: a normalised read that is nearly 0 by cancellation has no digits of its own to keep
    model, tokens = make(MIXERS[name], dim=32), torch.randint(11, (4, 12))
    true, _ = model(tokens)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first, state = model(tokens[:, :4])
        second, _ = model(tokens[:, 4:], state)
    assert (torch.cat([first, second], 1).float() - true).norm() < 0.05 * true.norm()
    short, _ = model.bfloat16()(tokens)
    assert (short.float() - true).norm() < 0.05 * true.norm()
