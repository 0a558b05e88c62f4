"""A continuum that learns as it reads, against a loop over tokens written from the equations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import nestopt
from nestopt.config import Config, ConfigError
from nestopt.core.memories import Mlp
from nestopt.core.part import FieldError
from nestopt.core.tree import State, leaves
from nestopt.levels import adam, cms, momentum, muon
from nestopt.levels.continuum.level import Auto
from nestopt.levels.continuum.memory import linearize, read
from nestopt.levels.gradient.dgd import Dgd
from nestopt.nn import CMS, cat, index
from tests.levels.continuum.cms_twin import run

D = 4


def make(seed: int = 0, **options: Any) -> CMS:
    given = {"periods": (3, 5), "learn": "context", "memory": Mlp(hidden=6, residual=False), "rate": 0.6, **options}
    torch.manual_seed(seed)
    module = CMS(D, cms(**given)).double()
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith(("target", "share")):
                p.add_(0.3 * torch.randn_like(p))
    return module


def some(batch: int = 2, length: int = 12, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def driven(module: CMS, x: Tensor, signal: Any) -> tuple[Tensor, State]:
    """As a language model drives it: read up to a moment of the clocks, then observe."""
    state, first, found = module.init_state(len(x)), 0, []
    phases = module.phases(None)
    while first < x.shape[1]:
        last = min(first + module.until_write(phases), x.shape[1])
        part = x[:, first:last]
        y = module.read(part, state)
        delta = torch.stack(
            [torch.stack([signal(b, first + t, y[b, t]) for t in range(last - first)]) for b in range(len(x))]
        )
        state = module.observe(part, delta, state, phases=phases, ahead=max(0, x.shape[1] - 1 - last))
        found.append(y)
        phases = [phase + last - first for phase in phases]
        first = last
    return torch.cat(found, 1), state


FIXED = torch.randn(2, 12, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
SIGNALS = {
    "local": None,
    "given": lambda b, t, y: FIXED[b, t],
    "of the answer": lambda b, t, y: (y - FIXED[b, t]) * y.tanh(),
}


def compare(module: CMS, signal: Any, tolerance: float = 1e-10) -> dict[str, Tensor]:
    """Answers, states and all gradients; gives the gradients by name."""
    x = some().requires_grad_()
    y, state = module(x) if signal is None else driven(module, x, signal)
    true, twins = run(module, x, signal)
    torch.testing.assert_close(y, true, rtol=tolerance, atol=tolerance)
    for b, twin in enumerate(twins):
        for name in twin.names:
            own = state["levels"][name]
            for key, weight in twin.weights[name].items():
                torch.testing.assert_close(own["weights"][key][b], weight, rtol=tolerance, atol=tolerance)
                torch.testing.assert_close(
                    own["sum"][key][b], twin.own[name]["sum"][key], rtol=tolerance, atol=tolerance
                )
            if module.level.is_normalized:
                torch.testing.assert_close(own["energy"][b], twin.own[name]["energy"], rtol=tolerance, atol=tolerance)
    assert state["step"].tolist() == [12, 12]
    names, parameters = zip(*module.named_parameters(), strict=True)
    found = []
    for out in (y, true):
        weighted = (out * FIXED.flip(1)).sum() + out.pow(3).sum()
        found.append(torch.autograd.grad(weighted, [x, *parameters], materialize_grads=True))
    for name, mine, theirs in zip(("x", *names), *found, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=100 * tolerance, atol=10 * tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
    return dict(zip(names, found[0][1:], strict=True))


@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("periods", [(1,), (3, 5), (6, 2), (4, 4), (7, 100), (1, 2, 4)])
def test_it_is_the_loop_over_tokens(variant: str, signal: str, periods: tuple[int, ...]) -> None:
    teach = "local" if SIGNALS[signal] is None else "loss"
    module = make(periods=periods, variant=variant, teach=teach, normalized=True)
    for name, gradient in compare(module, SIGNALS[signal]).items():
        # no write of it is read, or each is put back at once
        unread = (
            "every_100.rate",
            "every_100.target",
            *(["every_4.rate"] if (variant, periods) == ("nested", (4, 4)) else []),
        )
        if not name.endswith(unread):
            assert gradient.any(), name


@pytest.mark.parametrize("signal", ["local", "of the answer"])
@pytest.mark.parametrize("learner", [momentum(0.5), adam(), muon(), momentum(0.5, period=2)])
@pytest.mark.parametrize("variant", ["sequential", "nested"])
def test_any_level_is_the_learner(signal: str, learner: Any, variant: str) -> None:
    if learner.period > 1:
        learner = nestopt.chain(learner)  # a clock within the learner
        learner.levels = dict(learner.levels)
    teach = "local" if signal == "local" else "loss"
    module = make(periods=(2, 4), learner=learner, variant=variant, teach=teach, rate=0.1, normalized=False)
    compare(module, SIGNALS[signal], 1e-8)


@pytest.mark.parametrize(
    "options",
    [
        {"normalized": False, "rate": 0.05},
        {"keep": 0.7, "rate": 0.1},
        {"keep": 0.0, "rate": 0.1},
        {"surprise": 1.0, "rate": 0.1},
        {"surprise": 0.6, "normalized": False, "rate": 0.05},
    ],
)
@pytest.mark.parametrize("signal", ["local", "of the answer"])
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_the_options_of_a_write(options: dict[str, Any], signal: str, variant: str) -> None:
    compare(make(teach="local" if signal == "local" else "loss", variant=variant, **options), SIGNALS[signal])


THROUGH: list[dict[str, Any]] = [
    {"through": "first_order"},
    {"through": "truncated", "last": 1},
    {"through": "truncated", "last": 2},
    {"through": "stop"},
]


@pytest.mark.parametrize("options", THROUGH)
@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("variant", ["sequential", "independent", "nested"])
def test_how_the_outer_gradient_passes_a_write(options: dict[str, Any], signal: str, variant: str) -> None:
    teach = "local" if SIGNALS[signal] is None else "loss"
    module = make(periods=(2, 3), variant=variant, teach=teach, normalized=True, **options)
    for name, gradient in compare(module, SIGNALS[signal]).items():
        if options["through"] == "stop":
            assert not gradient.any() or name.endswith("share"), name
        elif not name.endswith("target"):  # which only the step itself knows
            assert gradient.any(), name
        elif options["through"] == "truncated" and teach == "local":
            assert gradient.any(), name  # though no token reads the last write


# -- streams, batches, rows --------------------------------------------------------------------------------------------


KINDS: dict[str, dict[str, Any]] = {
    "local": {},
    "nested": {"variant": "nested"},
    "adam": {"learner": adam(), "rate": 0.05},
    "auto": {"periods": (2, Auto(threshold=1.5, every=3)), "normalized": True},
    "calibrated": {"periods": (2, Auto(5, every=3)), "normalized": True},
    "surprised": {"surprise": 0.5},
    "both": {"periods": (2, Auto(5, every=3)), "normalized": True, "surprise": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@given(cuts=st.lists(st.integers(1, 11), max_size=4, unique=True))
@settings(max_examples=10, deadline=None)
def test_any_pieces_are_the_whole(kind: str, cuts: list[int]) -> None:
    module, x = make(**KINDS[kind]), some()
    with torch.no_grad():
        whole, end = module(x)
        state, found = None, []
        for a, b in itertools.pairwise([0, *sorted(cuts), 12]):
            y, state = module(x[:, a:b], state)
            found.append(y)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dict(leaves(state or {})), dict(leaves(end)), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_each_sequence_by_itself_and_no_token_before_its_time(kind: str) -> None:
    module, x = make(**KINDS[kind]), some(3)
    y, _ = module(x)
    torch.testing.assert_close(module(x[[2, 0]])[0], y[[2, 0]], rtol=1e-12, atol=1e-12)
    other = x.clone()
    other[:, 7] += 1
    changed, _ = module(other)
    torch.testing.assert_close(changed[:, :7], y[:, :7], rtol=0, atol=1e-13)
    moved = ~torch.isclose(changed[:, [7, 9, 10, 11]], y[:, [7, 9, 10, 11]]).all(-1)  # 9 tokens are written
    assert moved.any(0).all() if module.level.surprise else moved.all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_at_different_places_of_their_periods(kind: str) -> None:
    module, x, more = make(**KINDS[kind]), some(), some(2, 9, seed=3)
    _, one = module(x)
    _, other = module(x[:1, :4])
    both = cat([index(one, [1]), other])
    y, _ = module(more, both)
    torch.testing.assert_close(y[:1], module(more[:1], index(one, [1]))[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[1:], module(more[1:], other)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "middle"])
def test_padding_teaches_nothing(kind: str, side: str) -> None:
    module, x, more = make(**KINDS[kind]), some(), some(2, 5, seed=3)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, {"left": slice(0, 4), "right": slice(8, 12), "middle": slice(4, 8)}[side]] = False
    y, state = module(x, mask=mask)
    alone, own = module(x[1:][mask[1:]][None])
    torch.testing.assert_close(y[1][mask[1]], alone[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(y[0], module(x)[0][0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(module(more, state)[0][1:], module(more[1:], own)[0], rtol=1e-10, atol=1e-10)


def test_the_order_of_listing_changes_nothing() -> None:
    x = some()
    fast, slow = make(periods=(3, 5)), make(periods=(5, 3))
    assert list(slow.levels) == ["every_3", "every_5"]
    slow.load_state_dict(fast.state_dict())
    torch.testing.assert_close(slow(x), fast(x), rtol=0, atol=0)
    both = CMS(D, cms(periods=(16, 1))), CMS(D, cms(periods=(1, 16)))
    both[0].load_state_dict(both[1].state_dict())
    torch.testing.assert_close(both[0](x.float())[0], both[1](x.float())[0], rtol=0, atol=0)
    assert [block.period for block in both[0].levels.values()] == [1, 16]


def test_a_rate_of_0_is_a_static_continuum() -> None:
    module, static, x = make(rate=0), make(learn="static"), some()
    assert module.init_state(2) == {}
    static.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(x), static(x), rtol=0, atol=0)


def test_read_without_writing() -> None:
    module, x = make(), some()
    _, state = module(x)
    y, same = module(some(seed=2), state, learn=False)
    torch.testing.assert_close(dict(leaves(same)), dict(leaves(state)), rtol=0, atol=0)
    torch.testing.assert_close(y, module.read(some(seed=2), state), rtol=0, atol=0)
    torch.testing.assert_close(module(x, learn=False)[0], module.read(x), rtol=0, atol=0)


# -- a period that the data choose -------------------------------------------------------------------------------------


def test_it_writes_when_it_is_surprised_enough() -> None:
    x = some(2, 60)
    always, sometimes, never = (make(periods=(Auto(threshold=x, every=4),)) for x in (0, 6, 1e9))
    states = {name: m(x)[1] for name, m in (("always", always), ("sometimes", sometimes), ("never", never))}
    assert states["always"]["levels"]["auto_4"]["writes"].tolist() == [15, 15]
    assert states["never"]["levels"]["auto_4"]["writes"].tolist() == [0, 0]
    assert never.mean_periods(states["never"])["auto_4"].tolist() == [float("inf")] * 2
    writes = states["sometimes"]["levels"]["auto_4"]["writes"]
    assert all(1 < n < 15 for n in writes.tolist())
    torch.testing.assert_close(sometimes.mean_periods(states["sometimes"])["auto_4"], 60 / writes)
    # as often as looked: the plain clock
    plain = make(periods=(4,))
    plain.load_state_dict({key.replace("auto_4", "every_4"): value for key, value in always.state_dict().items()})
    torch.testing.assert_close(plain(x)[0], always(x)[0], rtol=1e-12, atol=1e-12)
    # more surprise, more writes
    loud = make(periods=(Auto(threshold=6, every=4),))
    with torch.no_grad():
        loud.levels["auto_4"].target.mul_(3)
    assert (loud(x)[1]["levels"]["auto_4"]["writes"] > writes).all()


def test_a_threshold_that_calibrates_itself() -> None:
    """A loop over looks, from the equation; and what it is for: the mean period, whatever the size of the errors."""
    x = some(2, 600)
    module = make(periods=(Auto(24, every=4),), rate=1e-3)
    _, state = module(x)
    writes = state["levels"]["auto_4"]["writes"]
    for row, count in zip(x, writes.tolist(), strict=True):
        now, level = module.init_state(1), "auto_4"
        since, total, found = 0.0, 0.0, 0
        for first in range(0, 600, 4):
            part = row[None, first : first + 4]
            before = now["levels"][level]["surprise_so_far"].item()
            _, now = module(part, now)
            surprise = now["levels"][level]["surprise_so_far"].item() - before
            since, total = since + surprise, total + surprise
            if since >= (24 - 1.5) * total / (first + 4):
                since, found = 0.0, found + 1
        assert found == count
    means = module.mean_periods(state)["auto_4"]
    assert ((means > 0.85 * 24) & (means < 1.15 * 24)).all()
    loud = make(periods=(Auto(24, every=4),), rate=1e-3)
    with torch.no_grad():
        loud.levels["auto_4"].target.mul_(100)
    means = loud.mean_periods(loud(x)[1])["auto_4"]
    assert ((means > 0.85 * 24) & (means < 1.15 * 24)).all()


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_only_what_surprises_teaches(scale: float) -> None:
    """One error in five is three times as large: with a threshold of twice the mean it alone is learned from."""
    error = scale * some(1, 1)[0, 0]
    options = {"periods": (20,), "teach": "loss", "rate": 1e-9, "normalized": False}
    module, every = make(surprise=2.0, **options), make(**options)
    x = some(1, 19)

    def told(t: int) -> Tensor:
        return error * (3 if t % 5 == 4 else 1)

    _, state = driven(module, x, lambda b, t, y: told(t))
    alone, known = every.init_state(1), 0
    for t in range(19):
        if t == 0 or t % 5 == 4:
            alone = every.observe(x[:, t : t + 1], told(t)[None, None], alone, phases=[known])
            known += 1
    assert known == 4
    torch.testing.assert_close(state["levels"]["every_20"]["sum"], alone["levels"]["every_20"]["sum"])
    assert state["step"].tolist() == [19]


def test_it_writes_sooner_where_it_is_more_surprised() -> None:
    module, error = make(periods=(Auto(20, every=2),), teach="loss", rate=1e-9), some(1, 1)[0, 0]
    _, calm = driven(module, some(1, 100), lambda b, t, y: error)
    _, both = driven(module, some(1, 200), lambda b, t, y: error if t < 100 else 3 * error)
    before, after = (state["levels"]["auto_2"]["writes"].item() for state in (calm, both))
    # looks come every 2 tokens, and (20 - 1/2) tokens of one size pass at the tenth
    assert before == 5
    assert after - before > 1.5 * before
    _, bored = driven(module, some(1, 100), lambda b, t, y: 0 * error)
    assert bored["levels"]["auto_2"]["writes"].item() == 0


def test_auto_in_a_config() -> None:
    def built(periods: object) -> tuple[object, ...]:
        mlp = {"level": "cms", "periods": periods, "learn": "context", "teach": "loss"}
        config = Config.from_data({"model": {"mlp": mlp}})
        assert Config.from_data(config.to_data()) == config
        return config.model.mlp.periods

    assert built([16, {"auto": 40, "every": 8}]) == (16, Auto(40, every=8))
    assert built([{"threshold": 0.0}]) == (Auto(threshold=0.0),) != (Auto(),)
    assert built(["auto", 2]) == (Auto(), 2)
    for wrong, word in (
        ({"threshold": -1.0}, "threshold=-1.0"),
        ({"auto": 8}, "auto=8.* every=16 or more"),
        ({"auto": 64, "threshold": 1.0}, "give one of them"),
        ({"every": 0}, "every=0"),
        ({"autos": 1.0}, "autos"),
        (0, "0"),
    ):
        with pytest.raises(ConfigError, match=word):
            built([16, wrong])
    with pytest.raises(FieldError, match="chosen by tokens"):
        cms(periods=("auto",))


# -- machines, dtypes, refusals ----------------------------------------------------------------------------------------


class Plain(Mlp):
    """An `Mlp` that is not known to be one, as a plugin's memory."""


def test_another_memory_goes_by_torch_func() -> None:
    theta = {k: torch.randn(2, *w.shape, dtype=torch.float64) for k, w in Mlp(hidden=6).learned_start(D, D).items()}
    k, error = some(), some(seed=4)
    one, other = (linearize(kind(hidden=6, residual=False), theta, k) for kind in (Mlp, Plain))
    for mine, true in ((one.y, other.y), (one.energy(), other.energy()), (one.pull(error), other.pull(error))):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(one.gradient(error), other.gradient(error), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(read(Plain(hidden=6, residual=False), theta, k), one.y, rtol=1e-12, atol=1e-12)
    closed, plain = make(), make(memory=Plain(hidden=6, residual=False))
    plain.load_state_dict(closed.state_dict())
    torch.testing.assert_close(plain(some())[0], closed(some())[0], rtol=1e-12, atol=1e-12)


def test_meta_gradients_are_finite_differences() -> None:
    module, x = make(periods=(2, 3)), some(1, 7)
    names, values = zip(*module.named_parameters(), strict=True)
    values = tuple(v.detach().clone().requires_grad_() for v in values)

    def answers(*values: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))[0]

    assert torch.autograd.gradcheck(answers, values, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
def test_recomputing_and_compiling_change_nothing() -> None:
    module, x = make(), some().requires_grad_()
    y, _ = module(x)
    wanted = torch.autograd.grad(y.square().sum(), [x, *module.parameters()])
    again = torch.utils.checkpoint.checkpoint(lambda x: module(x)[0], x, use_reentrant=False)
    found = torch.autograd.grad(again.square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    compiled = torch.compile(lambda x: module(x)[0], fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).square().sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_states_are_float32_at_least() -> None:
    x = some().bfloat16()
    module = make().bfloat16()
    y, state = module(x)
    assert y.dtype == torch.bfloat16
    assert {leaf.dtype for _, leaf in leaves(state["levels"])} == {torch.float32}
    true, _ = make()(x.double())
    torch.testing.assert_close(y.double(), true, rtol=0.05, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, state = make().float()(x.float())
    assert {leaf.dtype for _, leaf in leaves(state["levels"])} == {torch.float32}


def test_what_is_not_finite_teaches_nothing() -> None:
    module, x = make(periods=(12,)), some()
    x[0, 3] = float("nan")
    y, state = module(x)
    assert y[0, 3].isnan().all()
    assert y[0, 4:].isfinite().all()
    assert all(leaf.isfinite().all() for _, leaf in leaves(state))


@pytest.mark.parametrize("kind", ["constant", "random", "huge"])
@pytest.mark.parametrize("variant", ["sequential", "nested", "independent"])
def test_it_stays_finite(kind: str, variant: str) -> None:
    torch.manual_seed(0)
    module = CMS(8, cms(periods=(4, 16), learn="context", variant=variant))  # type: ignore[arg-type]
    x = torch.randn(1, 5000, 8) * (1e4 if kind == "huge" else 1)
    x = x[:, :1].expand_as(x) if kind == "constant" else x
    with torch.no_grad():
        y, state = module(x)
    assert y.isfinite().all()
    moved = state["levels"]["every_4"]["weights"]["W1"]
    assert 0 < moved.norm() < 100


def test_it_says_what_does_not_fit() -> None:
    module, x = make(), some()
    with pytest.raises(ValueError, match=r"6 tokens are given, and a level may write after 3"):
        module.observe(x[:, :6], None, module.init_state(2))
    with pytest.raises(ValueError, match=r"taught by a language model.*HopeLM.*local.*learn=False"):
        make(teach="loss")(x)
    with pytest.raises(ValueError, match=r"CMS.*batch"):
        module(x, module.init_state(3))
    with pytest.raises(ValueError, match="CMS"):
        module(x, make(memory=Mlp(hidden=5, residual=False)).init_state(2))
    with pytest.raises(FieldError, match="learner"):
        cms(learn="context", learner=Dgd())
    for options in (
        {"periods": (0,)},
        {"rate": -1.0},
        {"keep": 2.0},
        {"last": 0},
        {"variant": "chain"},
        {"teach": "x"},
    ):
        with pytest.raises(FieldError):
            cms(learn="context", **options)
