"""`nestopt.train.deepspeed.initialize`: a loop as DeepSpeed's users write it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import nestopt
from tests.distributed.cases import batch, frozen_net, net
from tests.distributed.conftest import FROZEN, LOOPS, OPTIONS, REFUSED, SPEC

pytestmark = pytest.mark.distributed


def alone(spec=SPEC, steps=4, clip=None, gamma=1.0, accumulate=1, model=None, **options):
    """The losses of a plain loop in one process."""
    options = {**OPTIONS, **options}
    model = model or net()
    optimizer = nestopt.optimizer(model, spec, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, gamma)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        whole = batch(step, 0, 1).view(2, 4, -1).unflatten(1, (accumulate, -1))  # as two processes share it
        for part in range(accumulate):
            loss = model(whole[:, part].flatten(0, 1)) / accumulate
            loss.backward()
            losses.append(float(loss.detach()) * accumulate)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
    return losses


WITH = {
    "clipped": {"clip": 0.3},
    "accumulated": {"accumulate": 2},
    "scheduled": {"gamma": 0.5},
}


@pytest.mark.parametrize(("case", "stage"), [loop for loop in LOOPS if "too large" not in loop[0]])
def test_a_loop_gives_what_it_gives_without(ends, case, stage):
    found = ends["initialized", case, stage]["gave"]
    low = "16" in case
    assert found["losses"] == pytest.approx(alone(**WITH.get(case, {})), rel=5e-3 if low else 1e-5)
    assert found["steps"] == [4]  # no clock has ticked at a phantom step
    if case == "scheduled":
        assert found["lr"] == pytest.approx(0.05 * 0.5**4)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_clocks_do_not_tick_at_steps_that_are_skipped(ends, stage):
    """Losses in float16 are scaled by too much at first: those steps are left out, and are none to any level."""
    found = ends["initialized", "fp16, too large a scale", stage]["gave"]
    assert 0 < found["skipped"] < 4
    assert found["steps"] == [4 - found["skipped"]]


@pytest.mark.parametrize("stage", [2, 3])
def test_elementwise_levels_can_be_offloaded(ends, stage):
    losses = ends["offloaded", stage]["gave"]["losses"]
    assert losses == pytest.approx(alone("adam", lr=0.01, rest=None), rel=1e-5)


def test_weights_may_be_cut_up_from_the_start(ends):
    assert ends["cut", "m3"]["gave"]["losses"] == pytest.approx(alone(), rel=1e-5)


def test_inputs_are_those_of_all_processes(ends):
    assert ends["dgd",]["gave"]["losses"] == pytest.approx(alone("dgd"), rel=1e-5)
    assert ends["cut", "dgd"]["gave"]["losses"] == pytest.approx(alone("dgd"), rel=1e-5)


@pytest.mark.parametrize(("save", "load"), [(1, 3), (3, 0), (0, 2)])
def test_what_one_stage_saved_another_loads(ends, save, load):
    whole = ends["longer", save, load]["gave"]["losses"]
    assert ends["saved", save, load]["gave"]["losses"] == pytest.approx(whole[:3], rel=1e-5)
    assert ends["loaded", save, load]["gave"]["losses"] == pytest.approx(whole[3:], rel=1e-5)
    assert ends["loaded", save, load]["gave"]["steps"] == [6]


@pytest.mark.parametrize(("save", "load"), [(3, 3), (3, 0), (0, 3), (2, 1)])
@pytest.mark.parametrize("pattern", FROZEN)
def test_weights_that_are_not_trained_are_saved_and_loaded_too(ends, pattern, save, load):
    whole = alone(steps=6, model=frozen_net(pattern, moved=True))
    assert whole != pytest.approx(alone(steps=6, model=frozen_net(pattern, moved=False)), rel=1e-3)
    assert ends["frozen", "saved", pattern, save, load]["gave"]["losses"] == pytest.approx(whole[:3], rel=1e-5)
    assert ends["frozen", "loaded", pattern, save, load]["gave"]["losses"] == pytest.approx(whole[3:], rel=1e-5)


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_s_own_checkpoints_have_the_states_too(ends, stage):
    assert ends["theirs", "saved", stage]["gave"]["steps"] == [3]
    whole = ends["longer",]["gave"]["losses"]
    assert ends["theirs", "loaded", stage]["gave"]["losses"] == pytest.approx(whole[3:], rel=1e-5)
    assert ends["theirs", "loaded", stage]["gave"]["steps"] == [6]


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_something_else_is_refused(ends, case):
    for word in REFUSED[case][2]:
        assert word in ends["refused", case]["refused"]
