"""`self_modifying` as a level: on gradients by hand, on tokens one by one, as a rule; what it refuses and says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import nestopt
from nestopt.config import build, to_spec
from nestopt.core import Gate, Level, Signal, chain, gates_of, scan
from nestopt.core.clock import advance, start
from nestopt.core.memories import Mlp, Swiglu
from nestopt.core.part import FieldError
from nestopt.core.tree import State, leaves, tree_map
from nestopt.description import describe
from nestopt.levels import deltanet, gd, self_modifying, titans
from nestopt.optim import Nested
from tests.levels.deep.deep_twin import Mlp as SlowMlp
from tests.levels.deep.deep_twin import step_norms
from tests.levels.gradient.tools import randoms, run, same
from tests.levels.self_modifying.self_twin import cut, surprise, twin, unit

F64 = torch.float64
ALL = ("k", "v", "q", "eta", "alpha")


# -- on gradients ------------------------------------------------------------------------------------------------------


def test_the_first_direction_is_the_gradient() -> None:
    for grad in (torch.randn(5, 3, dtype=F64), torch.randn(4, dtype=F64), torch.randn(3, 2, 2, 2, dtype=F64)):
        for level in (self_modifying(), self_modifying(adaptive=ALL, momentum=0.5, normalized=False)):
            direction, _ = advance(level, grad, start(level, grad), Signal(1, torch.zeros_like(grad)))
            same(direction, grad)


def by_hand(level: Any, box: State, tokens: dict[str, list[Tensor]]) -> State:
    """A memory after rows that come together."""
    mlp = SlowMlp(level.memory.activation, True, level.memory.norm)
    weights = [box["weights"][f"W{i}"] for i in (1, 2)]
    inputs = [mlp.passes(weights, k)[0] for k in tokens["k"]]
    theta, keep = level.momentum or 0.0, torch.stack(tokens["alpha"]).mean()
    felt = [mlp.sensitivity(weights, k) for k in tokens["k"]]
    norms = step_norms(inputs, felt, level.delta, ahead=True)
    change = [torch.zeros_like(w) for w in weights]
    decay = [torch.zeros_like(w) for w in weights]
    for t, (k, v) in enumerate(zip(tokens["k"], tokens["v"], strict=True)):
        eta, value = level.eta_max * tokens["eta"][t], mlp.read(weights, v)
        if level.normalized:
            eta = tokens["eta"][t] * level.bound * tokens["alpha"][t] * (1 - theta) / (1e-4 + norms[t])
            value = cut(value, v)
        change = [c + eta * g for c, g in zip(change, surprise(mlp, weights, k, value), strict=True)]
        decay = [
            d + level.delta * eta * torch.outer(w @ a, a) for d, w, a in zip(decay, weights, inputs[t], strict=True)
        ]
    if level.momentum is not None:
        change = [theta * box["momentum"][f"W{i}"] + c for i, c in enumerate(change, start=1)]
    moved = [keep * w - d - c for w, d, c in zip(weights, decay, change, strict=True)]
    found: State = {"weights": {f"W{i}": w for i, w in enumerate(moved, start=1)}}
    if level.momentum is not None:
        found["momentum"] = {f"W{i}": c for i, c in enumerate(change, start=1)}
    return found


LEVELS = {
    "defaults": {},
    "momentum": {"momentum": 0.7, "adaptive": ALL},
    "no delta decay": {"delta": 0.0, "momentum": 0.3},
    "raw": {"normalized": False, "eta_max": 0.1, "delta": 0.5},
    "one memory": {"adaptive": (), "memory": Mlp(hidden=3, norm=True)},
    "some": {"adaptive": ("v", "alpha"), "bound": 0.5},
}


@pytest.mark.parametrize("name", LEVELS)
def test_rows_of_a_gradient_are_written_together(name: str) -> None:
    level = self_modifying(**LEVELS[name])
    mlp = SlowMlp(level.memory.activation, True, level.memory.norm)
    state = tree_map(lambda x: x + 0.3 * torch.randn_like(x), start(level, torch.zeros(5, 3, dtype=F64)))
    for step in range(1, 4):
        grad = torch.randn(5, 3, dtype=F64)
        boxes = {key: list(box["weights"].values()) for key, box in state["projections"].items()}
        tokens: dict[str, list[Tensor]] = {key: [] for key in ("k", "v", "eta", "alpha")}
        rows = []
        for row in grad:
            x = row / row.norm()
            at = {key: mlp.read(boxes[key], x) if key in boxes else x for key in ALL}
            tokens["k"].append(unit(at["k"]))
            tokens["v"].append(cut(at["v"], x) if level.normalized and "v" in boxes else at["v"])
            for gate in ("eta", "alpha"):
                own = state["readout"][gate]
                tokens[gate].append(torch.sigmoid(own["w"] @ at[gate] + own["b"]))
            rows.append(row.norm() * mlp.read(list(state["memory"]["weights"].values()), unit(at["q"])))
        direction, new = advance(level, grad, state, Signal(step, torch.zeros_like(grad)))
        same(direction, torch.stack(rows))
        same_states(new["memory"], by_hand(level, state["memory"], tokens))
        for key in boxes:
            same_states(new["projections"][key], by_hand(level, state["projections"][key], tokens))
        state = new


def same_states(a: State, b: State, tolerance: float = 1e-11) -> None:
    torch.testing.assert_close(dict(leaves(a)), dict(leaves(b)), rtol=tolerance, atol=tolerance)


def test_in_place_and_with_a_counter_on_the_device() -> None:
    torch.manual_seed(0)
    run(self_modifying(momentum=0.5), randoms(4, 3))


def test_a_gradient_of_another_size_gives_a_direction_of_that_size() -> None:
    level, grads = self_modifying(), randoms(4, 3)
    torch.manual_seed(0)
    once = run(level, grads)
    torch.manual_seed(0)
    same(run(level, [1e3 * g for g in grads]), 1e3 * once, 1e-8)


def test_zeros_and_long_runs_stay_finite() -> None:
    level = self_modifying()
    state = start(level, torch.zeros(6, 4))
    for step in range(1, 301):
        grad = torch.zeros(6, 4) if step % 7 == 0 else (1e4 if step % 5 else 1e-6) * torch.randn(6, 4)
        direction, state = advance(level, grad, state, Signal(step, grad))
        assert direction.isfinite().all()
        assert direction.norm() <= 10 * grad.norm() + 1e-6
    assert all(leaf.isfinite().all() for _, leaf in leaves(state))


def test_it_descends() -> None:
    torch.manual_seed(0)
    a = torch.randn(8, 8, dtype=F64)
    w = torch.nn.Parameter(torch.zeros(8, 8, dtype=F64))
    optimizer = Nested([w], self_modifying(), lr=0.02)

    def loss() -> Tensor:
        return (a @ w - torch.eye(8, dtype=F64)).square().sum()

    first = float(loss().detach())
    for _ in range(300):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.5 * first


# -- on tokens ---------------------------------------------------------------------------------------------------------


def begun(level: Level, learned: dict[str, Tensor]) -> State:
    """The state of one sequence and head."""
    return level.init_tokens(4, 4, torch.zeros((), dtype=F64), learned)


@pytest.mark.parametrize("momentum", [None, 0.6])
@pytest.mark.parametrize(("chunk", "projection_chunk"), [(1, 1), (2, 4), (6, 3)])
def test_one_token_after_the_other_is_the_token_loop(chunk: int, projection_chunk: int, momentum: float | None) -> None:
    level = self_modifying(adaptive=ALL, chunk=chunk, projection_chunk=projection_chunk, momentum=momentum)
    learned = {name: x.double() for name, x in level.learned_start(4, 4).items()}
    q, k, v = (torch.randn(1, 13, 1, 4, dtype=F64) for _ in range(3))
    state, ys = begun(level, learned), []
    for t in range(13):
        y, state = level.token_step(q[0, t, 0], k[0, t, 0], v[0, t, 0], state, Signal(t + 1))
        ys.append(y)
    starts = {name: [learned[f"{name}.W{i}"][None, None] for i in (1, 2)] for name in ("memory", *ALL)}
    readout = {
        name: (learned[f"readout.{name}.w"][None], learned[f"readout.{name}.b"][None]) for name in ("eta", "alpha")
    }
    theta = None if momentum is None else torch.full((1, 13, 1), momentum, dtype=F64)
    true, ends, _ = twin(
        q, k, v, starts=starts, readout=readout, momentum=theta, chunk=chunk, projection_chunk=projection_chunk
    )
    same(torch.stack(ys), true[0, :, 0], 1e-10)
    for name, weights in ends.items():
        box = state["memory"] if name == "memory" else state["projections"][name]
        for mine, slow in zip(box["weights"].values(), weights, strict=True):
            same(mine, slow[0, 0], 1e-10)


@pytest.mark.parametrize("momentum", [None, 0.5])
@pytest.mark.parametrize("adaptive", [ALL, ("k", "v", "eta", "alpha"), ()])
def test_numbers_of_state(adaptive: tuple[str, ...], momentum: float | None) -> None:
    """As the documentation says: `docs/tokens/self_modifying.md`."""
    level, dim = self_modifying(Mlp(hidden=7), adaptive, momentum, chunk=4, projection_chunk=8), 5
    x = torch.randn(3, 1, 15, 1, dim)
    _, state = scan(level, *(part[:, :8] for part in x))
    memories, each = len(adaptive) + 1, 2 * dim * 7 * (1 if momentum is None else 2)
    assert sum(leaf.numel() for _, leaf in leaves(state["level"])) == memories * each + 2 * dim + 2
    _, later = scan(level, *(part[:, 8:] for part in x), state=state)
    own = 2 * dim + 3 + (momentum is not None)
    pending = (3 + 7 if adaptive else 3) * own
    assert sum(leaf.numel() for _, leaf in leaves(later["level"])) == memories * each + 2 * dim + 2 + pending


def test_recall_writes_nothing() -> None:
    level = self_modifying(chunk=2, projection_chunk=4)
    x = torch.randn(3, 1, 7, 1, 4, dtype=F64)
    torch.manual_seed(0)
    _, state = scan(level, *(part[:, :6] for part in x))
    y, _ = scan(level, *(part[:, 6:] for part in x), state=state)
    same(scan(level, *(part[:, 6:] for part in x), state=state, learn=False)[0], y)


def test_gates_start_where_they_are_said_to() -> None:
    level = self_modifying(lr=0.3, keep=0.9)
    learned = level.learned_start(16, 16)
    assert torch.sigmoid(learned["readout.eta.b"]).item() == pytest.approx(0.3)
    assert torch.sigmoid(learned["readout.alpha.b"]).item() == pytest.approx(0.9)
    assert 0.5 < learned["readout.eta.w"].norm() < 2
    assert not gates_of(level)
    assert list(gates_of(self_modifying(momentum=Gate(0.5)))) == ["momentum"]


# -- within other levels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "level",
    [
        titans(rule=self_modifying(), step_size=0.1, normalized=False, chunk=1),
        deltanet(rule=self_modifying(), step_size=0.5),
        chain(self_modifying(momentum=0.5, chunk=2, projection_chunk=4), gd()),
    ],
    ids=lambda level: level.label,
)
def test_as_a_rule_and_in_a_chain(level: Level) -> None:
    """As a rule it is shown gradients, rows of which it takes together; in a chain, tokens."""
    layer = nestopt.layer(level, 8, 2)
    y, state = layer(torch.randn(2, 12, 8))
    y.square().sum().backward()
    assert y.isfinite().all()
    assert all(leaf.isfinite().all() for _, leaf in leaves(state) if leaf.is_floating_point())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_written_as_a_spec_and_read_back() -> None:
    level = self_modifying(Mlp(hidden=7), ("q", "alpha"), momentum=Gate(0.4), chunk=4, projection_chunk=2, keep=0.9)
    assert build("level", to_spec(level)) == level
    assert build("level", {"level": "self_modifying", "adaptive": ["k"]}) == self_modifying(adaptive=("k",))


# -- what it says ------------------------------------------------------------------------------------------------------


def test_describe_shows_its_memories() -> None:
    found = describe(self_modifying(adaptive=ALL), context="tokens")
    (level,) = found.levels
    assert [memory.name for memory in level] == [
        *(f"self_modifying.projections.{name}" for name in ALL),
        "self_modifying.memory",
    ]
    assert {(memory.memory, memory.objective, memory.rule) for memory in level} == {("mlp", "l2", "dgd")}
    with_momentum = describe(self_modifying(momentum=0.5)).memories[-1]
    assert with_momentum.rule == "dgd of momentum"
    assert describe(self_modifying(delta=0.0)).memories[-1].rule == "gd"


def test_memories_are_in_one_order() -> None:
    assert self_modifying(adaptive=("alpha", "k")) == self_modifying(adaptive=["k", "alpha"])  # type: ignore[arg-type]
    assert self_modifying(adaptive="v").adaptive == ("v",)  # type: ignore[arg-type]
    assert self_modifying(adaptive=()).boxes == ("memory",)


REFUSED = [
    ({"adaptive": ("key",)}, "self_modifying: adaptive=('key',) is not allowed; give some of k, v, q, eta, alpha"),
    ({"adaptive": ("alfa",)}, "Did you mean 'alpha'?"),
    ({"adaptive": ("k", "k")}, "each once"),
    ({"memory": Mlp(bias=True)}, "is not allowed; give an mlp without biases"),
    ({"memory": Swiglu()}, "is not allowed; give an mlp without biases"),
    ({"objective": "huber"}, "objective='huber'"),
    ({"momentum": 1.0}, "momentum=1.0"),
    ({"delta": -1.0}, "delta=-1.0"),
    ({"lr": 0.0}, "lr=0.0"),
    ({"keep": 1.0}, "keep=1.0"),
    ({"eta_max": 0.0}, "eta_max=0.0"),
    ({"bound": 2.0}, "bound=2.0 is not allowed; give a number in (0, 2)"),
    ({"bound": 2.1, "memory": Mlp(depth=1)}, "bound=2.1 is not allowed; give a number in (0, 2]"),
    ({"chunk": 0}, "chunk=0 is not allowed; give a whole number of tokens, 1 or more"),
    ({"projection_chunk": 1.5}, "projection_chunk=1.5 is not allowed; give a whole number of tokens"),
    (
        {"chunk": 16, "projection_chunk": 24},
        "projection_chunk=24 is not allowed with chunk=16: one of them must divide",
    ),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_fields_that_are_not_allowed(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(FieldError, match=re.escape(message)):
        self_modifying(**fields)


def test_without_a_residual_it_is_for_tokens() -> None:
    with pytest.raises(FieldError, match="not allowed on gradients"):
        self_modifying(Mlp(residual=False)).init(torch.zeros(2, 3))


def test_fast_form() -> None:
    assert nestopt.ops.fast_form(self_modifying()) == "self_modifying"

    class Other(self_modifying):  # type: ignore[misc, valid-type]
        """One that means something else."""

        def own_values(self, theta, v):  # type: ignore[no-untyped-def]
            return v

    assert nestopt.ops.fast_form(Other()) is None
    x = F.normalize(torch.randn(1, 9, 1, 4), dim=-1)
    assert nestopt.ops.run(Other(chunk=2, projection_chunk=4), x, x, x)[0].shape == x.shape


@pytest.mark.parametrize("objective", ["dot", "l2"])
def test_matrices_are_written_by_the_letter(objective: str) -> None:
    """NL eq. 92 and 93, a token at a time: M ← M (α I - δη k kᵀ) + η v̂ kᵀ, and less η M k kᵀ of a regression."""
    torch.manual_seed(0)
    delta, size = 0.7, 4
    level = self_modifying(
        Mlp(depth=1, residual=False), normalized=False, delta=delta, chunk=1, projection_chunk=1, objective=objective
    )
    learned = {name: x.double()[None] for name, x in level.learned_start(size, size).items()}
    q, k, v = torch.randn(3, 1, 5, 1, size, dtype=torch.float64)
    y, state = nestopt.ops.run(level, q, k, v, learned=learned)
    m = {name: learned[f"{name}.W1"][0] for name in ("k", "v", "eta", "alpha", "memory")}
    w, b = ({name: learned[f"readout.{name}.{part}"][0] for name in ("eta", "alpha")} for part in "wb")
    for t in range(5):
        key, value = m["k"] @ k[0, t, 0], m["v"] @ v[0, t, 0]
        key = key / key.norm()
        eta, alpha = (torch.sigmoid(w[name] @ (m[name] @ k[0, t, 0]) + b[name]) for name in ("eta", "alpha"))
        torch.testing.assert_close(y[0, t, 0], m["memory"] @ (q[0, t, 0] / q[0, t, 0].norm()), rtol=0, atol=1e-10)
        for name, old in m.items():
            error = (old @ key if objective == "l2" else 0) - old @ value
            m[name] = alpha * old - delta * eta * torch.outer(old @ key, key) - eta * torch.outer(error, key)
    torch.testing.assert_close(state["level"]["memory"]["weights"]["W1"][0, 0], m["memory"], rtol=0, atol=1e-10)
