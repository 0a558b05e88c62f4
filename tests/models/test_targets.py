"""A model that is given targets of its own for each token, and taught by their loss, against a loop over tokens."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nestopt.core.tree import leaves
from nestopt.levels import deltanet
from tests.models.test_loss_signal import Slow, make, some, taught


class Told(Slow):
    """One sequence; a position is taught the loss of its target once it is read."""

    def loss(self, logits: Tensor, token: int | list[int]) -> Tensor:
        given, p = torch.tensor(token), logits[0]
        if given.ndim == 0:
            return p.logsumexp(-1) - p[token] if token != -100 else 0 * p.sum()
        if given[0] == -100:
            return 0 * p.sum()
        return torch.stack([(p[i].exp() + 1).log() - p[i] * given[i] for i in range(len(given))]).sum()

    def told(self, token: int, target: int | list[int]) -> Tensor:
        logits = self.read(token)
        self.observe(target)  # type: ignore[arg-type]
        self.waiting = None
        return logits


def classes(batch: int = 2, length: int = 12) -> Tensor:
    targets = some(batch, length, seed=5)
    targets[:, 3::4] = -100
    return targets


def several(batch: int = 2, length: int = 12) -> Tensor:
    targets = torch.randint(2, (batch, length, 11), generator=torch.Generator().manual_seed(2))
    targets[:, 3::4] = -100
    return targets


@pytest.mark.parametrize("periods", [(1,), (3, 5), (4, 2)])
@pytest.mark.parametrize("targets", [classes(), several()], ids=["classes", "several"])
def test_a_loss_of_any_kind_teaches(targets: Tensor, periods: tuple[int, ...]) -> None:
    model, tokens = make(mlp=taught(periods)), some(2, 12)
    rows = zip(tokens.tolist(), targets.tolist(), strict=True)
    slow = [[s.told(t, y) for t, y in zip(*row, strict=True)] for row in rows if (s := Told(model))]
    fast, _ = model(tokens, targets=targets)
    torch.testing.assert_close(fast, torch.stack([torch.stack(row) for row in slow]), rtol=1e-10, atol=1e-10)
    assert not torch.isclose(model(tokens)[0][:, -1], fast[:, -1]).any()  # the next token teaches something else


@pytest.mark.parametrize("targets", [classes(), several()], ids=["classes", "several"])
def test_the_loss_is_that_of_the_targets_that_count(targets: Tensor) -> None:
    model, tokens = make(), some(2, 12)
    with torch.no_grad():
        logits, state = model(tokens, targets=targets)
        loss, end = model.loss(tokens, targets=targets, piece=5)
        total, _ = model.loss(tokens, targets=targets, reduction="sum")
    s = Told(model)
    each = [s.loss(p[None], y) for p, y in zip(logits.flatten(0, 1), targets.flatten(0, 1).tolist(), strict=True)]
    torch.testing.assert_close(total, torch.stack(each).sum(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, total / 18, rtol=1e-10, atol=1e-10)  # 6 of 24 are not counted
    torch.testing.assert_close(dict(leaves(end)), dict(leaves(state)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("targets", [classes(), several()], ids=["classes", "several"])
def test_pieces_padding_and_segments_are_the_whole(targets: Tensor) -> None:
    model, tokens = make(), some(2, 12)
    whole, end = model(tokens, targets=targets)
    first, state = model(tokens[:, :5], targets=targets[:, :5])
    second, state = model(tokens[:, 5:], state, targets=targets[:, 5:])
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=1e-10, atol=1e-10)

    place = torch.tensor([0, 1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13])  # two places are padding
    mask = torch.zeros(2, 14, dtype=torch.bool)
    mask[:, place] = True
    wide = torch.zeros(2, 14, dtype=torch.long)
    wide[:, place] = tokens
    told = torch.ones(2, 14, *targets.shape[2:], dtype=targets.dtype)
    told[:, place] = targets
    padded, _ = model(wide, mask=mask, targets=told)
    torch.testing.assert_close(padded[:, place], whole, rtol=1e-10, atol=1e-10)
    loss, _ = model.loss(wide, mask=mask, targets=told)
    torch.testing.assert_close(loss, model.loss(tokens, targets=targets)[0], rtol=1e-10, atol=1e-10)

    gradient = torch.autograd.grad(model.loss(tokens, targets=targets)[0], model.embedding.weight)
    model.segment = 5
    again, _ = model.loss(tokens, targets=targets)
    torch.testing.assert_close(again, loss, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.autograd.grad(again, model.embedding.weight), gradient, rtol=1e-8, atol=1e-10)


def test_next_tokens_and_targets_follow_each_other() -> None:
    """What is carried of text, whose next token comes with a task's first one, is taught that."""
    model, tokens, targets = make(mlp=taught((3,))), some(1, 12), classes(1)
    slow = Told(model)
    read = [slow.read(t) for t in tokens[0, :5].tolist()]
    read += [slow.told(t, y) for t, y in zip(tokens[0, 5:9].tolist(), targets[0, 5:9].tolist(), strict=True)]
    read += [slow.read(t) for t in tokens[0, 9:].tolist()]
    a, state = model(tokens[:, :5])
    b, state = model(tokens[:, 5:9], state, targets=targets[:, 5:9])
    c, _ = model(tokens[:, 9:], state)
    torch.testing.assert_close(torch.cat([a, b, c], 1)[0], torch.stack(read), rtol=1e-10, atol=1e-10)


def test_what_targets_can_not_be() -> None:
    model, tokens = make(), some(2, 12)
    for wrong in (classes()[:, 1:], several()[..., 1:], classes().double()):
        with pytest.raises(ValueError, match=r"give classes, integers \[2, 12\], or 1 for each"):
            model.loss(tokens, targets=wrong)
    starts = torch.zeros(2, 12, dtype=torch.bool)
    with pytest.raises(ValueError, match="rows of one text"):
        model(tokens, targets=classes(), starts=starts)
    model(tokens, targets=classes(), starts=starts, learn="mixer")
    unsigned = classes().clamp_min(0).to(torch.uint8)
    plain = make(mixer=deltanet())
    torch.testing.assert_close(plain.loss(tokens, targets=unsigned)[0], plain.loss(tokens, targets=unsigned.long())[0])
