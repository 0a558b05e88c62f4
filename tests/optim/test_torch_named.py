"""`nestopt.optim.SGD`, `Adam`, `AdamW` and `Muon` against torch's own, fed the same gradients."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler

import nestopt.optim

STEPS = 100
DTYPES = [torch.float32, torch.float64]
TOLERANCE = {torch.float32: 2e-7, torch.float64: 1e-12}
"""Of the distance after 100 steps. torch's own forms (a loop, fused) differ by as much from each other."""

ANY = [(6, 5), (6, 5), (4,), (2, 3, 2), ()]
"""Shapes that come twice are stacked."""
MATRICES = [(8, 8), (8, 8), (12, 9), (7, 5), (7, 5), (1, 6)]


def params(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    made = [torch.randn(shape, dtype=dtype) for shape in shapes]
    made.append(torch.randn(9, 8, dtype=dtype).mT)  # not contiguous
    return [param.requires_grad_() for param in made]


def twins(
    name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, **flags: Any
) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """torch's optimizer and ours on equal parameters."""
    own = {"ns_form": "standard"} if name == "Muon" else {}
    theirs = params(shapes, dtype)
    ours = [param.detach().clone().requires_grad_() for param in theirs]
    return getattr(torch.optim, name)(theirs, **flags), getattr(nestopt.optim, name)(ours, **flags, **own)


def weights(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def feed(theirs: torch.optim.Optimizer, ours: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        step(theirs, ours)


def step(theirs: torch.optim.Optimizer, ours: torch.optim.Optimizer) -> None:
    for a, b in zip(weights(theirs), weights(ours), strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    theirs.step()
    ours.step()


def distance(theirs: torch.optim.Optimizer, ours: torch.optim.Optimizer) -> float:
    """How far ours are from theirs, relative to their norm, all parameters together."""
    a, b = (torch.cat([w.detach().flatten() for w in weights(o)]) for o in (theirs, ours))
    return float((a - b).norm() / a.norm())


def check(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, **flags: Any) -> None:
    theirs, ours = twins(name, shapes, dtype, **flags)
    before = [param.detach().clone() for param in weights(ours)]
    feed(theirs, ours, STEPS)
    assert distance(theirs, ours) <= TOLERANCE[dtype]
    assert all(not torch.equal(a, b) for a, b in zip(before, weights(ours), strict=True))


def every(**choices: list[Any]) -> Iterator[dict[str, Any]]:
    """All combinations of flags."""
    for values in itertools.product(*choices.values()):
        yield dict(zip(choices, values, strict=True))


SGD = [
    flags
    for flags in every(
        momentum=[0, 0.9], dampening=[0, 0.3], nesterov=[False, True], weight_decay=[0, 0.05], maximize=[False, True]
    )
    if not (flags["nesterov"] and (flags["dampening"] or not flags["momentum"]))
]
ADAM = [
    *every(weight_decay=[0, 0.05], amsgrad=[False, True], maximize=[False, True], decoupled_weight_decay=[False, True]),
    *every(betas=[(0.0, 0.5), (0.9, 0.9)], eps=[0.0, 1e-3], amsgrad=[False, True]),
]
ADAMW = list(every(weight_decay=[0, 0.05], amsgrad=[False, True], maximize=[False, True]))
MUON = [
    *every(
        momentum=[0.0, 0.9], nesterov=[False, True], weight_decay=[0, 0.1], adjust_lr_fn=["original", "match_rms_adamw"]
    ),
    {"adjust_lr_fn": None},
    {"ns_steps": 0},
    {"ns_steps": 3, "ns_coefficients": (3.0, -4.0, 2.0)},
    {"ns_steps": 1, "ns_coefficients": (1.5, -0.5, 0.0), "eps": 10.0},
]


def words(flags: dict[str, Any]) -> str:
    return "-".join(f"{key}={value}" for key, value in flags.items() if value not in (0, False, None))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", SGD, ids=words)
def test_sgd(flags: dict[str, Any], dtype: torch.dtype) -> None:
    check("SGD", ANY, dtype, lr=0.05, **flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", ADAM, ids=words)
def test_adam(flags: dict[str, Any], dtype: torch.dtype) -> None:
    check("Adam", ANY, dtype, lr=0.01, **flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", ADAMW, ids=words)
def test_adamw(flags: dict[str, Any], dtype: torch.dtype) -> None:
    check("AdamW", ANY, dtype, lr=0.01, **flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", MUON, ids=words)
def test_muon(flags: dict[str, Any], dtype: torch.dtype) -> None:
    check("Muon", MATRICES, dtype, lr=0.02, **flags)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Muon"])
def test_defaults_one_tensor_at_a_time(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nestopt.optim.execute.flat, "SMALL", 0)
    check(name, MATRICES if name == "Muon" else ANY, dtype)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_tensors_too_large_to_stack(name: str) -> None:
    theirs, ours = twins(name, [(257, 256), (257, 256)], torch.float32, lr=0.01)
    feed(theirs, ours, 20)
    assert distance(theirs, ours) <= 1e-7


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Muon"])
def test_learning_rate_as_a_tensor(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    lr = torch.full(shape, 0.01, dtype=dtype)
    # torch's own can't add a learning rate of shape [1] to a parameter without dimensions
    shapes = MATRICES if name == "Muon" else [s for s in ANY if s or not shape]
    check(name, shapes, dtype, lr=lr, weight_decay=0.1)
    assert torch.equal(lr, torch.full(shape, 0.01, dtype=dtype))


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_learning_rate_of_one_element_on_a_parameter_without_dimensions(name: str) -> None:
    ours = [torch.ones((), requires_grad=True) for _ in range(2)]
    for param, lr in zip(ours, [0.1, torch.tensor([0.1])], strict=True):
        param.grad = torch.ones(())
        getattr(nestopt.optim, name)([param], lr=lr, weight_decay=0.1).step()
    torch.testing.assert_close(ours[1], ours[0], rtol=1e-6, atol=0)


# -- schedulers --------------------------------------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 7, 0.5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.02, total_steps=40),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 9),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=2),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("SGD", torch.float32),
        ("SGD", torch.float64),
        ("Adam", torch.float32),
        ("AdamW", torch.float64),
        ("Muon", torch.float64),
    ],
)
def test_torch_schedulers(name: str, dtype: torch.dtype, scheduler: str) -> None:
    flags = {"momentum": 0.9} if name in ("SGD", "Muon") else {}
    theirs, ours = twins(name, MATRICES if name == "Muon" else ANY, dtype, lr=0.01, **flags)
    schedules = SCHEDULERS[scheduler](theirs), SCHEDULERS[scheduler](ours)
    seen = set()
    for t in range(40):
        step(theirs, ours)
        for schedule in schedules:
            schedule.step(*([float(t < 20)] if scheduler == "ReduceLROnPlateau" else []))
        for key in ("lr", "momentum", "betas"):
            assert ours.param_groups[0].get(key) == theirs.param_groups[0].get(key)
        group = ours.param_groups[0]
        seen.add((group["lr"], group.get("momentum"), group.get("betas")))
    assert len(seen) > 2
    if scheduler == "OneCycleLR":
        assert len({settings[1:] for settings in seen}) > 20  # the momentum was cycled
    assert distance(theirs, ours) <= TOLERANCE[dtype]


# -- torch's checkpoints -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("SGD", {}),
        ("SGD", {"momentum": 0.9, "dampening": 0.3}),
        ("SGD", {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        ("Adam", {}),
        ("Adam", {"amsgrad": True}),
        ("Adam", {"weight_decay": 0.1, "decoupled_weight_decay": True}),
        ("AdamW", {"betas": (0.5, 0.9)}),
        ("Muon", {}),
    ],
)
def test_checkpoint_of_torch_goes_on_here(name: str, flags: dict[str, Any], dtype: torch.dtype) -> None:
    shapes = MATRICES if name == "Muon" else ANY
    theirs, _ = twins(name, shapes, dtype, lr=0.01, **flags)
    feed(theirs, theirs, 10)
    file = io.BytesIO()
    torch.save(theirs.state_dict(), file)
    file.seek(0)
    # other settings: the checkpoint's count
    own = {"ns_form": "standard"} if name == "Muon" else {}
    start = [w.detach().clone().requires_grad_() for w in weights(theirs)]
    ours = getattr(nestopt.optim, name)(start, lr=0.5, **own)
    ours.load_state_dict(torch.load(file, weights_only=True))
    assert ours.param_groups[0]["lr"] == 0.01
    feed(theirs, ours, 40)
    assert distance(theirs, ours) <= TOLERANCE[dtype]


def test_checkpoint_of_torch_with_narrow_state_is_widened() -> None:
    theirs, _ = twins("AdamW", ANY, torch.bfloat16)
    feed(theirs, theirs, 3)
    ours = nestopt.optim.AdamW([w.detach().clone().requires_grad_() for w in weights(theirs)])
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(weights(theirs), weights(ours), strict=True):
        assert ours.state[b]["exp_avg"].dtype == torch.float32
        assert torch.equal(ours.state[b]["exp_avg"], theirs.state[a]["exp_avg"].float())
    feed(theirs, ours, 1)


@pytest.mark.parametrize(("saved", "loaded"), [("SGD", "Adam"), ("Adam", "SGD"), ("SGD", "Muon"), ("Muon", "SGD")])
def test_checkpoint_of_another_class_is_refused(saved: str, loaded: str) -> None:
    flags = {"momentum": 0.9} if saved == "SGD" else {}
    theirs, _ = twins(saved, [(8, 8)], torch.float32, **flags)
    feed(theirs, theirs, 2)
    _, ours = twins(loaded, [(8, 8)], torch.float32)
    with pytest.raises(ValueError, match=r"param_groups\[0\]: the checkpoint lacks \['.*another optimizer"):
        ours.load_state_dict(theirs.state_dict())


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("SGD", {"lr": -1.0}),
        ("SGD", {"lr": torch.ones(2)}),
        ("SGD", {"momentum": -0.1}),
        ("SGD", {"weight_decay": -0.1}),
        ("SGD", {"nesterov": True}),
        ("SGD", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}),
        ("Adam", {"betas": (1.0, 0.9)}),
        ("Adam", {"betas": (0.9, -0.1)}),
        ("Adam", {"eps": -1.0}),
        ("AdamW", {"weight_decay": -0.1}),
        ("Muon", {"momentum": -0.1}),
        ("Muon", {"adjust_lr_fn": "other"}),
        ("Muon", {"lr": -0.1}),
    ],
)
def test_what_torch_refuses_is_refused(name: str, flags: dict[str, Any]) -> None:
    for module in (torch.optim, nestopt.optim):
        with pytest.raises(ValueError):  # noqa: PT011  # the words differ
            getattr(module, name)(params([(8, 8)], torch.float32), **flags)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_a_flag_that_can_not_be_honoured_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: differentiable=True is not allowed.*functional_step"):
        getattr(nestopt.optim, name)(params([(8, 8)], torch.float32), differentiable=True)


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_capturable(name: str) -> None:
    theirs = params(ANY, torch.float64)  # torch's own has no capturable steps on a CPU
    ours = [param.detach().clone().requires_grad_() for param in theirs]
    lr = torch.tensor(0.01, dtype=torch.float64)
    a = getattr(torch.optim, name)(theirs, lr=lr, weight_decay=0.1)
    b = getattr(nestopt.optim, name)(ours, lr=lr, weight_decay=0.1, capturable=True)
    feed(a, b, 20)
    assert distance(a, b) <= TOLERANCE[torch.float64]


def test_muon_in_its_fast_form_is_close_to_torchs() -> None:
    """torch's own bfloat16 rounding is a percent of a direction; another form or dtype moves no farther."""
    theirs = params([(32, 96), (96, 32), (48, 48)], torch.float32)
    ours = [param.detach().clone().requires_grad_() for param in theirs]
    before = torch.cat([param.detach().flatten() for param in ours])
    a, b = torch.optim.Muon(theirs, lr=0.02), nestopt.optim.Muon(ours, lr=0.02)
    feed(a, b, 10)
    moved = torch.cat([param.detach().flatten() for param in ours]) - before
    assert distance(a, b) * float(before.norm()) < 0.03 * float(moved.norm())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_speed_hints_of_torch_are_taken(name: str) -> None:
    for hint in ("foreach", "fused"):
        getattr(nestopt.optim, name)(params([(8, 8)], torch.float32), **{hint: True})


def test_muon_refuses_a_vector_by_name() -> None:
    with pytest.raises(ValueError, match=r"muon takes matrices, and bias has shape \(3,\)"):
        nestopt.optim.Muon([("bias", torch.ones(3, requires_grad=True))])


@pytest.mark.parametrize("dtype", DTYPES)
def test_momentum_may_begin_later(dtype: torch.dtype) -> None:
    """A schedule that starts at momentum 0, turns it on, and off again."""
    theirs, ours = twins("SGD", ANY, dtype, lr=0.05)
    for momentum in (0.0, 0.9, 0.0, 0.5):
        for optimizer in (theirs, ours):
            for group in optimizer.param_groups:
                group["momentum"] = momentum
        feed(theirs, ours, 5)
    assert distance(theirs, ours) <= TOLERANCE[dtype]
