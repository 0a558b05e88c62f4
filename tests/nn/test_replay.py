from __future__ import annotations

import pytest
import torch

from nestopt.nn import Replay


def numbered(start: int, n: int, batch: int = 3) -> torch.Tensor:
    return torch.arange(start, start + n, dtype=torch.float32).expand(batch, n)[..., None].repeat(1, 1, 2)


def test_it_keeps_all_until_it_is_full_and_never_more() -> None:
    replay = Replay(10)
    for i in range(5):
        replay.add(numbered(2 * i, 2))
    assert replay.vectors()[1, :, 0].tolist() == list(range(10))
    replay.add(numbered(10, 100))
    kept = replay.vectors()
    assert kept.shape == (3, 10, 2)
    assert len(replay) == 10
    assert kept.unique().numel() > 10  # each sequence has a choice of its own
    for row in kept[..., 0]:
        assert len(set(row.tolist())) == 10
        assert row.max() > 9


@pytest.mark.parametrize("piece", [1, 7, 400])
def test_each_vector_is_kept_as_often_as_any_other(piece: int) -> None:
    batch, total, size = 4000, 40, 8
    replay = Replay(size, seed=1)
    for first in range(0, total, piece):
        replay.add(numbered(first, min(piece, total - first), batch))
    counts = torch.bincount(replay.vectors()[..., 0].long().flatten(), minlength=total).double()
    wanted = batch * size / total
    assert ((counts - wanted).abs() < 5 * (wanted * (1 - size / total)) ** 0.5).all()


def test_it_goes_on_as_if_it_had_not_stopped() -> None:
    one, other = Replay(5), Replay(5, seed=9)
    one.add(numbered(0, 20))
    other.load_state_dict(one.state_dict())
    for replay in (one, other):
        replay.add(numbered(20, 30))
    assert one.vectors().equal(other.vectors())
    fresh = Replay(5)
    fresh.load_state_dict(Replay(5).state_dict())
    assert len(fresh) == 0
    with pytest.raises(ValueError, match="size=5"):
        Replay(4).load_state_dict(one.state_dict())


def test_it_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="size=0"):
        Replay(0)
    replay = Replay(4)
    replay.add(numbered(0, 2))
    with pytest.raises(ValueError, match=r"\[3, n, 2\]"):
        replay.add(numbered(0, 2, batch=2))
