import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.train.sampling import choose, distribution


def slow_distribution(logits: list[float], temperature: float, top_k: int | None, top_p: float | None) -> list[float]:
    """One row, token by token, with Python's floats."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if temperature == 0:
        return [float(token == order[0]) for token in range(len(logits))]
    weights = [math.exp((logit - max(logits)) / temperature) for logit in logits]
    kept = order[:top_k]
    if top_p is not None:
        total, nucleus, mass = sum(weights[token] for token in kept), [], 0.0
        for token in kept:
            if mass / total >= top_p:
                break
            nucleus.append(token)
            mass += weights[token]
        kept = nucleus
    total = sum(weights[token] for token in kept)
    return [weights[token] / total if token in kept else 0.0 for token in range(len(logits))]


# Distinct logits, and a top_p that no sum of these weights meets exactly: ties are tested apart.
rows = st.lists(st.lists(st.integers(-40, 40), min_size=6, max_size=6, unique=True), min_size=1, max_size=4)


@given(rows, st.sampled_from([0.0, 0.3, 1.0, 2.5]), st.none() | st.integers(1, 6), st.none() | st.floats(0.01, 0.99))
@settings(deadline=None)
def test_distribution_equals_the_slow_form(
    rows: list[list[int]], temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits = [[value / 8 for value in row] for row in rows]
    fast = distribution(torch.tensor(logits, dtype=torch.float64), temperature=temperature, top_k=top_k, top_p=top_p)
    slow = [slow_distribution(row, temperature, top_k, top_p) for row in logits]
    torch.testing.assert_close(fast, torch.tensor(slow, dtype=torch.float64), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5}, {"top_k": 3}, {"top_p": 0.7}, {"top_k": 4, "top_p": 0.8}]
)
def test_choose_draws_from_the_distribution(settings: dict) -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5])
    draws = 40_000
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits.expand(draws, -1), generator=generator, **settings)
    assert drawn.shape == (draws,)
    assert drawn.dtype == torch.int64
    probabilities = distribution(logits[None], **settings)[0]
    error = torch.bincount(drawn, minlength=5) / draws - probabilities
    assert (error.abs() <= 5 * (probabilities * (1 - probabilities) / draws).sqrt()).all()  # none where p = 0


def test_choose_is_repeatable_and_rows_are_apart() -> None:
    logits = torch.randn(64, 50, generator=torch.Generator().manual_seed(1))
    first, second = (choose(logits, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second)
    assert len(set(first.tolist())) > 10
    certain = torch.full((50, 50), -torch.inf).fill_diagonal_(0.0)
    assert choose(certain).tolist() == list(range(50))


@given(rows)
@settings(deadline=None)
def test_temperature_zero_is_greedy_and_the_limit(rows: list[list[int]]) -> None:
    logits = torch.tensor(rows, dtype=torch.float32)
    best = [row.index(max(row)) for row in rows]
    assert choose(logits, temperature=0).tolist() == best
    assert choose(logits, temperature=1e-3).tolist() == best
    assert choose(logits, temperature=1e-300).tolist() == best  # rounds to 0 in float32
    assert choose(logits, top_k=1).tolist() == best
    assert choose(logits, top_p=1e-6).tolist() == best


def test_ties_keep_exactly_k() -> None:
    probabilities = distribution(torch.zeros(3, 10), top_k=4)
    assert (probabilities > 0).sum(dim=-1).tolist() == [4, 4, 4]
    assert probabilities.max() == 0.25
    assert (distribution(torch.zeros(1, 4), top_p=0.5) > 0).sum() == 2


def test_whole_vocabulary_and_whole_mass_change_nothing() -> None:
    logits = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0)) * 20
    assert torch.equal(distribution(logits, top_k=1000, top_p=1.0), distribution(logits))


def test_forbidden_tokens_large_logits_and_half_precision() -> None:
    assert distribution(torch.tensor([[-torch.inf, 3e38, -3e38]])).tolist() == [[0, 1, 0]]
    assert distribution(torch.tensor([[-torch.inf, 3e38, -3e38]]), temperature=0.5).tolist() == [[0, 1, 0]]
    half = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(distribution(half, top_p=0.9), distribution(half.float(), top_p=0.9))


@pytest.mark.parametrize(
    ("logits", "arguments", "reason"),
    [
        (torch.zeros(5), {}, r"\[batch, vocabulary\], not \[5\]"),
        (torch.zeros(1, 0), {}, r"not \[1, 0\]"),
        (torch.zeros(1, 5), {"temperature": -1}, "temperature .* not -1"),
        (torch.zeros(1, 5), {"temperature": math.nan}, "temperature"),
        (torch.zeros(1, 5), {"temperature": math.inf}, "temperature"),
        (torch.zeros(1, 5), {"top_k": 0}, "from 1 to 5 .* not 0"),
        (torch.zeros(1, 5), {"top_k": 6}, "from 1 to 5 .* not 6"),
        (torch.zeros(1, 5), {"top_p": 0.0}, r"top_p must be in \(0, 1\], not 0.0"),
        (torch.zeros(1, 5), {"top_p": 1.5}, "top_p"),
        (torch.tensor([[0.0, 1.0], [0.0, math.nan]]), {}, "diverged"),
        (torch.tensor([[0.0, math.inf]]), {"temperature": 0}, "diverged"),
        (torch.tensor([[-math.inf, -math.inf]]), {}, "diverged"),
    ],
)
def test_refuses(logits: torch.Tensor, arguments: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        choose(logits, **arguments)
