"""M3 against Algorithm 1 as a loop, and against the stack that it is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import nestopt
from nestopt.config import as_saved, to_spec
from nestopt.core import Signal, parallel
from nestopt.core.part import FieldError
from nestopt.levels import m3, muon, second_moment
from nestopt.levels.gradient.newton_schulz import QUINTIC
from tests.levels.gradient.tools import bytes_per_parameter, randoms, run, same, states

BETAS, ALPHA, EPS, STEPS = (0.7, 0.9, 0.8), 0.5, 1e-2, 3
NEWTON = 1e-6  # Newton-Schulz multiplies rounding


def orthogonal(m: np.ndarray) -> np.ndarray:
    """Newton-Schulz, one matrix at a time and on its rows."""
    a, b, c = QUINTIC
    norm = np.linalg.norm(m)
    x = m / norm if norm else m
    for _ in range(STEPS):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


def paper(grads, f):
    """Algorithm 1, with the sum over exactly the f gradients of the period before."""
    (b1, b2, b3), found = BETAS, []
    m1 = v = m2 = o2 = np.zeros(grads[0].shape)
    for t in range(len(grads)):
        g = grads[t].numpy()
        if t and t % f == 0:
            m2 = m2 + b3 * sum(grads[i].numpy() for i in range(t - f, t))
            o2 = orthogonal(m2)
        m1, v = m1 + b1 * g, v + b2 * g**2
        found.append(torch.from_numpy((orthogonal(m1) + ALPHA * o2) / (np.sqrt(v) + EPS)))
    return torch.stack(found)


def of_directions(grads, f, norm, scale):
    """The docstring's equations."""
    (b1, b2, b3), found = BETAS, []
    m1 = v = m2 = o2 = np.zeros(grads[0].shape)
    for t in range(1, len(grads) + 1):
        g = grads[t - 1].numpy()
        m1 = b1 * m1 + (1 - b1) * g
        if t % f == 0:
            m2 = b3 * m2 + (1 - b3) * sum(grads[i].numpy() for i in range(t - f, t))
            o2 = orthogonal(m2)
        o1 = orthogonal((1 - b1) * g + b1 * m1)
        o = o1 + ALPHA * o2
        v = b2 * v + (1 - b2) * o**2
        u = np.clip(o / (np.sqrt(v / (1 - b2**t)) + EPS), -3, 3)
        if norm == "rms":
            u = u * np.linalg.norm(o1) / np.linalg.norm(u)
        found.append(torch.from_numpy(scale(*g.shape) * u))
    return torch.stack(found)


def ema(grads, f, norm, scale):
    """The same with V of gradients, every average corrected for its start, which must make no difference."""
    (b1, b2, b3), found = BETAS, []
    m1 = v = m2 = o2 = np.zeros(grads[0].shape)
    c = scale(*grads[0].shape)
    for t in range(1, len(grads) + 1):
        g = grads[t - 1].numpy()
        m1, v = b1 * m1 + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        if t % f == 0:
            m2 = b3 * m2 + (1 - b3) * sum(grads[i].numpy() for i in range(t - f, t))
            o2 = orthogonal(m2 / (1 - b3 ** (t // f)))
        o1, v_hat = orthogonal(m1 / (1 - b1**t)), v / (1 - b2**t)
        u = (o1 + ALPHA * o2) / (np.sqrt(v_hat / v_hat.mean()) + EPS)
        if norm == "rms":
            u = u * np.sqrt((o1**2).mean() / (u**2).mean())
        found.append(torch.from_numpy(c * u))
    return torch.stack(found)


SCALES = {
    "original": lambda m, n: max(1.0, m / n) ** 0.5,
    "match_rms_adamw": lambda m, n: 0.2 * max(m, n) ** 0.5,
    "spectral_unclamped": lambda m, n: (m / n) ** 0.5,
    None: lambda m, n: 1.0,
}


@pytest.mark.parametrize("f", [1, 3, 4])
@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_the_papers_mode_is_algorithm_1(f: int, shape: tuple[int, int]) -> None:
    grads = randoms(*shape, count=10)
    level = m3(BETAS, ALPHA, f, steps=STEPS, eps=EPS, mode="paper")
    same(run(level, grads), paper(grads, f), NEWTON)


@pytest.mark.parametrize("f", [1, 3, 4])
@pytest.mark.parametrize("norm", ["rms", None])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("mode", "twin"), [("direction", of_directions), ("ema", ema)])
def test_averages_against_the_equations(f: int, norm: str | None, scale: str | None, mode: str, twin) -> None:
    grads = randoms(5, 3, count=10)
    grads[4] *= 100.0  # a direction that was rare: beyond 3 times its usual size
    level = m3(BETAS, ALPHA, f, steps=STEPS, eps=EPS, update_norm=norm, scale=scale, mode=mode)
    same(run(level, grads, NEWTON), twin(grads, f, norm, SCALES[scale]), NEWTON)


def share_of_a_column(level, quiet: float, steps: int = 40, woken: int = 10**6) -> float:
    """The largest share of the squares of a late step that one column of 32 has, whose gradients are so small."""
    generator, shares = torch.Generator().manual_seed(0), []
    state = level.init(torch.zeros(48, 32, dtype=torch.float64))
    for t in range(1, steps + 1):
        grad = torch.randn(48, 32, dtype=torch.float64, generator=generator)
        grad[:, 7] *= quiet if t < woken else 1.0
        u, state = level.step(grad, state, Signal(t))
        shares.append(float(u[:, 7].square().sum() / u.square().sum()))
    return max(shares[steps // 2 :])


@pytest.mark.parametrize("quiet", [1e-3, 1e-6, 1e-30, 0.0])
def test_a_column_of_small_gradients_gets_no_more_than_its_share(quiet: float) -> None:
    assert share_of_a_column(m3(slow_period=4), quiet) < 2 / 32
    if quiet > 1e-8:
        assert share_of_a_column(m3(slow_period=4, mode="ema"), quiet) > 0.5


def test_a_column_that_wakes_up_does_not_take_the_step() -> None:
    assert share_of_a_column(m3(slow_period=4), 0.0, woken=30) < 9 / 32


def test_it_descends_as_muon_does() -> None:
    """On least squares of which one input is nearly always zero, at the best of three rates."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 16, generator=generator)
    x[:, 3] *= 1e-3
    target = torch.randn(24, 16, generator=generator)

    def loss(spec, lr: float, steps: int = 60) -> float:
        weight = torch.nn.Parameter(torch.zeros(24, 16))
        optimizer = nestopt.optimizer([weight], spec, lr=lr, route="all")
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
        for _ in range(steps):
            optimizer.zero_grad()
            found = (x @ (weight - target).mT).square().mean()
            found.backward()
            optimizer.step()
            schedule.step()
        return float(found.detach())

    def best(spec) -> float:
        return min(loss(spec, lr) for lr in (0.1, 0.3, 1.0))

    assert best(muon()) < 0.05
    assert best(m3()) < 0.05
    assert best(second_moment(of=muon())) < 0.05
    assert best(m3(mode="ema")) > 1
    assert best(second_moment(of=muon(), sees="gradient")) > 1


def test_modes_for_their_letter_say_so() -> None:
    for mode in ("ema", "paper"):
        with pytest.warns(UserWarning, match=f"m3: mode='{mode}' is "):
            m3(mode=mode)


def test_what_was_saved_before_goes_on_with_v_of_gradients() -> None:
    weight = torch.nn.Parameter(torch.randn(4, 3))
    old = nestopt.optimizer([weight], m3(mode="ema"), lr=0.1, route="all")
    weight.grad = torch.randn(4, 3)
    old.step()
    saved = old.state_dict()
    saved["param_groups"][0]["stack"] = "m3"  # as it was written
    now = nestopt.optimizer([weight], "m3", lr=0.1, route="all")
    now.load_state_dict(saved)
    assert now.level(now.param_groups[0]) == m3(mode="ema", eps=1e-8)
    with as_saved():
        assert to_spec(m3()) == {"level": "m3", "mode": "direction"}


def test_it_is_the_composed_stack_at_muons_length() -> None:
    grads, (beta1, beta2, beta3) = randoms(5, 3, count=10), BETAS
    for mode, nesterov, sees in (("direction", True, "direction"), ("ema", False, "gradient")):
        fast, slow = muon(beta1, nesterov=nesterov, scale=None), muon(beta3, nesterov=False, period=3, scale=None)
        of = parallel(fast, slow, weights=[1, ALPHA])
        stack = second_moment(beta2, 0.0, of=of, sees=sees)
        composed, lengths = run(stack, grads), run(muon(beta1, nesterov), grads).norm(dim=(1, 2), keepdim=True)
        want = composed * lengths / composed.norm(dim=(1, 2), keepdim=True)
        same(run(m3(BETAS, ALPHA, 3, eps=0.0, mode=mode), grads), want, NEWTON)
    assert second_moment(of=of) == second_moment(of=of, sees=None)
    same(run(second_moment(of=of), grads), run(second_moment(of=of, sees="direction"), grads), 0.0)


def test_without_a_slow_memory_it_is_muon_scaled() -> None:
    signs = [g.sign() for g in randoms(5, 3)]  # of equal squares, so that V scales nothing
    level = m3(BETAS, 0.0, eps=0.0, mode="ema")
    same(run(level, signs), run(muon(BETAS[0], nesterov=False), signs), NEWTON)
    grads = randoms(5, 3)
    for own, plain in ((m3(BETAS, 0.0), muon(BETAS[0])), (level, muon(BETAS[0], nesterov=False))):
        same(run(own, grads).norm(dim=(1, 2)), run(plain, grads).norm(dim=(1, 2)), NEWTON)
    got, plain = run(level, grads), run(muon(BETAS[0], nesterov=False), grads)
    roots = torch.stack([state["rms"] for state in states(level, grads)])
    ratio = got * roots / plain
    same(ratio / ratio[:, :1, :1], torch.ones_like(ratio), NEWTON)


@settings(max_examples=20)
@given(scale=st.floats(1e-4, 1e6))
def test_the_scale_of_gradients_is_forgotten(scale: float) -> None:
    grads, level = randoms(4, 3, count=5), m3(slow_period=2)
    same(run(level, [scale * g for g in grads], NEWTON * max(1, scale**2)), run(level, grads), NEWTON)


@pytest.mark.parametrize(("mode", "changes"), [("direction", [4, 8]), ("ema", [4, 8]), ("paper", [5, 9])])
def test_the_slow_memory_is_read_once_a_period(mode: str, changes: list[int]) -> None:
    reads = [state["slow"]["read"] for state in states(m3(slow_period=4, mode=mode), randoms(4, 3, count=10))]
    assert not reads[0].any()
    assert [t for t in range(2, 11) if not torch.equal(reads[t - 2], reads[t - 1])] == changes


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("mode", "due"), [("direction", 4), ("ema", 4), ("paper", 5)])
def test_only_a_step_that_is_due_orthogonalises_twice(mode: str, due: int, in_place: bool) -> None:
    level, flops = m3(slow_period=4, mode=mode), []
    for t in range(1, 8):
        grad = torch.randn(8, 6)
        with FlopCounterMode(display=False) as counter:
            (level.step_ if in_place else level.step)(grad, level.init(grad), Signal(t))
        flops.append(counter.get_total_flops())
    assert flops[0] > 0
    assert flops == [flops[0] * (2 if t == due else 1) for t in range(1, 8)]


@pytest.mark.parametrize("options", [{"form": "gram"}, {"coefficients": "polar_express"}], ids=str)
def test_it_iterates_as_muon_does(options: dict[str, str]) -> None:
    signs = [g.sign() for g in randoms(9, 3)]
    level = m3(BETAS, 0.0, eps=0.0, mode="ema", **options)
    same(run(level, signs), run(muon(BETAS[0], False, **options), signs), NEWTON)


def test_zeros_give_zeros() -> None:
    for level in (m3(slow_period=1), m3(slow_period=1, eps=0.0), m3(mode="paper", slow_period=1)):
        assert torch.equal(run(level, [torch.zeros(4, 3)] * 3), torch.zeros(3, 4, 3))


def test_its_state_is_at_most_16_bytes_a_parameter() -> None:
    assert bytes_per_parameter(m3(), 6, 4) == 16
    assert bytes_per_parameter(m3(dtype="bfloat16"), 6, 4) == 14


def test_in_bfloat16_it_stays_near() -> None:
    # with a small ε, entries of small V enlarge the rounding without bound
    grads = [g.float() for g in randoms(32, 16)]
    exact, rounded = (
        run(m3(slow_period=2, eps=0.1), grads, 1e-3),
        run(m3(slow_period=2, eps=0.1, dtype="bfloat16", form="standard"), grads, 0.2),
    )
    assert rounded.dtype == torch.float32
    assert ((exact - rounded).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: m3((0.9, 0.9)), ["m3: betas=(0.9, 0.9)", "three numbers in [0, 1)"]),
        (lambda: m3((0.9, 0.9, 1.0)), ["betas=(0.9, 0.9, 1.0)", "[0, 1)"]),
        (lambda: m3((0.9, 0.9, 1.1), mode="paper"), ["[0, 1]"]),
        (lambda: m3(alpha=-1.0), ["alpha=-1.0"]),
        (lambda: m3(slow_period=0), ["slow_period=0", "1 or more"]),
        (lambda: m3(eps=-1.0), ["eps=-1.0"]),
        (lambda: m3(mode="papr"), ["'papr'", "Did you mean 'paper'"]),
        (lambda: m3(update_norm="l2"), ["update_norm='l2'", "'rms', None"]),
        (lambda: m3(scale="orginal"), ["'orginal'", "Did you mean 'original'"]),
        (lambda: m3(mode="paper", scale=None), ["scale=None", "no effect with mode='paper'"]),
        (lambda: m3(steps=-1), ["steps=-1"]),
        (lambda: m3(form="gramm"), ["'gramm'", "Did you mean 'gram'"]),
        (lambda: m3(dtype="bf16"), ["dtype='bf16'", "bfloat16"]),
    ],
)
def test_wrong_values_say_what_is_allowed(make, words) -> None:
    with pytest.raises(FieldError) as error:
        make()
    for word in words:
        assert word in str(error.value)
