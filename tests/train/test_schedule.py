import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestopt.train.schedule import factor

shares = st.floats(0, 1)
stretches = st.just(0.0) | st.floats(1e-3, 0.5)  # none, or long enough that 1 - stretch is not rounded to 1
shapes = st.sampled_from(["linear", "cosine"])


@st.composite
def schedules(draw: st.DrawFn) -> dict:
    warmup, decay = draw(stretches), draw(stretches)
    more = draw(st.sampled_from([0.0, 0.5, 1.0])) * (1 - warmup - decay)  # up to no constant stretch at all
    if draw(st.booleans()):
        warmup += more
    else:
        decay += more
    return {"warmup": warmup, "decay": decay, "floor": draw(shares), "shape": draw(shapes)}


@given(schedules(), shares)
def test_stays_between_floor_and_one(schedule: dict, progress: float) -> None:
    assert schedule["floor"] <= factor(progress, **schedule) <= 1


@given(schedules())
def test_knees(schedule: dict) -> None:
    warmup, decay, floor = schedule["warmup"], schedule["decay"], schedule["floor"]
    assert factor(0, **schedule) == (floor if warmup else 1)
    assert factor(1, **schedule) == (floor if decay else 1)
    assert factor(warmup, **schedule) == pytest.approx(1)
    assert factor(1 - decay, **schedule) == pytest.approx(1)
    assert factor((warmup + 1 - decay) / 2, **schedule) == pytest.approx(1)


@given(schedules(), shares, shares)
def test_is_continuous_rises_then_falls(schedule: dict, one: float, other: float) -> None:
    low, high = sorted((one, other))
    change = factor(high, **schedule) - factor(low, **schedule)
    # The steepest slope there is: 1 / warmup, or pi / 2 / decay for half a cosine.
    slope = max(1 / schedule["warmup"] if schedule["warmup"] else 0, 2 / schedule["decay"] if schedule["decay"] else 0)
    assert abs(change) <= slope * (high - low) * (1 + 1e-9) + 1e-9
    if high <= 1 - schedule["decay"]:
        assert change >= -1e-12
    if low >= schedule["warmup"]:
        assert change <= 1e-12


def test_values_by_hand() -> None:
    linear = {"warmup": 0.1, "decay": 0.4, "floor": 0.2}
    expected = {0: 0.2, 0.05: 0.6, 0.1: 1, 0.3: 1, 0.6: 1, 0.7: 0.8, 0.8: 0.6, 1: 0.2}
    assert {p: factor(p, **linear) for p in expected} == pytest.approx(expected)
    cosine = {p: factor(p, **linear, shape="cosine") for p in expected}
    half_wave = 0.2 + 0.8 * (1 + math.cos(math.pi * 0.25)) / 2
    assert cosine == pytest.approx(expected | {0.7: half_wave})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"progress": 1.01}, r"progress must be in \[0, 1\], not 1.01"),
        ({"progress": math.nan}, "progress"),
        ({"warmup": -0.1}, "warmup must be"),
        ({"decay": 2}, "decay must be"),
        ({"floor": 1.5}, "floor must be"),
        ({"warmup": 0.6, "decay": 0.6}, "at most 1, not 0.6 [+] 0.6 = 1.2"),
        ({"shape": "step"}, "'linear' or 'cosine', not 'step'"),
    ],
)
def test_refuses(change: dict, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        factor(**({"progress": 0.5, "warmup": 0.1, "decay": 0.1} | change))


def test_shares_that_add_to_one_are_allowed_whatever_their_rounding() -> None:
    warmup, decay = 0.307 + (1 - 0.307 - 0.094), 0.094
    assert warmup + decay > 1
    assert factor(warmup, warmup=warmup, decay=decay) == pytest.approx(1)
