"""Newton-Schulz against its equation in float64 and against the polar factor, in every form it is calculated in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.func import vmap

from nestopt.levels.gradient import newton_schulz as kernel
from nestopt.levels.gradient.newton_schulz import SETS, newton_schulz, schedule

SHAPES = [(5, 5), (4, 9), (9, 4), (1, 6), (300, 700), (260, 260), (2, 3, 4, 9)]


QUINTIC = (3.4445, -4.7750, 2.0315)
CUBIC = (3 / 2, -1 / 2, 0.0)
POLAR_EXPRESS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
]
"""As published: Jordan 2024; the classical iteration; Amsel et al. 2025 (arXiv 2505.16932), Implementation 1."""


def polynomials(coefficients: str, steps: int) -> Iterator[tuple[float, float, float]]:
    """The polynomial of each step. Polar Express shrinks all but the last by p(σ) → p(σ / 1.01)."""
    for i in range(steps):
        if coefficients == "polar_express":
            a, b, c = POLAR_EXPRESS[min(i, 7)]
            safe = 1.01 if i < steps - 1 else 1.0
            yield a / safe, b / safe / safe / safe, c / safe / safe / safe / safe / safe
        else:
            yield {"quintic": QUINTIC, "cubic": CUBIC}[coefficients]


def test_polar_express_is_the_published_one() -> None:
    """Its coefficients at eight steps, rounded as another implementation of it has them (Nvidia's)."""
    others = [
        (8.2051, -22.9019, 16.4607),
        (4.0664, -2.8612, 0.5184),
        (3.9096, -2.8234, 0.5250),
        (3.2856, -2.4153, 0.4853),
        (2.2779, -1.6198, 0.3985),
        (1.8726, -1.2307, 0.3585),
        (1.8564, -1.2132, 0.3568),
        (1.8750, -1.2500, 0.3750),
    ]
    ours = [[round(number, 4) for number in triple] for triple in schedule("polar_express", 8)]
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(others), rtol=0, atol=1.01e-4)


def written_out(x: Tensor, coefficients: str, steps: int) -> Tensor:
    """The equation on singular values, which it acts on alone: aσ + bσ³ + cσ⁵."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(-1, keepdim=True).sqrt()
    for a, b, c in polynomials(coefficients, steps):
        s = a * s + b * s**3 + c * s**5
    return (u * s.unsqueeze(-2)) @ v


@pytest.mark.parametrize("detached", [False, True])
@pytest.mark.parametrize("form", ["auto", "standard", "gram"])
@pytest.mark.parametrize("coefficients", list(SETS))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_equation(shape: tuple[int, ...], coefficients: str, form: kernel.Form, detached: bool) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    for steps in (0, 1, 5, 9):
        got = newton_schulz(x, steps, coefficients, form=form, detached=detached)
        torch.testing.assert_close(got, written_out(x, coefficients, steps), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["standard", "gram"])
@pytest.mark.parametrize("shape", [(64, 256), (256, 1024), (96, 96)], ids=str)
def test_float32_is_as_good_in_either_form(shape: tuple[int, int], form: kernel.Form) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    got = newton_schulz(x.float(), form=form, detached=True, dtype=torch.float32)
    wanted = written_out(x, "quintic", 5)
    assert float((got - wanted).norm() / wanted.norm()) < 5e-5


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_badly_conditioned_in_float32(form: kernel.Form) -> None:
    """Singular values over eight decades: the large ones come out right, the small ones stay harmless."""
    u, _, v = torch.linalg.svd(torch.randn(80, 200, dtype=torch.float64), full_matrices=False)
    x = (u * torch.logspace(0, -8, 80, dtype=torch.float64)) @ v
    got = torch.linalg.svdvals(newton_schulz(x.float(), form=form, detached=True, dtype=torch.float32).double())
    torch.testing.assert_close(got, torch.linalg.svdvals(written_out(x, "quintic", 5)), rtol=0, atol=1e-4)


def badly_conditioned(decades: float) -> Tensor:
    u, _, v = torch.linalg.svd(torch.randn(48, 160, dtype=torch.float64), full_matrices=False)
    return (u * torch.logspace(0, -decades, 48, dtype=torch.float64)) @ v


@pytest.mark.parametrize("decades", [0.5, 4.0])
@pytest.mark.parametrize("form", ["standard", "gram"])
def test_bfloat16_singular_values_are_as_good(form: kernel.Form, decades: float) -> None:
    x = badly_conditioned(decades)
    values = torch.linalg.svdvals(newton_schulz(x, dtype=torch.bfloat16, form=form).double())
    exact = torch.linalg.svdvals(written_out(x, "quintic", 5))
    assert float((values - exact).abs().max()) < 0.15
    assert values.max() < 1.25


def test_bfloat16_needs_the_fresh_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "GROWTH", 1e99)
    x = badly_conditioned(4.0)
    assert newton_schulz(x, dtype=torch.bfloat16, form="gram").float().norm(2) > 10 * newton_schulz(x).norm(2)


@pytest.mark.parametrize(
    ("dtype", "steps"), [(torch.bfloat16, 5), (torch.bfloat16, 10), (torch.float16, 5), (torch.float32, 10)], ids=str
)
@pytest.mark.parametrize("coefficients", SETS)
def test_no_matrix_of_few_directions_diverges(coefficients: str, dtype: torch.dtype, steps: int) -> None:
    """An eigenvalue of 0 of the Gram matrix comes out as rounding error, which each step multiplies by a²."""
    worst = 0.0
    for (m, n), seed in itertools.product([(3, 5), (3, 8), (8, 16), (16, 64)], range(20)):
        torch.manual_seed(seed)
        u, v = torch.linalg.qr(torch.randn(m, m))[0], torch.linalg.qr(torch.randn(n, m))[0]
        one, two = torch.full((m,), 1e-4), torch.zeros(m)
        one[0], two[:2] = 1.0, 1.0
        for sizes in (torch.logspace(0, -6, m), one, two):
            found = newton_schulz((u * sizes) @ v.T, steps, coefficients, dtype=dtype, form="gram")
            worst = max(worst, float(torch.linalg.matrix_norm(found.float(), 2)))
    assert worst < 1.3


def test_polar_express_finds_the_polar_factor() -> None:
    u, _, v = torch.linalg.svd(torch.randn(20, 30, dtype=torch.float64), full_matrices=False)
    x = (u * torch.logspace(0, -2.5, 20, dtype=torch.float64)) @ v
    error = {name: float((newton_schulz(x, 8, name) - u @ v).abs().max()) for name in SETS}
    assert error["polar_express"] < 1e-3 < error["quintic"]


@given(st.integers(1, 12), st.integers(1, 12), st.floats(1e-6, 1e6))
def test_scale_and_transposition(m: int, n: int, scale: float) -> None:
    x = torch.randn(m, n, dtype=torch.float64)
    torch.testing.assert_close(newton_schulz(scale * x), newton_schulz(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["standard", "gram"])
def test_gradients_and_vmap(form: kernel.Form) -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: newton_schulz(x, 3, form=form), (x,))
    torch.testing.assert_close(vmap(lambda x: newton_schulz(x, form=form))(x), newton_schulz(x, form=form))


@given(st.integers(-100, 100), st.sampled_from([(6, 5), (20, 60)]), st.sampled_from(["float32", "bfloat16", "float64"]))
def test_a_power_of_two_changes_no_bit(exponent: int, shape: tuple[int, int], dtype: str) -> None:
    x, wide = torch.randn(shape), getattr(torch, dtype)
    want = newton_schulz(x, dtype=wide)
    for detached in (False, True):
        assert torch.equal(newton_schulz(x * 2.0**exponent, dtype=wide, detached=detached), want)


@given(st.floats(-30, 30), st.sampled_from([(8, 6), (20, 60)]))
def test_no_other_scale_changes_more_than_a_last_bit_in_bfloat16(exponent: float, shape: tuple[int, int]) -> None:
    x = torch.randn(shape)
    want, got = (newton_schulz(x * s, 1, dtype=torch.bfloat16, detached=True).float() for s in (1.0, 10**exponent))
    assert (got - want).norm() < 2e-3 * want.norm()


@pytest.mark.parametrize("coefficients", list(SETS))
@pytest.mark.parametrize("shape", [(5, 5), (4, 9), (9, 4), (3, 4, 9)], ids=str)
def test_a_factor_is_of_the_result(shape: tuple[int, ...], coefficients: str) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    for steps in (0, 1, 5):
        got, one = newton_schulz(x, steps, coefficients, factor=0.7), newton_schulz(x, steps, coefficients)
        torch.testing.assert_close(got, 0.7 * one, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [5, 10])
@pytest.mark.parametrize("coefficients", list(SETS))
@pytest.mark.parametrize("decades", [0.5, 2.0, 4.0, 8.0])
def test_the_gram_form_starts_anew_in_time(steps: int, coefficients: str, decades: float) -> None:
    x = badly_conditioned(decades)
    got = newton_schulz(x, steps, coefficients, dtype=torch.bfloat16, form="gram").double()
    one_by_one = newton_schulz(x, steps, coefficients, dtype=torch.bfloat16, form="standard").double()
    exact = written_out(x, coefficients, steps)
    assert torch.linalg.svdvals(got).max() < 1.4
    assert (got - exact).norm() < 0.1 * exact.norm() + 1.5 * (one_by_one - exact).norm()


def test_zeros_stay_zeros() -> None:
    for form in ("standard", "gram"):
        assert not newton_schulz(torch.zeros(3, 7), form=form).any()  # type: ignore[arg-type]


def test_polar_express_has_the_numbers_of_its_paper_made_safe_for_rounding() -> None:
    """Amsel et al. 2025, listing 1: x is divided by 1.01 before each step but the last; written here by hand."""
    first, second = schedule("polar_express", 2)
    assert first == pytest.approx(
        (8.28721201814563 / 1.01, -23.595886519098837 / 1.030301, 17.300387312530933 / 1.0510100501)
    )
    assert second == (4.107059111542203, -2.9478499167379106, 0.5448431082926601)
    at = 0.3 / 1.01
    want = 8.28721201814563 * at - 23.595886519098837 * at**3 + 17.300387312530933 * at**5
    want = 4.107059111542203 * want - 2.9478499167379106 * want**3 + 0.5448431082926601 * want**5
    x = torch.diag(torch.tensor([0.3, (1 - 0.09) ** 0.5], dtype=torch.float64))  # of Frobenius norm 1
    assert float(newton_schulz(x, 2, "polar_express")[0, 0]) == pytest.approx(want, rel=1e-12)
