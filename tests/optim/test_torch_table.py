"""torch's own table of optimizers with ours in it: what torch's test_optim.py asks of every optimizer, asked here."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.testing._internal import common_optimizers

import nestopt.optim
from nestopt import levels
from nestopt.core import Level, chain, nest, parallel, registry
from nestopt.core.memories import Window
from nestopt.optim import Nested
from nestopt.optim.execute import flat
from nestopt.optim.plan import RESTLESS
from nestopt.testing import check_optimizer
from tests.levels.gradient.tools import LINKS

NAMES = ("SGD", "Adam", "AdamW", "Muon")
OUR_STATE = {"momentum_buffer": "momentum"}
"""Where the names of torch's states are others than ours."""

MATRICES = [(5, 3), (5, 3), (3, 7), (2, 20)]
ANY = [*MATRICES, (4,), (1,), (), (0,), (0, 2), (20, 16)]


def torch_table() -> dict[str, Any]:
    """The entries of torch's table that have our names, with every choice of arguments torch tests them with."""
    options = common_optimizers._get_optim_inputs_including_global_cliquey_kwargs
    # `differentiable` is refused (test_torch_named); none asks for `capturable` on this device
    return {
        info.name: (info, options("cpu", torch.float32, info, skip=("differentiable",)))
        for info in common_optimizers.optim_db
        if info.name in NAMES
    }


TABLE = torch_table()
INPUTS = {f"{name}: {given.desc}": (name, given.kwargs) for name, (_, inputs) in TABLE.items() for given in inputs}
ERRORS = {
    f"{name}: {error.optimizer_error_input.desc}": (name, error)
    for name, (info, _) in TABLE.items()
    for error in info.optim_error_inputs_func("cpu", torch.float32)
}
SCHEDULES = {
    f"{name} {i}": (name, makers) for name, (info, _) in TABLE.items() for i, makers in enumerate(info.scheduler_inputs)
}

COMPOSED = {"chain", "parallel", "nest"}
SIMPLE = LINKS - {"lamb", "cautious", "normuon"}
"""What these are made of, one by one."""
STACKS: dict[str, Callable[[], Level]] = {
    **{name: registry.get("level", name) for name in registry.names("level") if name not in COMPOSED | SIMPLE},
    "attention": lambda: levels.attention(memory=Window(3)),
    "forgetting_attention": lambda: levels.forgetting_attention(memory=Window(3)),
    "amsgrad": lambda: levels.adam(amsgrad=True),
    "on a clock": lambda: levels.adam(period=3),
    "cms of momentum": lambda: levels.cms(periods=(1, 3), rule=levels.momentum()),
    "three deep": lambda: chain(
        slow=levels.momentum(0.5, period=3),
        fast=parallel(direct=levels.gd(), nested=nest(levels.gd(period=4), levels.momentum()), weights=[0.5, 1.0]),
        last=levels.adam(),
    ),
    "matrices on clocks": lambda: parallel(levels.muon(dtype="float64"), levels.delta_momentum(period=2)),
}
NOT_ALONE = {"Nested", "Split"}
CASES: dict[str, Callable[..., Optimizer]] = {
    **{
        name: thing
        for name in nestopt.optim.__all__
        if inspect.isclass(thing := getattr(nestopt.optim, name)) and name not in NOT_ALONE
    },
    **{f"{key} (table)": lambda params, key=key, **more: ours(key, params, **more) for key in INPUTS},
    **{f"stack {name}": lambda params, name=name, **more: Nested(params, STACKS[name](), **more) for name in STACKS},
}
DRAWS = ("deep", "stack ma", "yaad", "moneta", "memora", "atlas", "titans", "ttt", "dla", "Deep", "self_modifying")
"""Levels with memories that start at random numbers."""
FEW = ("SGD: nesterov (table)", "Adam: amsgrad (table)", "AdamW: maximize (table)", "Muon: Tensor lr (table)")
"""Of the table, where each of its entries would only take longer."""
USUAL = [case for case in CASES if "table" not in case or case in FEW]
drawless = pytest.mark.parametrize("case", [case for case in USUAL if not any(word in case for word in DRAWS)])


def ours(key: str, params: Any, **more: Any) -> Optimizer:
    name, kwargs = INPUTS[key]
    form = {"ns_form": "standard"} if name == "Muon" else {}
    return getattr(nestopt.optim, name)(params, **{**copy.deepcopy(kwargs), **form, **more})


def made(shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def weights(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def give(optimizer: Optimizer, t: int) -> None:
    """Gradients that depend on the step and the shape only."""
    torch.manual_seed(100 + t)
    for param in weights(optimizer):
        param.grad = torch.randn(param.shape, dtype=torch.float64).to(param.dtype)


def feed(steps: range, *optimizers: Optimizer) -> None:
    for t in steps:
        for optimizer in optimizers:
            give(optimizer, t)
            optimizer.step()


def snapshot(optimizer: Optimizer) -> dict[str, Tensor]:
    found = {}
    for i, param in enumerate(weights(optimizer)):
        found[str(i)] = param.detach().clone(memory_format=torch.contiguous_format)
        found |= {f"{i}.{key}": value.clone() for key, value in optimizer.state.get(param, {}).items()}
    return found


def same(a: Optimizer, b: Optimizer, tolerance: float = 0.0) -> None:
    one, other = snapshot(a), snapshot(b)
    assert one.keys() == other.keys()
    for key, value in one.items():
        torch.testing.assert_close(value, other[key], rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}")


# -- torch's table -----------------------------------------------------------------------------------------------------


def test_the_table_is_whole() -> None:
    assert set(TABLE) == set(NAMES)
    assert len(INPUTS) >= 45
    assert all("capturable" not in kwargs and not kwargs.get("differentiable") for _, kwargs in INPUTS.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("key", INPUTS)
def test_equals_torch(key: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop of torch up to rounding, its fused kernels to the bit, in parameters and state."""
    monkeypatch.setattr(flat, "SMALL", 64)  # some are packed, some are not
    name, kwargs = INPUTS[key]
    shapes = MATRICES if name == "Muon" else ANY
    theirs = getattr(torch.optim, name)(made(shapes, dtype), **copy.deepcopy(kwargs))
    own = ours(key, made(shapes, dtype))
    feed(range(8), theirs, own)
    # torch multiplies a tensor lr in its own dtype, float32 here
    narrow = 2e-6 if torch.float32 in (dtype, getattr(kwargs.get("lr"), "dtype", None)) else 1e-13
    tolerance = 0.0 if kwargs.get("fused") else narrow
    for a, b in zip(weights(theirs), weights(own), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        for word, want in theirs.state[a].items() if a.numel() else ():
            if want is not None and not (word == "momentum_buffer" and not kwargs.get("momentum", name == "Muon")):
                have = own.state[b][OUR_STATE.get(word, word)]
                torch.testing.assert_close(
                    have, want, rtol=tolerance, atol=tolerance, msg=lambda m, w=word: f"{w}: {m}"
                )


COMPLEX = [
    key
    for key, (name, kwargs) in INPUTS.items()
    if TABLE[name][0].supports_complex and not {"fused", "capturable"} & {word for word in kwargs if kwargs[word]}
]
"""Of the table, what torch takes complex parameters in: its fused kernels do not."""


def complex_numbers(shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.complex128).to(dtype) for shape in shapes]


def feed_complex(steps: range, *optimizers: Optimizer) -> None:
    for t in steps:
        for optimizer in optimizers:
            params = weights(optimizer)
            grads = complex_numbers([tuple(p.shape) for p in params], torch.complex128, 100 + t)
            for param, grad in zip(params, grads, strict=True):
                param.grad = grad.to(param.dtype) if param.is_complex() else grad.real.to(param.dtype)
            optimizer.step()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("key", COMPLEX)
def test_equals_torch_on_complex_parameters(key: str, dtype: torch.dtype) -> None:
    """In parameters and in state, which is complex as torch's, with a real parameter between them."""
    name, kwargs = INPUTS[key]

    def begun() -> list[Tensor]:
        return [p.requires_grad_() for p in complex_numbers([(5, 3), (4,), (), (20, 16)], dtype, 0)] + made([(4, 3)])

    theirs = getattr(torch.optim, name)(begun(), **copy.deepcopy(kwargs))
    own = ours(key, begun())
    feed_complex(range(6), theirs, own)
    tolerance = 2e-6 if torch.complex64 == dtype or isinstance(kwargs.get("lr"), Tensor) else 1e-7
    for a, b in zip(weights(theirs), weights(own), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        for word, want in theirs.state[a].items():
            if want is not None and not (word == "momentum_buffer" and not kwargs.get("momentum")):
                have = own.state[b][OUR_STATE.get(word, word)]
                torch.testing.assert_close(
                    have, want, rtol=tolerance, atol=tolerance, msg=lambda m, w=word: f"{w}: {m}"
                )
    # and torch's checkpoint is gone on with
    again = ours(key, [p.detach().clone().requires_grad_() for p in weights(theirs)])
    again.load_state_dict(theirs.state_dict())
    feed_complex(range(6, 9), theirs, again)
    for a, b in zip(weights(theirs), weights(again), strict=True):
        torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_complex_parameter_is_its_two_parts(name: str) -> None:
    make = functools.partial(getattr(nestopt.optim, name), lr=0.01)
    (start,) = complex_numbers([(5, 3)], torch.complex128, 0)
    whole, parts = start.clone().requires_grad_(), torch.view_as_real(start).clone().requires_grad_()
    one, two = (make([param]) for param in (whole, parts))
    for t in range(5):
        (grad,) = complex_numbers([(5, 3)], torch.complex128, 50 + t)
        whole.grad, parts.grad = grad.clone(), torch.view_as_real(grad).clone()
        one.step()
        two.step()
        torch.testing.assert_close(torch.view_as_real(whole.detach()), parts.detach())
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    copied = whole.detach().clone().requires_grad_()
    other = make([copied])
    other.load_state_dict(torch.load(file, weights_only=True))
    for optimizer in (one, other):
        feed_complex(range(3), optimizer)
    assert torch.equal(whole, copied)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_betas_as_tensors_equal_torch(name: str, dtype: torch.dtype) -> None:
    betas = torch.tensor(0.9), torch.tensor(0.99)
    theirs = getattr(torch.optim, name)(made(ANY, dtype), lr=torch.tensor(0.01), betas=betas, foreach=False)
    own = getattr(nestopt.optim, name)(made(ANY, dtype), lr=torch.tensor(0.01), betas=betas)
    feed(range(6), theirs, own)
    for a, b in zip(weights(theirs), weights(own), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-6, atol=2e-6)


TAKEN = {
    "lr as Tensor doesn't work with foreach & not capturable": "foreach changes nothing here",
    "betas must be either both floats or both Tensors": "one of each is clear enough",
    r"betas\[0\] as a Tensor is not supported for capturable=False and foreach=True": "foreach changes nothing here",
    "only support 2D parameters": "a kernel is stepped as its matrix",
}
"""What torch refuses and we take, and why."""


@pytest.mark.parametrize("key", ERRORS)
def test_refuses_what_torch_refuses(key: str) -> None:
    name, error = ERRORS[key]
    given = error.optimizer_error_input
    params = made([(2, 2)]) if given.params is None else given.params
    if given.desc in TAKEN:
        before = params[0].detach().clone()
        params[0].grad = torch.randn(params[0].shape)
        getattr(nestopt.optim, name)(params, **given.kwargs).step()
        assert not torch.equal(before, params[0])
        return
    # a complex parameter is refused when it is given, not when it is stepped; a duplicate by an error, not a warning
    kinds = (error.error_type, ValueError)
    warned = (
        pytest.warns(UserWarning, match="duplicate") if error.error_type is UserWarning else contextlib.nullcontext()
    )
    with warned, pytest.raises(kinds):
        getattr(nestopt.optim, name)(params, **given.kwargs)


@pytest.mark.parametrize("turned", [False, True], ids=["contiguous", "transposed"])
@pytest.mark.parametrize("key", SCHEDULES)
def test_goes_down_under_schedules(key: str, turned: bool) -> None:
    name, makers = SCHEDULES[key]
    weight, bias, x = torch.randn(10, 5), torch.randn(10, 1), torch.randn(5, 1)
    params = [(w.mT.contiguous().mT if turned else w).requires_grad_() for w in (weight, bias)]
    optimizer = getattr(nestopt.optim, name)([{"params": [params[0]]}, {"params": [params[1]], "lr": 0.01}], lr=1e-3)
    schedules = [maker(optimizer) for maker in makers]

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (params[0] @ x + params[1]).square().sum()
        loss.backward()
        return loss

    first = closure().item()
    for _ in range(20):
        loss = optimizer.step(closure).detach()
        for schedule in schedules:
            schedule.step(*([loss] if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else []))
    assert closure().item() < first


# -- what any loop relies on -------------------------------------------------------------------------------------------


# the kit goes down; an average of iterates is approached at a learning rate of 0, too
@pytest.mark.parametrize("case", [case for case in USUAL if "maximize" not in case and "schedule_free" not in case])
def test_keeps_the_contract(case: str) -> None:
    check_optimizer(CASES[case])


# without Adagrad, which in torch 2.11 has no state for a parameter that is added later
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Muon", "RMSprop", "NAdam", "Adafactor"])
def test_the_contract_is_that_of_torch(name: str) -> None:
    check_optimizer(getattr(torch.optim, name))


class Upwards(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for param in weights(self):
            if param.grad is not None:
                param.data += self.param_groups[0]["lr"] * param.grad


class Scales(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for param in weights(self):
            if param.grad is not None:
                param.grad.mul_(0.5)
        return super().step(closure)


class KeepsGradient(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for param in weights(self):
            if param.grad is not None:
                self.state[param]["last"] = param.grad
        return super().step(closure)


class StepsAll(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for param in weights(self):
            param.data *= 1 - 1e-3
        return super().step(closure)


class Deaf(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        super().step(closure)


class OneRate(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        for param in weights(self):
            if param.grad is not None:
                param.data -= self.defaults["lr"] * param.grad
        return None if closure is None else closure()


class Forgets(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        for hook in [*self._optimizer_load_state_dict_pre_hooks.values()]:
            hook(self, state_dict)
        for hook in [*self._optimizer_load_state_dict_post_hooks.values()]:
            hook(self)


class Hookless(torch.optim.SGD):
    def load_state_dict(self, state_dict: Any) -> None:
        self.__setstate__({"state": self.state, "param_groups": self.param_groups})


@pytest.mark.parametrize(
    ("cls", "words"),
    [
        (Upwards, "½‖W‖² went from"),
        (Scales, "step changes the gradients"),
        (KeepsGradient, "a gradient becomes state"),
        (StepsAll, "steps a parameter that has no gradient"),
        (OneRate, "moves a group whose lr is 0"),
        (Deaf, "step.closure. returns None"),
        (Hookless, "of the hooks"),
        (Forgets, "a run that was saved and loaded goes on otherwise"),
    ],
)
def test_the_kit_finds_what_is_wrong(cls: type[Optimizer], words: str) -> None:
    check_optimizer(lambda params: torch.optim.SGD(params, momentum=0.9))
    with pytest.raises(AssertionError, match=f"{cls.__name__}: {words}"):
        check_optimizer(lambda params: cls(params, momentum=0.9))


# -- gradients and parameters that come, go and change -----------------------------------------------------------------


@drawless
def test_members_that_come_and_go_step_as_if_alone(case: str) -> None:
    """As the experts of a mixture do, for longer than it takes to give up packing."""
    together, alone = (made(MATRICES, torch.float64) for _ in range(2))
    optimizer, others = CASES[case](together), [CASES[case]([param]) for param in alone]
    for t in range(3 * RESTLESS + 3):
        random = torch.Generator().manual_seed(t)
        for i, (a, b) in enumerate(zip(together, alone, strict=True)):
            here = t == 0 or (i + t) % 3 > 0
            a.grad = torch.randn(a.shape, dtype=a.dtype, generator=random) if here else None
            b.grad = None if a.grad is None else a.grad.clone()
        optimizer.step()
        for other in others:
            other.step()
    # the rounding of Muon's bfloat16 is that of the batch
    tolerance = 3e-3 if "Muon" in case else 1e-9
    for a, b, other in zip(together, alone, others, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        assert optimizer.state[a].keys() == other.state[b].keys()
        assert optimizer.state[a]["step"] == other.state[b]["step"]


@pytest.mark.parametrize("small", [0, 1 << 16], ids=["large", "small"])
@drawless
def test_memory_format_may_change_on_the_way(case: str, small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "SMALL", small)
    shapes = MATRICES if "uon" in case else [(4, 3, 2, 2), (4, 3, 2, 2), (5, 2, 3, 3), (6, 5)]
    plain, turning = CASES[case](made(shapes, torch.float64)), CASES[case](made(shapes, torch.float64))
    for t, turn in enumerate([None, "there", None, "back", None]):
        for param in weights(turning):
            if turn == "there":
                last = param.ndim == 4
                param.data = param.to(memory_format=torch.channels_last) if last else param.detach().mT.contiguous().mT
                assert not param.is_contiguous()
            elif turn == "back":
                param.data = param.detach().contiguous()
        feed(range(t, t + 1), plain, turning)
    same(plain, turning, 3e-3 if "Muon" in case else 1e-9)


@drawless
def test_replaced_data_is_stepped(case: str) -> None:
    """As when a model is moved, or an exponential average is swapped in."""
    one, other = CASES[case](made(MATRICES)), CASES[case](made(MATRICES))
    feed(range(2), one, other)
    for param in weights(one):
        with torch.no_grad():
            param.mul_(2)
    for param in weights(other):
        param.data = param.data * 2
    feed(range(2, 4), one, other)
    same(one, other)


@pytest.mark.parametrize("stack", ["momentum", "adam", "muon", "shampoo", "delta_momentum"])
def test_a_resized_parameter_is_named_and_can_start_anew(stack: str) -> None:
    params = made([(4, 3), (4, 3)])
    optimizer = Nested([("first", params[0]), ("second", params[1])], stack)
    feed(range(2), optimizer)
    params[0].data = torch.ones(6, 3)
    params[0].grad = None
    give(optimizer, 2)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"first: the state .* has shape .*start anew, optimizer.state.pop"):
        optimizer.step()
    assert all(torch.equal(value, snapshot(optimizer)[key]) for key, value in before.items())
    optimizer.state.pop(params[0])
    optimizer.step()
    fresh = Nested([torch.ones(6, 3, requires_grad=True)], stack)
    weights(fresh)[0].grad = params[0].grad
    fresh.step()
    torch.testing.assert_close(params[0], weights(fresh)[0], rtol=1e-5, atol=1e-6)


def test_state_put_there_from_outside_is_what_is_used() -> None:
    for change in ("tensor", "dict", "step", "pop", "clear"):
        optimizer = Nested(made([(5, 3), (5, 3)]), "momentum", lr=1.0)
        first, second = weights(optimizer)
        feed(range(3), optimizer)
        kept = optimizer.state[second]["momentum"].clone()
        if change == "tensor":
            optimizer.state[first]["momentum"] = torch.zeros(5, 3)
        elif change == "dict":
            optimizer.state[first] = {"momentum": torch.zeros(5, 3), "step": torch.tensor(7.0)}
        elif change == "step":
            optimizer.state[first]["step"] = torch.tensor(7.0)
            optimizer.state[first]["momentum"].zero_()
        elif change == "pop":
            optimizer.state.pop(first)
        else:
            optimizer.state.clear()
            kept.zero_()
        feed(range(3, 4), optimizer)
        torch.testing.assert_close(optimizer.state[first]["momentum"], first.grad, rtol=0, atol=0)
        torch.testing.assert_close(optimizer.state[second]["momentum"], 0.9 * kept + second.grad)
        assert optimizer.state[first]["step"] == {"tensor": 4, "dict": 8, "step": 8, "pop": 1, "clear": 1}[change]
        assert optimizer.state[second]["step"] == (1 if change == "clear" else 4)
    optimizer.param_groups[0]["stack"] = levels.adam()
    with pytest.raises(RuntimeError, match="the state 'exp_avg' is None, and adam keeps a tensor"):
        feed(range(1), optimizer)


@pytest.mark.parametrize("default", [torch.float64, torch.float32], ids=str)
@drawless
def test_dtypes_side_by_side_whatever_the_default(case: str, default: torch.dtype) -> None:
    torch.set_default_dtype(default)  # put back by the fixture of all tests
    dtypes = [torch.float32, torch.float64, torch.bfloat16, torch.float32]
    mixed = [made([(5, 3)], dtype)[0] for dtype in dtypes]
    singles = [CASES[case](made([(5, 3)], dtype)) for dtype in dtypes]
    optimizer = CASES[case](mixed)
    for t in range(4):
        give(optimizer, t)
        for param, single in zip(mixed, singles, strict=True):
            weights(single)[0].grad = param.grad.clone()
            single.step()
        optimizer.step()
    for param, single in zip(mixed, singles, strict=True):
        # where the hardware multiplies in bfloat16, Newton-Schulz iterations do, and stacks are rounded as they are cut
        tolerance = 3e-3 if "uon" in case or "cms" in case else 1e-5
        torch.testing.assert_close(param, weights(single)[0], rtol=tolerance, atol=tolerance)
        kept = {value.dtype for value in optimizer.state[param].values() if value.ndim}
        assert kept <= {torch.float64 if param.dtype == torch.float64 else torch.float32}


# -- groups, schedules, averages, scalers ------------------------------------------------------------------------------


@drawless
def test_groups_are_as_optimizers_of_their_own(case: str) -> None:
    """Also for an lr that is a tensor, and one that is filled with another number."""
    shapes = MATRICES[:3]
    settings = [{"lr": 0.05, "weight_decay": 0.3}, {"lr": 0.0}, {"lr": torch.tensor(0.02), "weight_decay": 0.0}]
    grouped = CASES[case]([{"params": [param], **own} for param, own in zip(made(shapes), settings, strict=True)])
    settings[2]["lr"] = 0.02
    alone = [CASES[case]([{"params": [p], **own}]) for p, own in zip(made(shapes), settings, strict=True)]
    for t in range(5):
        give(grouped, t)
        for param, other in zip(weights(grouped), alone, strict=True):
            weights(other)[0].grad = param.grad.clone()
            other.step()
        grouped.step()
        grouped.param_groups[2]["lr"].fill_(0.02 / (t + 2))
        alone[2].param_groups[0]["lr"] = 0.02 / (t + 2)
    for param, other in zip(weights(grouped), alone, strict=True):
        torch.testing.assert_close(param, weights(other)[0], rtol=1e-5, atol=1e-6)


LR_SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.StepLR(o, 2)]
    ),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 0.1, 3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 10),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 6),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 4),
}


def test_no_scheduler_of_torch_is_left_out() -> None:
    kinds = {name for name in lr_scheduler.__all__ if inspect.isclass(getattr(lr_scheduler, name))}
    assert (kinds - {"LRScheduler"}) | {"SWALR"} == set(LR_SCHEDULERS)


@pytest.mark.parametrize("scheduler", LR_SCHEDULERS)
@pytest.mark.parametrize("name", [*NAMES, "Nested"])
def test_schedulers(name: str, scheduler: str) -> None:
    flags: dict[str, Any] = {"momentum": 0.9} if name in ("SGD", "Nested") else {}
    torchs = getattr(torch.optim, "SGD" if name == "Nested" else name)(made(MATRICES), lr=0.1, **flags)
    own = {"ns_form": "standard"} if name == "Muon" else {}
    mine = Nested(made(MATRICES), "momentum", 0.1) if name == "Nested" else None
    mine = mine or getattr(nestopt.optim, name)(made(MATRICES), lr=0.1, **flags, **own)
    seen = set()
    schedules = [LR_SCHEDULERS[scheduler](optimizer) for optimizer in (torchs, mine)]
    for t in range(9):
        feed(range(t, t + 1), torchs, mine)
        for schedule in schedules:
            schedule.step(*([1.0] if scheduler == "ReduceLROnPlateau" else []))
        for key in ("lr", "momentum", "betas"):
            if mine.param_groups[0].get(key) is not None:
                assert mine.param_groups[0][key] == torchs.param_groups[0][key]
        seen.add((mine.param_groups[0]["lr"], mine.param_groups[0].get("momentum"), mine.param_groups[0].get("betas")))
    assert len(seen) > 1
    if scheduler in ("OneCycleLR", "CyclicLR"):
        assert len({pair[1:] for pair in seen}) > 5  # the momentum was cycled
    for a, b in zip(weights(torchs), weights(mine), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=3e-6)


def test_averaged_weights() -> None:
    model = nn.Linear(3, 2)
    optimizer = nestopt.optimizer(model, "adam", lr=0.1)
    equal = swa_utils.AveragedModel(model)
    fading = swa_utils.AveragedModel(model, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(0.5))
    seen = []
    for t in range(4):
        feed(range(t, t + 1), optimizer)
        equal.update_parameters(model)
        fading.update_parameters(model)
        seen.append(model.weight.detach().clone())
    torch.testing.assert_close(equal.module.weight, torch.stack(seen).mean(0))
    want = seen[0]
    for weight in seen[1:]:
        want = 0.5 * want + 0.5 * weight
    torch.testing.assert_close(fading.module.weight, want)


@drawless
def test_a_grad_scaler_skips_steps_that_overflow(case: str) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaled, plain = CASES[case](made(MATRICES)), CASES[case](made(MATRICES))
    for t in range(4):
        give(scaled, t)
        give(plain, t)
        scaler.scale(torch.ones(()))
        for param in weights(scaled):
            param.grad *= scaler.get_scale()
        if t == 2:
            weights(scaled)[1].grad[0, 0] = float("inf")
            before = snapshot(scaled)
        else:
            plain.step()
        scaler.step(scaled)
        scaler.update()
        if t == 2:
            assert all(torch.equal(value, snapshot(scaled)[key]) for key, value in before.items())
            assert scaler.get_scale() == 128.0
    same(scaled, plain)


# -- checkpoints -------------------------------------------------------------------------------------------------------


@drawless
def test_pickled_whole_and_between_dtypes(case: str) -> None:
    optimizer = CASES[case](made(MATRICES))
    feed(range(3), optimizer)
    saved = copy.copy(optimizer.state_dict())
    kept = repr(saved)
    for dtype in (torch.bfloat16, torch.float64):
        other = CASES[case](made(MATRICES, dtype))
        other.load_state_dict(saved)
        assert repr(saved) == kept
        for a, b in zip(weights(optimizer), weights(other), strict=True):
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            for key, value in optimizer.state[a].items():
                have = other.state[b][key]
                assert have.dtype == (value.dtype if key == "step" else wide)
                assert torch.equal(have, value.to(have.dtype)), key
        feed(range(3, 4), other)
        assert repr(saved) == kept  # nothing of it is shared
    back = pickle.loads(pickle.dumps(optimizer))
    feed(range(3, 6), optimizer, back)
    same(optimizer, back)


@pytest.mark.parametrize("named", [(False, True), (True, False), (True, True)])
def test_checkpoints_between_named_and_unnamed(named: tuple[bool, bool]) -> None:
    one, other = (
        Nested([(f"p{i}", p) for i, p in enumerate(made(MATRICES))] if name else made(MATRICES), "adam")
        for name in named
    )
    feed(range(3), one)
    other.load_state_dict(one.state_dict())
    for a, b in zip(weights(one), weights(other), strict=True):
        b.data.copy_(a)
    feed(range(3, 6), one, other)
    same(one, other)


def test_load_hooks_may_replace_the_dict_and_be_put_first() -> None:
    one, other = (Nested(made(MATRICES), "momentum", lr=0.1) for _ in range(2))
    feed(range(2), one)
    order = []

    def replace(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        order.append("replace")
        groups = [{**group, "lr": 0.7} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    other.register_load_state_dict_pre_hook(replace)
    other.register_load_state_dict_pre_hook(lambda *_: order.append("first"), prepend=True)
    other.load_state_dict(one.state_dict())
    assert order == ["first", "replace"]
    assert (other.param_groups[0]["lr"], one.param_groups[0]["lr"]) == (0.7, 0.1)


def test_hooks_on_all_optimizers_see_ours() -> None:
    seen: list[Any] = []
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("post")),
    ]
    feed(range(1), Nested(made(MATRICES), "adam"))
    for handle in handles:
        handle.remove()
    feed(range(1), Nested(made(MATRICES), "adam"))
    assert seen == ["pre", "post"]


# -- ways --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stack", "period"),
    [
        ("gd", 1),
        ("adamw", 2),
        ("delta_momentum", 1),
        ("shampoo", 1),
        ("three deep", 1),
        ("matrices on clocks", 2),
        ("muon", 1),
    ],
)
def test_a_capturable_step_is_one_graph_for_every_lr(stack: str, period: int) -> None:
    torch._dynamo.reset()
    options = {"weight_decay": 0.1, "period": period}
    eager = Nested(made(MATRICES), STACKS[stack](), lr=0.1, **options)
    traced = Nested(made(MATRICES), STACKS[stack](), lr=torch.tensor(0.1), capturable=True, **options)
    feed(range(1), eager, traced)  # makes the state
    counter = CompileCounter()
    step = torch.compile(traced.step, backend=counter, fullgraph=True)
    for t in range(1, 7):
        eager.param_groups[0]["lr"] = 0.1 / t
        traced.param_groups[0]["lr"].fill_(0.1 / t)
        feed(range(t, t + 1), eager)
        give(traced, t)
        step()
    assert counter.frame_count == 1
    same(traced, eager, 1e-4 if stack == "matrices on clocks" else 1e-5)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("stack", ["gd", "adamw", "muon", "delta_momentum", "three deep"])
def test_gradients_that_are_not_finite(stack: str, bad: float) -> None:
    params = [(f"p{i}", param) for i, param in enumerate(made(MATRICES))]
    for way in ("raise", "skip"):
        optimizer = Nested(params, STACKS[stack](), on_nonfinite=way, period=2)
        feed(range(3), optimizer)
        give(optimizer, 3)
        weights(optimizer)[2].grad[0, 0] = bad
        before = snapshot(optimizer)
        if way == "raise":
            with pytest.raises(RuntimeError, match=r"an infinity or a NaN: p2; nothing has been changed"):
                optimizer.step()
        else:
            optimizer.step()
        after = snapshot(optimizer)
        assert before.keys() == after.keys()
        assert all(torch.equal(value, after[key]) for key, value in before.items())


def test_metrics_by_hand() -> None:
    params = made([(5, 3), (4,)])
    stack = chain(first=levels.momentum(0.5), second=levels.momentum(0.25, period=2))
    optimizer = Nested(params, stack, metrics=True)
    one = [torch.zeros_like(p) for p in params]
    total, read = [torch.zeros_like(p) for p in params], [torch.zeros_like(p) for p in params]
    for t in range(2):
        give(optimizer, t)
        for i, param in enumerate(params):
            one[i] = 0.5 * one[i] + param.grad
            total[i] = total[i] + one[i]
        optimizer.step()
        found = optimizer.metrics()
        read = total if t == 1 else read

        def rms(tensors: list[Tensor]) -> Tensor:
            return torch.cat([x.flatten() for x in tensors]).square().mean().sqrt().detach()

        def norm(tensors: list[Tensor]) -> Tensor:
            return torch.cat([x.flatten() for x in tensors]).norm().detach()

        want = {
            "0.first.momentum.norm": norm(one),
            "0.first.writes": torch.tensor(2.0),
            "0.first.update_rms": rms(one),
            "0.second.momentum.norm": norm(read),
            "0.second.clock_read.norm": norm(read),
            "0.second.clock_sum.norm": norm(total) * (t == 0),
        }
        if t == 1:
            want |= {"0.second.writes": torch.tensor(2.0), "0.second.update_rms": rms(read)}
        own = {"0.writes", "0.update_rms"}  # of the whole stack
        assert found.keys() - own == want.keys()
        for key, value in want.items():
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(found["0.update_rms"], rms(read), rtol=1e-6, atol=1e-6)
