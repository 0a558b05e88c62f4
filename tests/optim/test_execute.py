"""Every way of running a level over many tensors gives the numbers of the plain loop over `advance`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import nestopt.optim
from nestopt import levels
from nestopt.core import Level, Signal, State, advance, chain, parallel, start
from nestopt.core.tree import leaves
from nestopt.levels.gradient.fused import KERNELS
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.gradient.muon import Muon
from nestopt.optim import Nested, functional_step
from nestopt.optim.execute import flat
from nestopt.optim.execute.capturable import begin_on_device, step_capturable
from nestopt.optim.execute.compiled import Compiled
from nestopt.optim.execute.flat import Flat
from nestopt.optim.execute.stacked import Stacked
from nestopt.optim.execute.update import STEP, SUM, Executor, Slot, UpdateSettings, update
from nestopt.train.checkpoints.file import load, save

F64 = torch.float64
Make = Callable[[Level, Sequence[Slot]], Executor]


class Halving(Level):
    """Is not `batched`, so that `vmap` has to do it; and not elementwise."""

    def init(self, param: Tensor) -> State:
        return {"memory": torch.zeros_like(param), "inner": {"length": param.new_zeros(())}}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        length = 0.5 * state["inner"]["length"] + grad.square().sum()
        memory = 0.5 * state["memory"] + grad / (1 + length)
        return memory, {"memory": memory, "inner": {"length": length}}


class Decaying(Muon):
    """Looks at the parameter, which the level it is derived from does not."""

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, state = super().step(grad, state, signal)
        assert signal.param is not None
        return direction + 0.3 * signal.param, state


class Halved(Momentum):
    """Is no average by the numbers of the level that it is derived from."""

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, state = super().step(0.5 * grad, state, signal)
        return direction, state


ELEMENTWISE: dict[str, Callable[[], Level]] = {
    "gd": levels.gd,
    "nesterov": lambda: levels.momentum(0.8, nesterov=True),
    "dampened": lambda: levels.momentum(0.8, 0.3, undamped_start=True),
    "amsgrad": lambda: levels.adam(amsgrad=True),
    "adamw": lambda: levels.adamw(weight_decay=0.2),
    "on a clock": lambda: levels.adam(period=2),
    "chain": lambda: chain(levels.momentum(0.5, period=2), levels.adam()),
    "averaged": lambda: chain(levels.momentum(0.8), levels.adam(), levels.momentum(0.7, dampening=0.4)),
    "averaged by another": lambda: chain(levels.adam(), Halved(0.7)),
    "averaged, of another": lambda: chain(levels.adamw(weight_decay=0.2), levels.momentum(0.7)),
    "averaged sum": lambda: chain(levels.adam(amsgrad=True), levels.momentum(0.9)),
    "sum": lambda: parallel(a=levels.adam(), b=chain(levels.momentum(), levels.gd()), weights=[0.5, 2.0]),
    "preconditioned": levels.preconditioned_momentum,
}
WHOLE: dict[str, Callable[[], Level]] = {
    "vmapped": Halving,
    "vmapped on a clock": lambda: chain(levels.adam(), Halving(period=2)),
    "batched": lambda: levels.muon(dtype="float64", steps=2),
    "decaying": lambda: Decaying(dtype="float64", steps=2),
    "m3": lambda: levels.m3(slow_period=2, dtype="float64", steps=2),
    "shampoo": lambda: levels.shampoo(root_every=2),
    "delta": levels.delta_momentum,
}


def in_pieces(level: Level, slots: Sequence[Slot], *, packed: bool = True) -> Flat:
    """Not all tensors by torch's kernel at once, though it could."""
    executor = Flat(level, slots, packed=packed)
    executor.kernel = None
    return executor


EXECUTORS: dict[str, tuple[Make, dict[str, Callable[[], Level]]]] = {
    "one by one": (Executor, ELEMENTWISE | WHOLE),
    "flat": (Flat, ELEMENTWISE),
    "in pieces": (in_pieces, ELEMENTWISE),
    "in pieces, unpacked": (partial(in_pieces, packed=False), ELEMENTWISE),
    "stacked": (Stacked, WHOLE),
}


def executor_of(make: Make, level: Level, params: Sequence[Tensor]) -> Executor:
    slots = []
    for param in params:
        tree = start(level, param)
        slots.append(Slot(param, {STEP: torch.zeros(()), **dict(leaves(tree))}, tree))
    return make(level, slots)


def loop(level: Level, param: Tensor, grads: Sequence[Tensor], settings: UpdateSettings) -> tuple[Tensor, State]:
    """The definition: `Level.step` on the level's clock, the group's clock, and the step along its direction."""
    state, total, writes = start(level, param), torch.zeros_like(param), 0
    for t, grad in enumerate(grads, start=1):
        total = total + grad
        if t % settings.period:
            continue
        writes += 1
        shown = (-total if settings.maximize else total) + settings.coupled * param
        direction, state = advance(level, shown, state, Signal(writes, param, settings.lr))
        param = param * (1 - settings.lr * settings.decay) - settings.lr * direction
        total = torch.zeros_like(param)
    return param, state


def check(
    make: Make, level: Level, shapes: Sequence[tuple[int, ...]], settings: UpdateSettings, steps: int = 5
) -> Executor:
    """The executor against the loop, its gradients in other memory layouts now and then."""
    params = [torch.randn(shape, dtype=F64) for shape in shapes]
    wanted = [param.clone() for param in params]
    executor = executor_of(make, level, params)
    taken: list[list[Tensor]] = [[] for _ in shapes]
    for t in range(steps):
        grads = [torch.randn(shape, dtype=F64) for shape in shapes]
        for own, grad in zip(taken, grads, strict=True):
            own.append(grad.clone())
        shown = [grad.mT.contiguous().mT if grad.ndim > 1 and t % 2 else grad for grad in grads]
        ordered = {id(param): grad for param, grad in zip(params, shown, strict=True)}
        executor.step(level, [ordered[id(param)] for param in executor.params], settings)
        assert all(torch.equal(grad, own[-1]) for grad, own in zip(grads, taken, strict=True))
        assert executor.intact()
    for param, first, own in zip(params, wanted, taken, strict=True):
        (slot,) = [slot for slot in executor.slots if slot.param is param]
        want, state = loop(level, first, own, settings)
        torch.testing.assert_close(param, want, rtol=1e-9, atol=1e-9)
        for path, leaf in leaves(state):
            torch.testing.assert_close(slot.state[path], leaf, rtol=1e-9, atol=1e-9, msg=lambda m, p=path: f"{p}: {m}")
        assert slot.state[STEP] == steps
        if settings.period > 1:
            left = sum(own[steps - steps % settings.period :], torch.zeros_like(param))
            torch.testing.assert_close(slot.state[SUM], left, rtol=1e-9, atol=1e-9)
    return executor


every_executor = pytest.mark.parametrize(
    ("executor", "level"), [(executor, level) for executor, (_, choices) in EXECUTORS.items() for level in choices]
)
settings_drawn = st.builds(
    UpdateSettings,
    lr=st.sampled_from([0.1, torch.tensor(0.1, dtype=F64)]),
    decay=st.sampled_from([0.0, 0.5]),
    coupled=st.sampled_from([0.0, 0.3]),
    maximize=st.booleans(),
    period=st.integers(1, 3),
)


@settings(max_examples=8)
@given(
    shapes=st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=4),
    square=st.tuples(st.integers(2, 5), st.integers(2, 5), st.integers(1, 3)),
    settings=settings_drawn,
    piece=st.integers(1, 20),
    small=st.integers(0, 40),
)
@every_executor
def test_equals_the_loop(
    executor: str,
    level: str,
    shapes: list[tuple[int, ...]],
    square: tuple[int, int, int],
    settings: UpdateSettings,
    piece: int,
    small: int,
) -> None:
    make, choices = EXECUTORS[executor]
    if level in WHOLE:
        shapes = [square[:2]] * square[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flat, "PIECE", piece)  # tiny, so that small tensors are cut, and packs many
        patch.setattr(flat, "SMALL", small)
        check(make, choices[level](), shapes, settings)


@pytest.mark.parametrize("level", ELEMENTWISE)
def test_pieces_equal_the_loop_where_torch_has_no_kernel(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat, "kernel_of", lambda level, like: None)
    options = UpdateSettings(0.1, decay=0.2, coupled=0.1, maximize=True, period=2)
    check(Flat, ELEMENTWISE[level](), [(5, 3), (4,)], options)


@settings(max_examples=5)
@given(rates=settings_drawn)
@pytest.mark.parametrize("level", [name for name in ELEMENTWISE | WHOLE if name != "shampoo"])  # it waits for its roots
def test_a_capturable_step_equals_the_loop(level: str, rates: UpdateSettings) -> None:
    own, shapes = (ELEMENTWISE | WHOLE)[level](), [(4, 3), (4, 3), (2, 5)]
    params = [torch.randn(shape, dtype=F64, requires_grad=True) for shape in shapes]
    first, taken = [param.detach().clone() for param in params], [list[Tensor]() for _ in params]
    states = [begin_on_device(own, param, rates.period, None) for param in params]
    for _ in range(5):
        for param, grads in zip(params, taken, strict=True):
            param.grad = torch.randn(param.shape, dtype=F64)
            grads.append(param.grad.clone())
        with torch.no_grad():
            step_capturable(own, params, states, rates, None)
    for param, start_, grads, state in zip(params, first, taken, states, strict=True):
        want, tree = loop(own, start_, grads, rates)
        torch.testing.assert_close(param.detach(), want, rtol=1e-7, atol=1e-7)
        for path, leaf in leaves(tree):
            torch.testing.assert_close(state[path], leaf, rtol=1e-7, atol=1e-7, msg=lambda m, p=path: f"{p}: {m}")


@pytest.mark.parametrize("level", ELEMENTWISE | WHOLE)
def test_a_functional_step_equals_the_loop(level: str) -> None:
    own, param = (ELEMENTWISE | WHOLE)[level](), torch.randn(4, 3, dtype=F64)
    grads, now, state = [torch.randn(4, 3, dtype=F64) for _ in range(5)], {"w": param}, None
    for grad in grads:
        now, state = functional_step(own, now, {"w": grad}, state, lr=0.1, weight_decay=0.5)
    want, tree = loop(own, param, grads, UpdateSettings(0.1, decay=0.5))
    torch.testing.assert_close(now["w"], want, rtol=1e-12, atol=1e-12)
    assert state is not None
    torch.testing.assert_close(dict(leaves(state["levels"]["w"])), dict(leaves(tree)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("decay", [0.0, 0.5, torch.tensor(0.5)])
def test_an_update_is_what_it_says(lr: float | Tensor, decay: float | Tensor) -> None:
    param, direction = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 3.0])
    want = [2 * (1 - 0.1 * float(decay)) - 0.1, -(1 - 0.1 * float(decay)) - 0.3]
    torch.testing.assert_close(update(param, direction, lr, decay).tolist(), want, rtol=1e-6, atol=0)
    assert param.tolist() == [2.0, -1.0]
    own = update(param, param, lr, decay)  # a level may return the parameter itself
    assert update(param, direction, lr, decay, out=param) is param
    torch.testing.assert_close(param.tolist(), want, rtol=1e-6, atol=0)
    param.copy_(torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(update(param, param, lr, decay, out=param), own, rtol=1e-6, atol=0)


def test_adam_without_an_epsilon_does_not_divide_zero_by_zero() -> None:
    """torch's kernel does, and so is left out; `step` has 0 there."""
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.tensor([0.0, 1.0, -1.0])
    for capturable in (False, True):
        optimizer = Nested([param], levels.adam(eps=0.0), lr=0.1, capturable=capturable)
        optimizer.step()
        assert param.detach()[0] == 1.0
        assert param.isfinite().all()


class Slow(Level):
    """Has a kernel of its own, below."""

    batched: ClassVar[bool] = True
    elementwise: ClassVar[bool] = True

    def init(self, param: Tensor) -> State:
        return {"seen": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return grad / 2, {"seen": state["seen"] + grad}


@pytest.mark.parametrize("stack", [Slow(), chain(levels.gd(), Slow())], ids=["alone", "last of a chain"])
@pytest.mark.parametrize("takes", [True, False])
def test_a_level_of_ones_own_may_bring_a_kernel(stack: Level, takes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def kernel(level: Level, params: Any, grads: Any, memories: Any, step: int, numbers: Any) -> bool:
        calls.append((len(params), step, float(numbers.lr), numbers.decay))
        for param, grad, seen in zip(params, grads, memories["seen"], strict=True) if takes else ():
            seen += grad
            param.mul_(1 - numbers.lr * numbers.decay).sub_(numbers.lr * grad / 2)
        return takes

    monkeypatch.setitem(KERNELS, Slow, kernel)
    params = [torch.ones(3, requires_grad=True) for _ in range(2)]
    optimizer = Nested(params, stack, lr=0.1, weight_decay=0.5)
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    for param in params:
        torch.testing.assert_close(param.detach(), torch.full((3,), 0.9))  # 0.95 - 0.05
        (seen,) = (value for key, value in optimizer.state[param].items() if key.endswith("seen"))
        assert torch.equal(seen, torch.ones(3))
    assert calls
    assert all(call[1:] == (1, 0.1, 0.5) for call in calls)


class Recent(Level):
    """Hands one of its memories on to the other."""

    def init(self, param: Tensor) -> State:
        return {"last": torch.zeros_like(param), "before": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        return state["before"], {"last": grad, "before": state["last"]}


@pytest.mark.parametrize("capturable", [False, True])
def test_a_memory_that_is_handed_on_is_not_written_over_before(capturable: bool) -> None:
    param = torch.zeros((), requires_grad=True)
    optimizer = Nested([param], Recent(), lr=1.0, capturable=capturable)
    for t in range(5):
        param.grad = torch.tensor(10.0**t)
        optimizer.step()
    assert param.item() == -111.0  # each gradient, two steps after it was seen


class Doubled(levels.adam):  # type: ignore[misc]
    """Has a `step` of its own, and inherits all else."""

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        direction, state = super().step(grad, state, signal)
        return 2 * direction, state


def test_who_inherits_from_a_level_with_a_kernel_is_run_by_its_own_step() -> None:
    params = [torch.zeros(3, requires_grad=True) for _ in range(2)]
    for param, level in zip(params, (levels.adam(), Doubled()), strict=True):
        param.grad = torch.ones(3)
        Nested([param], level, lr=0.1).step()
    torch.testing.assert_close(params[1], 2 * params[0])


torchs_own = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@torchs_own
@pytest.mark.slow
@pytest.mark.parametrize("level", ["chain", "preconditioned"])
def test_compiled_equals_the_loop(level: str) -> None:
    shapes = [(5, 3), (4,), (70, 70)]
    executor = check(
        Compiled, ELEMENTWISE[level](), shapes, UpdateSettings(0.1, decay=0.2, coupled=0.1, maximize=True, period=2)
    )
    assert isinstance(executor, Compiled)
    assert len(executor.compiled) == 1


def executors_of(optimizer: Nested) -> list[Executor]:
    return [executor for share in optimizer._plan.shares for executor in share.executors]


def feed(optimizer: Nested, steps: range) -> None:
    for t in steps:
        torch.manual_seed(t)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = torch.randn(param.shape, dtype=F64).to(param.dtype)
        optimizer.step()


@torchs_own
@pytest.mark.slow
def test_an_optimizer_compiles_what_has_no_kernel() -> None:
    results = []
    for compile in (False, True):
        torch.manual_seed(0)
        params = [torch.randn(shape).requires_grad_() for shape in [(5, 3), (4,), ()]]
        optimizer = Nested(params, ELEMENTWISE["chain"](), 0.1, 0.1, compile=compile)
        feed(optimizer, range(5))
        assert [type(executor) for executor in executors_of(optimizer)] == [Compiled if compile else Flat]
        results.append(torch.cat([param.detach().flatten() for param in params]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["adam", "muon", "delta_momentum", "second_moment"])
def test_a_bfloat16_parameter_is_stepped_in_float32_and_rounded_once(name: str) -> None:
    level = levels.muon(dtype="float32") if name == "muon" else getattr(levels, name)()
    for count in (1, 3):
        params = [torch.randn(5, 3).bfloat16().requires_grad_() for _ in range(count)]
        wanted, states = [p.detach().clone() for p in params], [start(level, torch.zeros(5, 3)) for _ in params]
        optimizer = Nested(params, copy.deepcopy(level), lr=0.1)
        for t in range(1, 6):
            for i, param in enumerate(params):
                param.grad = torch.randn(5, 3).bfloat16()
                wide = wanted[i].float()
                direction, states[i] = advance(level, param.grad.float(), states[i], Signal(t, wide, 0.1))
                wanted[i] = (wide - 0.1 * direction).bfloat16()
            optimizer.step()
        for param, want, state in zip(params, wanted, states, strict=True):
            torch.testing.assert_close(param.detach(), want, rtol=8e-3, atol=1e-6)  # half a digit of bfloat16
            for path, leaf in leaves(state):
                assert optimizer.state[param][path].dtype == torch.float32
                torch.testing.assert_close(optimizer.state[param][path], leaf, rtol=1e-4, atol=1e-5)


# -- where the states are ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "kind"), [("adam", Flat), ("second_moment", Flat), ("shampoo", Stacked)])
def test_states_are_views_that_outlive_their_buffers(name: str, kind: type[Executor], tmp_path: Path) -> None:
    def made() -> Nested:
        torch.manual_seed(0)
        return Nested([torch.randn(5, 3).requires_grad_() for _ in range(3)], name, lr=0.1)

    optimizer = made()
    feed(optimizer, range(3))
    states = [optimizer.state[param] for param in optimizer.param_groups[0]["params"]]
    for key in states[0].keys() - {STEP}:
        assert len({state[key].untyped_storage().data_ptr() for state in states}) == 1, key
    assert [type(executor) for executor in executors_of(optimizer)] == [kind]

    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    plain = optimizer.state_dict()
    named = {f"{i}.{key}": value for i, state in plain["state"].items() for key, value in state.items()}
    save(tmp_path / "state.safetensors", named, {})
    tensors, _ = load(tmp_path / "state.safetensors")
    back: dict[int, dict[str, Tensor]] = {i: {} for i in plain["state"]}
    for name_, value in tensors.items():
        place, _, key = name_.partition(".")
        back[int(place)][key] = value
    others = [copy.deepcopy(optimizer)]
    for saved in (torch.load(file, weights_only=True), {**plain, "state": back}):
        others.append(made())
        others[-1].load_state_dict(saved)
        for a, b in zip(others[-1].param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
            a.data.copy_(b)
    for each in (optimizer, *others):
        feed(each, range(3, 6))
    for other in others:
        for a, b in zip(other.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
            assert torch.equal(a, b)
            for key, value in optimizer.state[b].items():
                assert torch.equal(other.state[a][key], value), key


def test_an_executor_sees_what_was_replaced() -> None:
    for make, level in ((Flat, levels.adam()), (Stacked, Halving()), (Executor, Halving())):
        executor = executor_of(make, level, [torch.randn(4, 3) for _ in range(2)])
        key = "exp_avg" if make is Flat else "memory"
        assert executor.intact()
        kept = executor.states[1][key]
        executor.states[1][key] = kept.clone()
        assert not executor.intact()
        executor.states[1][key] = kept
        assert executor.intact()
        executor.leave()
        assert not executor.intact()
        assert executor.states[0][STEP] is not executor.states[1][STEP]


# -- memory ------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest memory of all that operations made anew."""

    def __init__(self, known: Sequence[Tensor]) -> None:
        super().__init__()
        self.known, self.bytes = {tensor.untyped_storage().data_ptr() for tensor in known}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return out


def transient(optimizer: torch.optim.Optimizer) -> int:
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.randn(param.shape)
    optimizer.step()
    optimizer.step()
    states = [value for state in optimizer.state.values() for value in state.values()]
    with Largest([*params, *(param.grad for param in params), *states]) as seen:
        optimizer.step()
    return seen.bytes


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_no_transient_of_the_parameters_size(name: str) -> None:
    numbers = 8 * flat.PIECE
    params = [torch.randn(numbers).requires_grad_(), torch.randn(5, 3).requires_grad_()]
    flags = {"momentum": 0.9} if name == "SGD" else {}
    assert transient(getattr(nestopt.optim, name)(params, **flags)) < 100


def test_stacks_of_levels_make_pieces_only() -> None:
    params = [torch.randn(8 * flat.PIECE).requires_grad_() for _ in range(2)]
    assert 0 < transient(Nested(params, ELEMENTWISE["sum"](), weight_decay=0.1)) <= 4 * flat.PIECE


def test_the_measure_sees_what_torch_makes() -> None:
    params = [torch.randn(1000).requires_grad_()]
    assert transient(torch.optim.Adam(params, foreach=True)) == 4000


@torchs_own
@pytest.mark.slow
def test_kernels_of_one_process_do_not_take_each_others_place() -> None:
    """What is compiled is not checked when it is called, so each kernel must have code that no other shares."""
    stacks = [
        levels.momentum(0.9),
        levels.momentum(0.5),
        levels.second_moment(),
        chain(levels.momentum(0.9), levels.adam()),
    ]
    # the last is of one number, which no kernel takes
    shapes = [(300, 300), (7,), (1,)]
    for level in (*stacks, *reversed(stacks)):
        results = []
        for compile in (False, True):
            torch.manual_seed(0)
            params = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in shapes]
            optimizer = Nested(params, level, lr=0.1, compile=compile)
            for _ in range(3):
                for param in params:
                    param.grad = torch.randn_like(param)
                optimizer.step()
            results.append(params)
        for eager, compiled in zip(*results, strict=True):
            torch.testing.assert_close(compiled, eager, rtol=1e-9, atol=1e-12)
