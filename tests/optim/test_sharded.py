"""A nest whose parameters lie elsewhere, in one process; over several: tests/distributed."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import nestopt
from nestopt.levels import adam, delta_momentum, muon
from nestopt.optim import Nested
from nestopt.optim.sharded.optimizer import Placement, Sharded
from nestopt.optim.sharded.saved import CheckpointMismatch, StateKeys, load_sliced
from nestopt.optim.sharded.slices import Slice, check_cover
from nestopt.optim.sharded.units import Flat, rounds


def pieces(cuts, shape=(4, 5)):
    ends = [0, *sorted(cuts), 20]
    return [[Slice("w", shape, low, high - low)] for low, high in itertools.pairwise(ends)]


@given(st.lists(st.integers(0, 20), max_size=4))
def test_slices_that_make_a_tensor_up_pass(cuts):
    check_cover(pieces(cuts))


@pytest.mark.parametrize(
    "tables",
    [
        [[Slice("w", (4, 5), 0, 10)], [Slice("w", (4, 5), 11, 9)]],
        [[Slice("w", (4, 5), 0, 11)], [Slice("w", (4, 5), 10, 10)]],
        [[Slice("w", (4, 5), 0, 10)]],
        [[Slice("w", (4, 5), 0, 10)], [Slice("w", (5, 4), 10, 10)]],
    ],
    ids=["gap", "twice", "end", "shape"],
)
def test_slices_that_do_not_are_named(tables):
    with pytest.raises(RuntimeError, match=r"slices of w \[4, 5\]"):
        check_cover(tables)


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=4), st.tuples(st.integers(1, 9), st.integers(0, 2)), min_size=1
    ),
    st.integers(1, 20),
)
def test_rounds_have_every_parameter_once_and_no_owner_too_much(given, limit):
    shapes = {name: (numel,) for name, (numel, _) in given.items()}
    owner = {name: rank for name, (_, rank) in given.items()}
    found = rounds(shapes, owner, 3, limit)
    assert sorted(name for names in found for name in names) == sorted(shapes)
    assert all(found)
    for names in found:
        for rank in range(3):
            mine = [shapes[name][0] for name in names if owner[name] == rank]
            assert sum(mine) <= limit or len(mine) == 1


def test_what_is_not_elementwise_is_not_shown_slices():
    params = [nn.Parameter(torch.ones(4, 5))]
    nested = Nested([{"params": params, "stack": delta_momentum()}])
    with pytest.raises(TypeError, match="delta_momentum does not work entry by entry"):
        Flat(nested, nested.param_groups[0], [torch.ones(20)], [Slice("w", (4, 5), 0, 20)])


@pytest.mark.parametrize("level", [muon(), delta_momentum()], ids=["matrix", "shape"])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_flat_tensor_in_the_place_of_a_matrix_is_refused(level, capturable):
    """As DeepSpeed puts it into the groups of an optimizer that it is given as it stands."""
    optimizer = Nested([nn.Parameter(torch.ones(4, 5))], level, capturable=capturable)
    flat = nn.Parameter(torch.ones(20))
    flat.grad = torch.ones(20)
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match=r"true shape.*\[20\].*initialize"):
        optimizer.step()
    with contextlib.suppress(ValueError):  # matrices are asked for there already
        optimizer.load_state_dict(optimizer.state_dict())  # which must not make it one of its own
    with pytest.raises(RuntimeError, match="true shape"):
        optimizer.step()
    adams = Nested([nn.Parameter(torch.ones(4, 5))], adam(), capturable=capturable)
    adams.param_groups[0]["params"] = [flat]
    adams.step()  # entry by entry there is no shape to be seen


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def test_before_it_is_attached_no_clock_ticks():
    net = model()
    optimizer = Sharded(nestopt.optimizer(net, "adam", lr=0.1))
    before = [param.detach().clone() for param in net.parameters()]
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
    optimizer.attach([Placement(i, g["params"], g["params"]) for i, g in enumerate(optimizer.param_groups)])
    optimizer.step()
    assert {int(s["step"]) for unit in optimizer.units() for n in unit.inner() for s in n.state.values()} == {1}


def test_steps_are_those_of_the_nest_itself_and_schedules_are_followed():
    one, other = model(), model()
    plain = nestopt.optimizer(one, "muon", lr=0.1)
    sharded = Sharded(nestopt.optimizer(other, "muon", lr=0.1))
    sharded.attach([Placement(i, g["params"], g["params"]) for i, g in enumerate(sharded.param_groups)])
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5) for optimizer in (plain, sharded)]
    for step in range(4):
        x = torch.full((2, 3), 0.1 * (step + 1))
        for net, optimizer, schedule in zip((one, other), (plain, sharded), schedules, strict=True):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
            schedule.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_what_starts_at_random_is_drawn_by_name():
    """In whatever order states begin, and whatever was drawn before."""

    def state(names, draws):
        params = {name: nn.Parameter(torch.ones(4, 4)) for name in names}
        torch.manual_seed(7)
        optimizer = Sharded(
            Nested([{"params": list(params.items()), "stack": nestopt.build("level", "deep_momentum")}])
        )
        optimizer.attach([Placement(0, list(params.values()), list(params.values()))])
        torch.rand(draws)
        before = torch.get_rng_state()
        for param in params.values():
            param.grad = torch.eye(4)
        optimizer.step()
        assert torch.equal(before, torch.get_rng_state())
        return {key: item.values for key, item in optimizer.states()}

    one, other = state("ab", 0), state("ba", 3)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert any(
        not torch.equal(one[key], one[key.replace("optimizer.a|", "optimizer.b|")]) for key in one if "W2" in key
    )


class Given:
    """What was saved, by name."""

    def __init__(self, tensors):
        self.tensors = tensors

    def keys(self):
        return self.tensors

    def shape(self, key):
        return tuple(self.tensors[key].shape)

    def whole(self, key):
        return self.tensors[key]

    def stretch(self, key, start, size):
        return self.tensors[key].flatten()[start : start + size]


def test_slices_of_one_tensor_must_be_at_one_step():
    table = [Slice("a", (2,), 0, 2, 0, 0), Slice("b", (3,), 0, 3, 0, 2)]
    tensors = {
        "optimizer.a|step": torch.tensor(2.0),
        "optimizer.a|m": torch.ones(2),
        "optimizer.b|step": torch.tensor(2.0),
        "optimizer.b|m": torch.zeros(3),
    }
    saved = Given(tensors)
    found = load_sliced(saved, StateKeys(saved), table, 0, torch.zeros(6))
    assert torch.equal(found["m"], torch.tensor([1.0, 1, 0, 0, 0, 0]))
    tensors["optimizer.b|step"] = torch.tensor(3.0)
    with pytest.raises(CheckpointMismatch, match="a is at step 2 and b at step 3"):
        load_sliced(saved, StateKeys(saved), table, 0, torch.zeros(6))
    del tensors["optimizer.b|m"], tensors["optimizer.b|step"]
    with pytest.raises(CheckpointMismatch, match="a has the state"):
        load_sliced(saved, StateKeys(saved), table, 0, torch.zeros(6))


@pytest.mark.parametrize("ways", [{"on_nonfinite": "skip"}, {"capturable": True}, {"metrics": True}])
def test_ways_that_processes_would_differ_in_are_refused(ways):
    with pytest.raises(ValueError, match="each decide for themselves"):
        Sharded(Nested([nn.Parameter(torch.ones(2))], **ways))


def test_layers_that_are_not_watched_are_named_once(caplog):
    net = model()
    optimizer = Sharded(nestopt.optimizer(list(net.named_parameters()), "dgd", route="all"))
    optimizer.attach([Placement(i, g["params"], g["params"]) for i, g in enumerate(optimizer.param_groups)])
    for _ in range(2):
        net(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    said = [record.getMessage() for record in caplog.records if "has not seen" in record.getMessage()]
    assert len(said) == 1
    assert "0.weight, 2.weight" in said[0]


def test_inputs_are_summed_over_a_group_s_period():
    """And the count goes on where a checkpoint has it."""
    one, other = model(), model()
    groups = [{"match": "weight", "period": 2}]
    plain = nestopt.optimizer(one, "dgd", lr=0.1, groups=groups)
    found = None
    for step in range(4):
        if step % 3 == 0:  # anew, in the middle of a period
            sharded = Sharded(nestopt.optimizer(other, "dgd", lr=0.1, groups=groups))
            sharded.attach([Placement(i, g["params"], g["params"]) for i, g in enumerate(sharded.param_groups)])
            if found is not None:
                sharded.load_state_dict(found)
        x = torch.full((2, 3), 0.1 * (step + 1))
        for net, optimizer in ((one, plain), (other, sharded)):
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
        found = sharded.state_dict()
        if step == 1:
            for a, b in zip(one.parameters(), other.parameters(), strict=True):
                assert torch.equal(a, b)
    assert sharded.param_groups[0]["steps_taken"] == 4


@pytest.mark.parametrize("shared", [False, True], ids=["nested", "sharded"])
def test_forgetting_gradients_leaves_the_inputs_of_a_period(shared):
    """Two steps of a period, with `zero_grad` between, are one step on the gradients and inputs of both batches."""
    torch.manual_seed(1)
    batches = [torch.randn(2, 3) for _ in range(4)]
    slow, once = model(), model()
    optimizer = nestopt.optimizer(
        slow, "dgd", lr=0.1, groups=[{"match": "weight", "period": 2}, {"match": "bias", "lr": 0.0}]
    )
    twin = nestopt.optimizer(once, "dgd", lr=0.1, groups=[{"match": "bias", "lr": 0.0}])
    if shared:
        optimizer = Sharded(optimizer)
        optimizer.attach([Placement(i, g["params"], g["params"]) for i, g in enumerate(optimizer.param_groups)])
    for i, x in enumerate(batches):
        optimizer.zero_grad()
        slow(x).square().sum().backward()
        optimizer.step()
        once(x).square().sum().backward()
        if i % 2:
            twin.step()
            twin.zero_grad()
    for a, b in zip(slow.parameters(), once.parameters(), strict=True):
        torch.testing.assert_close(a, b)
