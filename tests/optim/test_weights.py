"""Levels of weights: against loops written from the papers, and what an optimizer does around them."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt import build, nest, to_spec
from nestopt.config import ConfigError
from nestopt.core import Level, chain, parallel
from nestopt.core.part import FieldError
from nestopt.levels import adam, adamw, dgd, gd, momentum, muon, schedule_free, second_moment, weight_average
from nestopt.optim import Nested
from tests.optim.test_functional import descend, start

LOOKAHEAD = nest(gd(), adam(), of="weights", period=3)
DILOCO = nest(momentum(0.9, nesterov=True), adam(), of="weights", period=3, step_size=0.7)
NESTS = {
    "lookahead": LOOKAHEAD,
    "diloco": DILOCO,
    "slowmo": nest(momentum(0.6), momentum(0.9), of="weights", period=4, step_size=1.0),
    "outer adam": nest(adam(), gd(), of="weights", period=2, step_size=0.01),
    "twice": nest(momentum(0.5), LOOKAHEAD, of="weights", period=6, step_size=0.8),
    "chain": nest(gd(), chain(momentum(0.9), adam()), of="weights", period=3),
    "outer muon": nest(muon(dtype="float64"), gd(), of="weights", period=2, step_size=0.1),
    "ema": weight_average(momentum(0.9), 0.8),
    "swa": weight_average(adam(), None, every=2, skip=1),
    "ema of slow weights": weight_average(LOOKAHEAD, 0.8),
    "schedule-free": schedule_free(),
    "schedule-free gd": schedule_free(gd(), beta=0.8, lr_power=1.0),
    "schedule-free muon": schedule_free(muon(dtype="float64")),
    "clocked": nest(gd(), momentum(0.9, period=2), of="weights", period=4),
}


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def loss(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return model(x.to(next(model.parameters()).dtype)).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return nn.utils.parameters_to_vector(model.parameters()).detach().clone()


def close(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


Outer = Callable[[Tensor, dict[str, Any]], Tensor]


def loop(model: nn.Module, inner: torch.optim.Optimizer, period: int, outer: Outer, steps: int) -> None:
    """Slow and fast weights as the papers have them; `outer` gives how far the slow ones move for Δ = slow - fast."""
    slow, memory = flat(model), dict[str, Any]()
    for step in range(steps):
        train(model, inner, range(step, step + 1))
        if (step + 1) % period == 0:
            slow = slow - outer(slow - flat(model), memory)
            nn.utils.vector_to_parameters(slow.clone(), model.parameters())


def lookahead(delta: Tensor, memory: dict[str, Any]) -> Tensor:
    """Zhang et al. 2019, algorithm 1: φ ← φ + α(θ - φ)."""
    return 0.5 * delta


def slowmo(delta: Tensor, memory: dict[str, Any]) -> Tensor:
    """Wang et al. 2020, algorithm 1 with γ the inner rate: u ← βu + (x - x_τ)/γ, x ← x - αγu."""
    rate, beta, alpha = 0.02, 0.6, 1.0
    memory["u"] = beta * memory.get("u", 0.0) + delta / rate
    return alpha * rate * memory["u"]


def nesterov(delta: Tensor, memory: dict[str, Any]) -> Tensor:
    """Douillard et al. 2023, with torch's Nesterov momentum as the outer optimizer."""
    memory["m"] = 0.9 * memory.get("m", 0.0) + delta
    return 0.7 * (delta + 0.9 * memory["m"])


@pytest.mark.parametrize(
    ("name", "inner", "outer", "period"),
    [
        ("lookahead", lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1), lookahead, 3),
        ("diloco", lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1), nesterov, 3),
    ],
)
def test_it_is_the_papers_loop(name: str, inner: Any, outer: Outer, period: int) -> None:
    ours, theirs = net(), net()
    train(ours, nestopt.optimizer(ours, NESTS[name], lr=0.02, weight_decay=0.1), range(14))
    loop(theirs, inner(theirs.parameters()), period, outer, 14)
    close(flat(ours), flat(theirs))


def test_it_is_slowmo() -> None:
    ours, theirs = net(), net()
    train(ours, nestopt.optimizer(ours, NESTS["slowmo"], lr=0.02), range(14))
    loop(theirs, torch.optim.SGD(theirs.parameters(), lr=0.02, momentum=0.9), 4, slowmo, 14)
    close(flat(ours), flat(theirs))


def test_it_is_pytorch_optimizers_lookahead() -> None:
    peer = pytest.importorskip("pytorch_optimizer")
    ours, theirs = net(), net()
    train(ours, nestopt.optimizer(ours, LOOKAHEAD, lr=0.02, weight_decay=0.1), range(14))
    base = torch.optim.AdamW(theirs.parameters(), lr=0.02, weight_decay=0.1)
    train(theirs, peer.Lookahead(base, k=3, alpha=0.5), range(14))
    close(flat(ours), flat(theirs))


@pytest.mark.parametrize("period", [1, 4])
def test_all_the_way_is_the_inner_level(period: int) -> None:
    ours, plain = net(), net()
    train(ours, nestopt.optimizer(ours, nest(gd(), adam(), of="weights", period=period, step_size=1), 0.02), range(9))
    train(plain, nestopt.optimizer(plain, adam(), 0.02), range(9))
    close(flat(ours), flat(plain))


@pytest.mark.parametrize("name", NESTS)
@pytest.mark.parametrize("view", [False, True])
def test_every_executor_does_the_same(name: str, view: bool) -> None:
    """Stacks, flat buffers, single tensors and views of several matrices, against the pure function."""
    level = NESTS[name]
    want = descend(level, start(), 0.01, steps=13).detach()
    for count in (1, 3):
        params = [start() for _ in range(count)]
        group = {"params": params, "view": nestopt.optim.Split(1)} if view else {"params": params}
        optimizer = Nested([group], level, lr=0.01, weight_decay=0.1)
        for _ in range(13):
            optimizer.zero_grad()
            for param in params:
                (torch.arange(1, 13, dtype=torch.float64).reshape(4, 3) * (param - 0.3).square()).sum().backward()
            optimizer.step()
        for param in params:
            close(param.detach(), want)


def test_matrices_side_by_side_are_moved_each() -> None:
    level = NESTS["outer muon"]
    whole, halves = (nn.Parameter(start().detach()) for _ in range(2))
    parts = [nn.Parameter(part.detach().clone()) for part in halves.chunk(2)]
    fused = Nested([{"params": [whole], "view": nestopt.optim.Split(2)}], level, lr=0.1)
    apart = Nested(parts, level, lr=0.1)
    for step in range(5):
        grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        whole.grad = grad
        for part, own in zip(parts, grad.chunk(2), strict=True):
            part.grad = own.clone()
        fused.step()
        apart.step()
    close(whole.detach(), torch.cat(list(parts)).detach())


@pytest.mark.parametrize(
    "name", ["lookahead", "diloco", "twice", "chain", "swa", "ema of slow weights", "schedule-free"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_goes_on_bit_for_bit_in_the_middle_of_a_period(name: str, dtype: torch.dtype) -> None:
    one, two = net(dtype), net(dtype)
    first, second = (nestopt.optimizer(model, NESTS[name], 0.02) for model in (one, two))
    train(one, first, range(11))
    train(two, second, range(5))
    file = io.BytesIO()
    torch.save({"model": two.state_dict(), "optimizer": second.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    three = net(dtype)
    third = nestopt.optimizer(three, NESTS[name], 0.02)
    three.load_state_dict(saved["model"])
    third.load_state_dict(saved["optimizer"])
    train(three, third, range(5, 11))
    assert torch.equal(flat(three), flat(one))
    assert all(own.dtype == torch.float32 for state in third.state.values() for own in state.values())
    for own in (first, third):
        own.eval()
    assert torch.equal(flat(three), flat(one))


KEYS = {"lookahead": "slow", "diloco": "slow", "ema": "average", "swa": "average", "schedule-free": "x"}


@pytest.mark.parametrize("name", KEYS)
def test_evaluation_changes_nothing_else(name: str) -> None:
    model, plain = net(), net()
    own, other = (nestopt.optimizer(each, NESTS[name], 0.02) for each in (model, plain))
    own.eval()
    own.train()  # before there is anything to put back
    train(model, own, range(5))
    train(plain, other, range(5))
    trained = flat(model)
    own.eval()
    own.eval()
    shown = flat(model)
    assert not torch.equal(shown, trained)
    assert torch.equal(shown, torch.cat([own.state[p][KEYS[name]].flatten() for p in model.parameters()]))
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        own.step()
    saved = copy.deepcopy((model.state_dict(), own.state_dict()))
    own.train()
    assert torch.equal(flat(model), trained)
    train(model, own, range(5, 9))
    train(plain, other, range(5, 9))
    assert torch.equal(flat(model), flat(plain))

    again = net()  # saved while it evaluated
    resumed = nestopt.optimizer(again, NESTS[name], 0.02)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"):
        resumed.step()
    resumed.train()
    assert torch.equal(flat(again), trained)
    train(again, resumed, range(5, 9))
    assert torch.equal(flat(again), flat(plain))


def averaged(model: nn.Module, optimizer: torch.optim.Optimizer, average: Any, every: int, skip: int) -> Tensor:
    """torch's own averages, updated after every step that counts."""
    own = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    for step in range(14):
        train(model, optimizer, range(step, step + 1))
        if step >= skip and (step + 1 - skip) % every == 0:
            own.update_parameters(model)
    return flat(own.module)


@pytest.mark.parametrize(("decay", "every", "skip"), [(0.8, 1, 0), (None, 1, 0), (None, 3, 2), (0.5, 2, 5)])
def test_averages_are_torchs(decay: float | None, every: int, skip: int) -> None:
    ours, theirs = net(), net()
    optimizer = nestopt.optimizer(ours, weight_average(adam(), decay, every, skip), 0.02)
    train(ours, optimizer, range(14))
    plain = torch.optim.Adam(theirs.parameters(), lr=0.02)
    swa = torch.optim.swa_utils
    average = swa.get_swa_multi_avg_fn() if decay is None else swa.get_ema_multi_avg_fn(decay)
    want = averaged(theirs, plain, average, every, skip)
    close(flat(ours), flat(theirs))
    optimizer.eval()
    # torch counts in float32
    torch.testing.assert_close(flat(ours), want, rtol=1e-6 if decay is None else 1e-11, atol=1e-9)


def test_an_equal_average_is_the_mean() -> None:
    model, seen = net(), []
    optimizer = nestopt.optimizer(model, NESTS["swa"], 0.02)
    for step in range(9):
        train(model, optimizer, range(step, step + 1))
        seen.append(flat(model))
    optimizer.eval()
    close(flat(model), torch.stack(seen[2::2]).mean(0))


def test_before_any_weights_count_the_average_is_the_weights() -> None:
    model = net()
    optimizer = nestopt.optimizer(model, weight_average(adam(), skip=9, every=4), 0.02)
    for step in range(12):
        train(model, optimizer, range(step, step + 1))
        trained = flat(model)
        optimizer.eval()
        assert torch.equal(flat(model), trained)
        optimizer.train()


def schedule_free_loop(model: nn.Module, rates: list[float], adaptive: bool, beta: float, power: float) -> Tensor:
    """Defazio et al. 2024, algorithm 1, and with weights lr_max^p as in its section on warmups; returns x."""
    y = flat(model)
    z, x, v, total, largest = y.clone(), y.clone(), torch.zeros_like(y), 0.0, 0.0
    for t, rate in enumerate(rates, start=1):
        nn.utils.vector_to_parameters(y.clone(), model.parameters())
        model.zero_grad()
        loss(model, t - 1).backward()
        grad = torch.cat([param.grad.flatten() for param in model.parameters() if param.grad is not None])
        if adaptive:
            v = 0.999 * v + 0.001 * grad**2
            grad = grad / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        z = z - rate * (grad + 0.1 * y)
        largest = max(largest, rate)
        total += largest**power
        c = largest**power / total
        x = (1 - c) * x + c * z
        y = (1 - beta) * z + beta * x
    nn.utils.vector_to_parameters(y.clone(), model.parameters())
    return x


@pytest.mark.parametrize(
    ("level", "adaptive", "beta", "power"),
    [(NESTS["schedule-free"], True, 0.9, 2.0), (NESTS["schedule-free gd"], False, 0.8, 1.0)],
)
def test_schedule_free_is_the_papers_loop(level: Level, adaptive: bool, beta: float, power: float) -> None:
    ours, theirs = net(), net()
    optimizer = nestopt.optimizer(ours, level, lr=0.05, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: min((t + 1) / 5, 1.2 - 0.02 * t))
    rates = []
    for step in range(14):
        rates.append(optimizer.param_groups[0]["lr"])
        if step == 6:  # sums go on where they were
            saved = copy.deepcopy(optimizer.state_dict())
            optimizer = nestopt.optimizer(ours, level, lr=0.05, weight_decay=0.1)
            optimizer.load_state_dict(saved)
            scheduler.optimizer = optimizer
        train(ours, optimizer, range(step, step + 1))
        scheduler.step()
    want = schedule_free_loop(theirs, rates, adaptive, beta, power)
    close(flat(ours), flat(theirs))
    optimizer.eval()
    close(flat(ours), want)


@pytest.mark.parametrize("kind", ["AdamW", "SGD"])
def test_schedule_free_is_its_authors(kind: str) -> None:
    peer = pytest.importorskip("schedulefree")
    ours, theirs = net(), net()
    inner = second_moment() if kind == "AdamW" else gd()
    own = nestopt.optimizer(ours, schedule_free(inner), lr=0.05, weight_decay=0.1)
    other = getattr(peer, f"{kind}ScheduleFree")(theirs.parameters(), lr=0.05, weight_decay=0.1)
    other.train()
    train(ours, own, range(14))
    train(theirs, other, range(14))
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-11)
    own.eval()
    other.eval()
    torch.testing.assert_close(flat(ours), flat(theirs), rtol=1e-9, atol=1e-11)


def test_others_are_left_alone_by_eval_and_train() -> None:
    model = net()
    optimizer = nestopt.optimizer(model, adam(), 0.02)
    train(model, optimizer, range(2))
    before = flat(model)
    optimizer.eval()
    assert torch.equal(flat(model), before)
    optimizer.step()


def test_the_rest_of_a_model_is_nested_too() -> None:
    model = net()
    optimizer = nestopt.optimizer(model, nest(gd(), muon(), of="weights", period=2), rest=momentum(0.9))
    train(model, optimizer, range(3))
    assert all("slow" in optimizer.state[param] for param in model.parameters())
    assert [group["stack"].inner.label for group in optimizer.param_groups] == ["muon", "momentum"]
    assert "every 2 updates gd moves the slow weights, × 0.5" in str(optimizer.explain())


def test_it_compiles_nothing_else_and_groups_may_have_periods() -> None:
    """A group that steps once in two calls counts its updates."""
    params = [start() for _ in range(2)]
    slow = Nested([{"params": params[:1], "period": 2}], LOOKAHEAD, lr=0.01)
    plain = Nested(params[1:], LOOKAHEAD, lr=0.01)
    for step in range(12):
        grad = torch.full((4, 3), float(step // 2), dtype=torch.float64)
        params[0].grad = grad / 2
        slow.step()
        if step % 2:
            params[1].grad = grad
            plain.step()
    close(params[0].detach(), params[1].detach())


def test_yaml() -> None:
    outer = {"level": "momentum", "nesterov": True}
    spec = {"level": "nest", "of": "weights", "outer": outer, "inner": "adamw", "period": 500, "step_size": 0.7}
    level = build("level", {**spec, "across_processes": True})
    want = nest(momentum(nesterov=True), adamw(), of="weights", period=500, step_size=0.7, across_processes=True)
    assert level == want
    assert build("level", to_spec(level)) == want
    with pytest.raises(ConfigError, match="of: 'weight' is not allowed"):
        build("level", {"level": "nest", "of": "weight", "outer": "gd", "inner": "gd"})


def test_described_with_sizes() -> None:
    model = net(torch.float32)
    optimizer = nestopt.optimizer(model, DILOCO, 0.02)
    numbers = sum(param.numel() for param in model.parameters())
    assert nestopt.describe(model, optimizer).state == 4 * 4 * numbers  # m, v, slow, the outer momentum
    train(model, optimizer, range(2))
    assert nestopt.describe(model, optimizer).state == 4 * 4 * numbers
    assert "slow weights" in str(nestopt.describe(DILOCO))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: nest(gd(), gd(), of="weight"), ["of='weight'", "'state', 'weights'"]),  # type: ignore[arg-type]
        (lambda: nest(gd(), gd(), of="weights"), ["period=1", "how many updates"]),
        (lambda: nest(gd(period=3), gd(), of="weights", period=4), ["period=4", "3", "one of the two"]),
        (lambda: nest(gd(), gd(), of="weights", period=3, step_size=-1.0), ["step_size=-1.0", "[0"]),
        (lambda: nest(gd(), momentum(), across_processes=True), ["across_processes=True", "of='weights'"]),
        (lambda: chain(momentum(), LOOKAHEAD), ["levels.nest", "around a whole stack"]),
        (lambda: parallel(momentum(), LOOKAHEAD), ["levels.nest", "around a whole stack"]),
        (lambda: nest(gd(period=2), LOOKAHEAD), ["inner", "around a whole stack"]),
        (lambda: nest(LOOKAHEAD, gd(), of="weights", step_size=1.0), ["outer", "around a whole stack"]),
        (lambda: dgd(LOOKAHEAD), ["of", "around a whole stack"]),
        (lambda: weight_average(decay=1.0), ["decay=1.0", "[0, 1)"]),
        (lambda: weight_average(every=0), ["every=0", "1 or more"]),
        (lambda: weight_average(skip=-1), ["skip=-1", "0 or more"]),
        (lambda: weight_average(period=2), ["period=2", "takes no gradients"]),
        (lambda: schedule_free(beta=1.5), ["beta=1.5", "[0, 1]"]),
        (lambda: schedule_free(LOOKAHEAD), ["inner", "leave it out"]),
        (lambda: weight_average(schedule_free()), ["inner"]),
        (lambda: nestopt.layer(weight_average(), 8, 2)(torch.zeros(1, 3, 8)), ["weight_average", "tokens"]),
        (lambda: nestopt.layer(LOOKAHEAD, 8, 2)(torch.zeros(1, 3, 8)), ["nest", "tokens"]),
        (lambda: nestopt.optimizer(net(), nest(muon(), muon(), of="weights", period=2)), ["rest.stack", "'adamw'"]),
        (lambda: Nested([start()], LOOKAHEAD, capturable=True), ["nest", "capturable=True"]),
    ],
)
def test_what_is_refused(make: Callable[[], Level], words: list[str]) -> None:
    with pytest.raises((FieldError, ValueError)) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


def test_groups_must_agree_on_what_crosses_processes() -> None:
    across = nest(gd(), adam(), of="weights", period=3, across_processes=True)
    with pytest.raises(ValueError, match=r"param_groups\[1\]\.stack.*across_processes=True"):
        Nested([{"params": [start()]}, {"params": [start()], "stack": "adam"}], across)
