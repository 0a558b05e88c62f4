"""Every way of running a level over many tensors gives the numbers of the plain loop over `advance`."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
from nestopt.optim import Nested
from nestopt.optim.lanes import STEP, SUM, Lane, Member, Rates, pieces
from nestopt.optim.lanes.compiled import CompiledLane
from nestopt.optim.lanes.fused import FusedLane
from nestopt.optim.lanes.pieces import PiecesLane
from nestopt.optim.lanes.stacks import StackLane
from nestopt.train.checkpoints.file import load, save

F64 = torch.float64
Make = Callable[[Level, Sequence[Member]], Lane]


class Halving(Level):
    """Is not `batched`, so that `vmap` has to do it; and not entrywise."""

    def init(self, param: Tensor) -> State:
        return {"memory": torch.zeros_like(param), "inner": {"length": param.new_zeros(())}}

    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        length = 0.5 * state["inner"]["length"] + grad.square().sum()
        memory = 0.5 * state["memory"] + grad / (1 + length)
        return memory, {"memory": memory, "inner": {"length": length}}


ENTRYWISE: dict[str, Callable[[], Level]] = {
    "gd": levels.gd,
    "nesterov": lambda: levels.momentum(0.8, nesterov=True),
    "dampened": lambda: levels.momentum(0.8, 0.3, undamped_start=True),
    "amsgrad": lambda: levels.adam(amsgrad=True),
    "adamw": lambda: levels.adamw(weight_decay=0.2),
    "on a clock": lambda: levels.adam(period=2),
    "chain": lambda: chain(levels.momentum(0.5, period=2), levels.adam()),
    "sum": lambda: parallel(a=levels.adam(), b=chain(levels.momentum(), levels.gd()), weights=[0.5, 2.0]),
    "preconditioned": levels.preconditioned_momentum,
}
WHOLE: dict[str, Callable[[], Level]] = {
    "vmapped": Halving,
    "vmapped on a clock": lambda: chain(levels.adam(), Halving(period=2)),
    "batched": lambda: levels.muon(dtype="float64", steps=2),
    "m3": lambda: levels.m3(slow_period=2, dtype="float64", steps=2),
    "shampoo": lambda: levels.shampoo(root_every=2),
    "delta": levels.delta_momentum,
}
LANES: dict[str, tuple[Make, dict[str, Callable[[], Level]]]] = {
    "Lane": (Lane, ENTRYWISE | WHOLE),
    "packed": (PiecesLane, ENTRYWISE),
    "unpacked": (lambda level, members: PiecesLane(level, members, packed=False), ENTRYWISE),
    "fused": (FusedLane, {name: ENTRYWISE[name] for name in ("gd", "nesterov", "dampened", "amsgrad", "adamw")}),
    "fused, unpacked": (
        lambda level, members: FusedLane(level, members, packed=False),
        {name: ENTRYWISE[name] for name in ("nesterov", "amsgrad")},
    ),
    "stack": (StackLane, WHOLE),
}


def lane_of(make: Make, level: Level, params: Sequence[Tensor]) -> Lane:
    members = []
    for param in params:
        tree = start(level, param)
        members.append(Member(param, {STEP: torch.zeros(()), **dict(leaves(tree))}, tree))
    return make(level, members)


def loop(level: Level, param: Tensor, grads: Sequence[Tensor], rates: Rates) -> tuple[Tensor, State]:
    """The definition: `Level.step` on the level's clock, the group's clock, and the step along its direction."""
    state, total, writes = start(level, param), torch.zeros_like(param), 0
    for t, grad in enumerate(grads, start=1):
        total = total + grad
        if t % rates.period:
            continue
        writes += 1
        shown = (-total if rates.maximize else total) + rates.coupled * param
        direction, state = advance(level, shown, state, Signal(writes, param, rates.lr))
        param = param * (1 - rates.lr * rates.decay) - rates.lr * direction
        total = torch.zeros_like(param)
    return param, state


def check(make: Make, level: Level, shapes: Sequence[tuple[int, ...]], rates: Rates, steps: int = 5) -> Lane:
    """The lane against the loop, its gradients in other memory layouts now and then."""
    params = [torch.randn(shape, dtype=F64) for shape in shapes]
    wanted = [param.clone() for param in params]
    lane = lane_of(make, level, params)
    taken: list[list[Tensor]] = [[] for _ in shapes]
    for t in range(steps):
        grads = [torch.randn(shape, dtype=F64) for shape in shapes]
        for own, grad in zip(taken, grads, strict=True):
            own.append(grad.clone())
        shown = [grad.mT.contiguous().mT if grad.ndim > 1 and t % 2 else grad for grad in grads]
        ordered = {id(param): grad for param, grad in zip(params, shown, strict=True)}
        lane.step(level, [ordered[id(param)] for param in lane.params], rates)
        assert all(torch.equal(grad, own[-1]) for grad, own in zip(grads, taken, strict=True))
        assert lane.intact()
    for param, first, own in zip(params, wanted, taken, strict=True):
        (member,) = [member for member in lane.members if member.param is param]
        want, state = loop(level, first, own, rates)
        torch.testing.assert_close(param, want, rtol=1e-9, atol=1e-9)
        for path, leaf in leaves(state):
            torch.testing.assert_close(
                member.state[path], leaf, rtol=1e-9, atol=1e-9, msg=lambda m, p=path: f"{p}: {m}"
            )
        assert member.state[STEP] == steps
        if rates.period > 1:
            left = sum(own[steps - steps % rates.period :], torch.zeros_like(param))
            torch.testing.assert_close(member.state[SUM], left, rtol=1e-9, atol=1e-9)
    return lane


every_lane = pytest.mark.parametrize(
    ("lane", "level"), [(lane, level) for lane, (_, choices) in LANES.items() for level in choices]
)
rates_drawn = st.builds(
    Rates,
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
    rates=rates_drawn,
    piece=st.integers(1, 20),
    small=st.integers(0, 40),
)
@every_lane
def test_equals_the_loop(
    lane: str,
    level: str,
    shapes: list[tuple[int, ...]],
    square: tuple[int, int, int],
    rates: Rates,
    piece: int,
    small: int,
) -> None:
    make, choices = LANES[lane]
    if level in WHOLE:
        shapes = [square[:2]] * square[2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE", piece)  # tiny, so that small tensors are cut, and packs many
        patch.setattr(pieces, "SMALL", small)
        check(make, choices[level](), shapes, rates)


torchs_own = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")


@torchs_own
@pytest.mark.slow
@pytest.mark.parametrize("level", ["chain", "preconditioned"])
def test_compiled_equals_the_loop(level: str) -> None:
    shapes = [(5, 3), (4,), (70, 70)]
    lane = check(CompiledLane, ENTRYWISE[level](), shapes, Rates(0.1, decay=0.2, coupled=0.1, maximize=True, period=2))
    assert isinstance(lane, CompiledLane)
    assert len(lane._kernels) == 1


def lanes_of(optimizer: Nested) -> list[Lane]:
    return [lane for share in optimizer._plan._shares for lane, _ in share.lanes]


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
        optimizer = Nested(params, ENTRYWISE["chain"](), 0.1, 0.1, compile=compile)
        feed(optimizer, range(5))
        assert [type(lane) for lane in lanes_of(optimizer)] == [CompiledLane if compile else PiecesLane]
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


@pytest.mark.parametrize(("name", "kind"), [("adam", FusedLane), ("second_moment", PiecesLane), ("shampoo", StackLane)])
def test_states_are_views_that_outlive_their_buffers(name: str, kind: type[Lane], tmp_path: Path) -> None:
    def made() -> Nested:
        torch.manual_seed(0)
        return Nested([torch.randn(5, 3).requires_grad_() for _ in range(3)], name, lr=0.1)

    optimizer = made()
    feed(optimizer, range(3))
    states = [optimizer.state[param] for param in optimizer.param_groups[0]["params"]]
    for key in states[0].keys() - {STEP}:
        assert len({state[key].untyped_storage().data_ptr() for state in states}) == 1, key
    assert [type(lane) for lane in lanes_of(optimizer)] == [kind]

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


def test_a_lane_sees_what_was_replaced() -> None:
    for make, level in ((PiecesLane, levels.adam()), (StackLane, Halving()), (Lane, Halving())):
        lane = lane_of(make, level, [torch.randn(4, 3) for _ in range(2)])
        key = "exp_avg" if make is PiecesLane else "memory"
        assert lane.intact()
        kept = lane.states[1][key]
        lane.states[1][key] = kept.clone()
        assert not lane.intact()
        lane.states[1][key] = kept
        assert lane.intact()
        lane.leave()
        assert not lane.intact()
        assert lane.states[0][STEP] is not lane.states[1][STEP]


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
    numbers = 8 * pieces.PIECE
    params = [torch.randn(numbers).requires_grad_(), torch.randn(5, 3).requires_grad_()]
    flags = {"momentum": 0.9} if name == "SGD" else {}
    assert transient(getattr(nestopt.optim, name)(params, **flags)) < 100


def test_stacks_of_levels_make_pieces_only() -> None:
    params = [torch.randn(8 * pieces.PIECE).requires_grad_() for _ in range(2)]
    assert 0 < transient(Nested(params, ENTRYWISE["sum"](), weight_decay=0.1)) <= 4 * pieces.PIECE


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
