"""Numbers that the steps drive: against levels whose numbers are set by hand at every step."""

from __future__ import annotations

import copy
import dataclasses
import io
import math
import warnings
from typing import Any, get_type_hints

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt import Schedule, build, nest, registry, to_spec
from nestopt.config import ConfigError
from nestopt.core import Level, chain, parallel, start
from nestopt.core.clock import advance
from nestopt.core.gates import bind
from nestopt.core.part import FieldError, Number, Part
from nestopt.core.signal import Signal
from nestopt.levels import adam, adamw, deltanet, dgd, gd, momentum, muon, second_moment
from nestopt.levels.gradient.momentum import Momentum
from nestopt.optim import Nested, functional_step

torchs_own = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")

RISES = Schedule({0: 0.5, 8: 0.9})


def grads(count: int, shape: tuple[int, ...] = (4, 3), dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for _ in range(count)]


def run(level: Level, shown: list[Tensor], many: int = 1, **options: Any) -> Tensor:
    params = [nn.Parameter(torch.ones_like(shown[0])) for _ in range(many)]
    optimizer = Nested(params, level, lr=0.1, **options)
    for grad in shown:
        for param in params:
            param.grad = grad.clone()
        optimizer.step()
    assert all(torch.equal(param, params[0]) for param in params)
    return params[0].detach()


def test_shapes() -> None:
    points = {2: 1.0, 6: 3.0, 8: 0.0}
    assert [Schedule(points).at(t) for t in (0, 1, 2, 3, 6, 7, 8, 99)] == [1, 1, 1, 1.5, 3, 1.5, 0, 0]
    assert [Schedule(points, "constant").at(t) for t in (0, 2, 5, 6, 7, 8)] == [1, 1, 1, 3, 3, 0]
    assert Schedule(points, "cosine").at(3) == pytest.approx(1 + 2 * (1 - math.cos(math.pi / 4)) / 2)
    assert Schedule({0: 0.0, 10: 1.0}).at(3) == pytest.approx(0.3)  # a warmup
    beta = Schedule({0: 0.9, 10: 0.999}, "half_life").at(5)
    assert 1 / math.log(beta) == pytest.approx((1 / math.log(0.9) + 1 / math.log(0.999)) / 2)


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant", "half_life"])
def test_a_tensor_of_steps_gives_the_same(shape: Any) -> None:
    schedule = Schedule({3: 0.2, 7: 0.9, 8: 0.5}, shape)
    for step in range(12):
        own = schedule.at(torch.tensor(float(step)))
        assert own.dtype == torch.float64
        assert float(own) == pytest.approx(schedule.at(step), rel=1e-14)


def test_momentum_is_the_loop() -> None:
    shown = grads(12)
    w, m = torch.ones(4, 3, dtype=torch.float64), 0.0
    for t, grad in enumerate(shown, start=1):
        m = (0.5 + 0.4 * min(t, 8) / 8) * m + grad
        w = w - 0.1 * m
    torch.testing.assert_close(run(momentum(beta=RISES), shown), w, rtol=1e-12, atol=1e-14)


def numeric_fields() -> list[Any]:
    """Every field that holds a number, of every level on gradients."""
    found = []
    for name in registry.names("level"):
        cls = registry.get("level", name)
        if not issubclass(cls, Level) or name in ("dgd", "ggd", "parallel", "chain", "nest", "associative_memory"):
            continue
        level = cls(mode="ema") if name in ("shampoo", "matrix_adagrad") else cls()  # whose sums have no decay
        if level.of_tokens or level.of_weights or not level.takes_schedules:
            continue
        for key, hint in get_type_hints(cls).items():
            value = getattr(level, key, None)
            if key in level.field_names and hint in (float, Number) and isinstance(value, float):
                found.append(pytest.param(level, key, id=f"{name}.{key}"))
    return found


def test_a_recipe_says_where_its_numbers_are_scheduled() -> None:
    with pytest.raises(FieldError, match=r"lamb: eps=.* is not allowed here; write out the chain"):
        build("level", "lamb").__class__(eps=Schedule({0: 1e-6, 9: 1e-8}))


@pytest.mark.parametrize(("level", "key"), numeric_fields())
@pytest.mark.parametrize("many", [1, 3])
def test_any_number_of_any_level(level: Level, key: str, many: int) -> None:
    value: float = getattr(level, key)
    schedule = Schedule({0: value, 5: 0.7 * value + 0.05 * (value == 0)})
    shown = grads(6)
    by_hand = dataclasses.replace(level, **{key: schedule.at(1)})
    torch.manual_seed(0)
    got = run(dataclasses.replace(level, **{key: schedule}), shown, many)
    params = [nn.Parameter(torch.ones_like(shown[0])) for _ in range(many)]
    optimizer = Nested(params, by_hand, lr=0.1)
    torch.manual_seed(0)
    for t, grad in enumerate(shown, start=1):
        for param in params:
            param.grad = grad.clone()
        optimizer.param_groups[0]["stack"] = dataclasses.replace(level, **{key: schedule.at(t)})
        optimizer.step()
    torch.testing.assert_close(got, params[0].detach(), rtol=1e-12, atol=1e-14)
    assert build("level", to_spec(dataclasses.replace(level, **{key: schedule}))) == dataclasses.replace(
        level, **{key: schedule}
    )


STACKS: dict[str, Level] = {
    "weights": parallel(momentum(0.9), adam(), weights=(Schedule({0: 0, 8: 1}), 0.5)),
    "betas": adam(betas=(RISES, Schedule({2: 0.9, 4: 0.99}, "constant")), eps=Schedule({0: 1e-8, 9: 1e-2})),
    "inside": chain(second_moment(Schedule({0: 0.9, 6: 0.99}), of=momentum(RISES)), momentum(0.3)),
    "adamw": adamw(weight_decay=RISES),
    "nest": nest(gd(period=2), momentum(RISES), step_size=Schedule({0: 1.0, 8: 0.2})),
    "clock": momentum(RISES, period=3),
    "function": momentum(beta=Schedule(lambda t: 0.9 - 0.4 / t)),
}


def by_hand(level: Level, shown: list[Tensor]) -> Tensor:
    """By the pure step, with the level of each step."""
    w = torch.ones_like(shown[0])
    state = start(bind(level), w)
    for t, grad in enumerate(shown, start=1):
        direction, state = advance(bind(level, step=t), grad, state, Signal(t, w, 0.1))
        w = w - 0.1 * direction
    return w


@pytest.mark.parametrize("name", STACKS)
def test_every_executor_does_the_same(name: str) -> None:
    level, shown = STACKS[name], grads(12)
    want = by_hand(level, shown)
    params, state = {"w": torch.ones_like(shown[0])}, None
    for grad in shown:
        params, state = functional_step(level, params, {"w": grad}, state, lr=0.1)
    for got in (run(level, shown), run(level, shown, 3), run(level, shown, capturable=True), params["w"]):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@torchs_own
@pytest.mark.parametrize("name", ["weights", "inside", "adamw"])
def test_compiled_once_for_all_steps(name: str) -> None:
    torch._dynamo.reset()
    before = copy.copy(torch._dynamo.utils.counters["stats"].get("unique_graphs", 0))
    shown = grads(12)
    got = run(STACKS[name], shown, 2, compile=True)
    torch.testing.assert_close(got, run(STACKS[name], shown, 2), rtol=1e-9, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == (0 if name == "adamw" else 1)


@pytest.mark.slow
@torchs_own
def test_a_cycled_momentum_is_compiled_twice_and_no_more() -> None:
    def cycled(**options: Any) -> Tensor:
        param = nn.Parameter(torch.ones(4, 3, dtype=torch.float64))
        optimizer = Nested([param], parallel(momentum(0.9), second_moment()), lr=0.1, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=12)
        for grad in grads(12):
            param.grad = grad
            optimizer.step()
            schedule.step()
        return param.detach()

    torch._dynamo.reset()
    before = torch._dynamo.utils.counters["stats"].get("unique_graphs", 0)
    torch.testing.assert_close(cycled(compile=True), cycled(), rtol=1e-9, atol=1e-12)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 2  # with its number, then told it


def test_compiles_what_it_can_and_says_what_not(caplog: pytest.LogCaptureFixture) -> None:
    class Sharp(Momentum):
        """Looks at its number."""

        def step(self, grad: Tensor, state: Any, signal: Signal) -> tuple[Tensor, Any]:
            m = torch.add(grad, state["momentum"], alpha=float(self.beta))
            return m, {"momentum": m}

    shown = grads(6)
    torch.testing.assert_close(run(Sharp(RISES), shown, compile=True), run(momentum(RISES), shown))
    assert "sharp runs without compile=True" in caplog.text
    with pytest.raises(ValueError, match="sharp is not allowed with capturable=True"):
        run(Sharp(RISES), shown, capturable=True)


@pytest.mark.parametrize("name", ["weights", "betas", "function"])
def test_a_run_goes_on_bit_for_bit(name: str) -> None:
    def made() -> tuple[nn.Parameter, Nested]:
        param = nn.Parameter(torch.ones(4, 3))
        return param, Nested([param], STACKS[name], lr=0.1)

    shown = grads(10, dtype=torch.float32)
    (one, first), (two, second) = made(), made()
    for optimizer, param, steps in ((first, one, shown), (second, two, shown[:5])):
        for grad in steps:
            param.grad = grad.clone()
            optimizer.step()
    file = io.BytesIO()
    torch.save({"weight": two.detach(), "optimizer": second.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    three, third = made()
    three.data = saved["weight"]
    third.load_state_dict(saved["optimizer"])
    for grad in shown[5:]:
        three.grad = grad.clone()
        third.step()
    assert torch.equal(three, one)


def test_yaml() -> None:
    text = {"level": "adam", "betas": [{"schedule": {"points": {0: 0.9, "100": 0.95}, "shape": "cosine"}}, 0.999]}
    level = build("level", text)
    assert level == adam(betas=(Schedule({0: 0.9, 100: 0.95}, "cosine"), 0.999))
    assert build("level", to_spec(level)) == level
    spec = to_spec(parallel(momentum(), gd(), weights=(1.0, Schedule({0: 0.0, 9: 1.0}))))
    assert spec["weights"] == [1.0, {"schedule": {"0": 0.0, "9": 1.0}}]
    assert nestopt.describe(level) is not None


def test_a_configuration_may_have_them() -> None:
    stack = {"level": "momentum", "beta": {"schedule": {"points": {0: 0.5, 8: 0.9}, "shape": "cosine"}}}
    config = nestopt.Config.from_data({"optimizer": {"stack": stack}})
    assert config.optimizer.stack == momentum(Schedule({0: 0.5, 8: 0.9}, "cosine"))
    assert nestopt.Config.from_data(config.to_data()) == config
    with pytest.raises(ConfigError, match="keys must be text"):
        nestopt.Config.from_data({"optimizer": {0: "momentum"}})


def test_explain_says_it() -> None:
    optimizer = nestopt.optimizer(nn.Linear(2, 2), chain(momentum(RISES), adam()))
    assert "levels.momentum.beta: 0.5 at step 0, 0.9 at step 8 (linear)" in optimizer.explain()[0].why


def test_parts_of_a_level_may_have_them() -> None:
    rule = nestopt.levels.deep_momentum(step_size=Schedule({0: 0.02, 5: 0.01}), rule=adam(betas=(RISES, 0.99)))
    assert isinstance(rule, Part)
    assert torch.isfinite(run(rule, grads(6))).all()
    shown = grads(6)
    constant = nestopt.levels.deep_momentum(rule=adam(betas=(Schedule({0: 0.9}), 0.99)))
    torch.testing.assert_close(
        run(constant, shown), run(nestopt.levels.deep_momentum(rule=adam(betas=(0.9, 0.99))), shown)
    )


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: momentum(Schedule({0: 0.9, 9: -0.1})), ["momentum", "beta=-0.1", "[0"]),
        (lambda: adam(betas=(0.9, Schedule({0: 0.9, 9: 1.0}))), ["betas[1]=1.0", "[0, 1)"]),
        (lambda: muon(steps=Schedule({0: 5})), ["steps", "whole"]),
        (lambda: momentum(period=Schedule({0: 5})), ["period", "whole"]),
        (lambda: dgd(of=Schedule({0: 5})), ["of"]),
        (lambda: Schedule({}), ["{}", "values by steps"]),
        (lambda: Schedule({-1: 0.5}), ["-1", "whole number"]),
        (lambda: Schedule({0: math.nan}), ["nan", "finite"]),
        (lambda: Schedule({0: 0.5}, "lineal"), ["lineal", "'cosine'"]),  # type: ignore[arg-type]
        (lambda: Schedule({0: 1.0}, "half_life"), ["half_life", "between 0 and 1"]),
        (lambda: Schedule(abs, "linear"), ["shape='linear'", "function"]),
        (lambda: run(momentum(Schedule(lambda t: "much")), grads(1)), ["'much'", "finite number"]),  # type: ignore[arg-type, return-value]
        (lambda: run(momentum(Schedule(lambda t: 1.0 - t)), grads(3)), ["beta=-1.0", "[0"]),
        (
            lambda: Nested([torch.ones(2, requires_grad=True)], lr=RISES),
            ["lr=", "parameter group", "torch's schedulers"],
        ),  # type: ignore[arg-type]
        (lambda: nestopt.layer(momentum(RISES), 8, 2), ["momentum", "beta", "on tokens", "Gate"]),
        (lambda: nestopt.layer(deltanet(lr=RISES), 8, 2), ["on tokens"]),
    ],
)
def test_what_is_refused(make: Any, words: list[str]) -> None:
    with pytest.raises((FieldError, ValueError, TypeError)) as caught:
        make()
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"schedule": {0: "x"}}, "beta.schedule[0]"),
        ({"schedule": {"points": {0: 0.5}, "shap": "cosine"}}, "beta.schedule.shap"),
        ({"schedule": {0: 0.5}, "gate": 0.5}, "beta"),
        ({"schedule": 0.5}, "beta.schedule"),
    ],
)
def test_what_yaml_refuses_at_its_place(spec: Any, path: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build("level", {"level": "momentum", "beta": spec})
    assert caught.value.path == path
