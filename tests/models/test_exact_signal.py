"""A model whose continua are taught the gradient of its own loss, against autograd of that loss by their weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import nestopt.nn as nn_
from nestopt.config import ConfigError
from nestopt.core.memories import Window
from nestopt.core.tree import leaves
from nestopt.levels import attention, cms, deltanet, titans, window_attention
from nestopt.levels.continuum.level import Cms
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.models import HopeLM
from nestopt.train.engines.fsdp_methods import check_signal
from tests.models.taught import check_causal_and_alone, check_loop, check_pieces, check_recomputing, check_rows, some

RATE = 0.4


def taught(periods: tuple[int, ...] = (3, 5), **options: object) -> Cms:
    given = {"periods": periods, "learn": "context", "teach": "loss", "signal": "exact", "rate": RATE, **options}
    return cms(**given)


def make(**options: object) -> HopeLM:
    given = {"vocab": 11, "dim": 8, "blocks": 3, "heads": 2, "mixer": deltanet(), "mlp": taught(), **options}
    torch.manual_seed(0)
    model = HopeLM(**given).double()  # type: ignore[arg-type]
    with torch.no_grad():
        model.embedding.weight.mul_(20)
    return model


MODELS: dict[str, dict[str, object]] = {
    "deltanet": {"mixer": deltanet()},
    "titans": {"mixer": titans(chunk=4, read="chunk")},
    "window": {"mixer": window_attention(memory=Window(4))},
    "hope": {"mixer": SelfModifying(chunk=2, projection_chunk=4)},
    "both": {"mixers": [SelfModifying(chunk=2, projection_chunk=4), attention()]},
}


SLOWLY = [name if name in ("deltanet", "window") else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
"""Of which most are for runs that take their time."""


class Loop:
    """One sequence, token by token; where a segment is over, its loss is differentiated by all weights as they are."""

    def __init__(self, model: HopeLM) -> None:
        self.model, self.mixers = model, [block.mixer.init_state(1) for block in model.blocks]
        self.weights = [
            {name: {k: w for k, w in level.named_parameters() if k[0] == "W"} for name, level in b.mlp.levels.items()}
            for b in model.blocks
        ]
        self.sums = [
            {n: {k: torch.zeros_like(w) for k, w in ws.items()} for n, ws in of.items()} for of in self.weights
        ]
        self.periods = model.blocks[0].mlp.level.chain()
        self.seen, self.segment, self.start = 0, list[int](), self.mixers
        self.gradients: list[list[Tensor]] = []

    def through(self, tokens: list[int], mixers: list[object], of: list) -> tuple[Tensor, list[object]]:
        x, after = self.model.embedding(torch.tensor([tokens])), []
        for block, state, weights in zip(self.model.blocks, mixers, of, strict=True):
            y, new = block.mixer(block.norm(x), state)
            x = x + y
            for name in self.periods:
                w = weights[name]
                x = x + F.silu(F.rms_norm(x, x.shape[-1:]) @ w["W2"].mT) @ w["W1"].mT
            after.append(new)
        return self.model.head(self.model.norm(x))[0], after

    def learn(self, following: int) -> None:
        # what was read before the segment with the same weights is a constant
        own = [{n: {k: w.clone() for k, w in ws.items()} for n, ws in of.items()} for of in self.weights]
        logits, _ = self.through(self.segment, self.start, own)
        loss = F.cross_entropy(logits, torch.tensor([*self.segment[1:], following]), reduction="sum")
        flat = [(i, n, k) for i, of in enumerate(self.weights) for n, ws in of.items() for k in ws]
        found = torch.autograd.grad(loss, [own[i][n][k] for i, n, k in flat], create_graph=True)
        self.gradients.append(list(found))
        self.seen += len(self.segment)
        for (i, n, k), g in zip(flat, found, strict=True):
            self.sums[i][n][k] = self.sums[i][n][k] + g
            if self.seen % self.periods[n] == 0:
                rate = self.model.blocks[i].mlp.levels[n].rate.exp()
                self.weights[i][n][k] = self.weights[i][n][k] - rate * self.sums[i][n][k]
                self.sums[i][n][k] = torch.zeros_like(g)
        self.segment, self.start = [], self.mixers

    def read(self, token: int) -> Tensor:
        if self.segment and any((self.seen + len(self.segment)) % period == 0 for period in self.periods.values()):
            self.learn(token)
        logits, self.mixers = self.through([token], self.mixers, self.weights)
        self.segment.append(token)
        return logits[0]


@pytest.mark.parametrize(
    ("name", "periods"),
    [
        ("deltanet", (3, 5)),
        ("window", (3, 5)),
        ("deltanet", (4, 2)),
        ("deltanet", (1,)),
        *(pytest.param(name, (3, 5), marks=pytest.mark.slow) for name in ("titans", "hope", "both")),
    ],
)
def test_it_is_the_loop_over_tokens(name: str, periods: tuple[int, ...]) -> None:
    model, tokens = make(**MODELS[name], mlp=taught(periods)), some(2, 8)
    with sdpa_kernel(SDPBackend.MATH):  # torch's fast attention can be differentiated once
        loop = torch.stack([torch.stack([s.read(t) for t in row]) for row in tokens.tolist() if (s := Loop(model))])
    check_loop(model, tokens, loop)


@pytest.mark.parametrize("name", SLOWLY)
def test_the_gradient_is_that_of_the_loss_and_not_the_residual_streams(name: str) -> None:
    """Before anything is written, in one segment: of each weight of each row of the batch."""
    model, tokens = make(**MODELS[name], mlp=taught((13,), through="stop")), some(3, 14)
    rate = model.blocks[0].mlp.levels.every_13.rate.exp().item()
    with torch.no_grad():
        _, state = model(tokens)
    for row in range(3):
        loop = Loop(model)
        for token in tokens[row].tolist():
            loop.read(token)
        (wanted,) = loop.gradients
        found = [
            state[f"block_{i}"]["mlp"]["levels"]["every_13"]["weights"][k][row] - getattr(block.mlp.levels.every_13, k)
            for i, block in enumerate(model.blocks)
            for k in ("W1", "W2")
        ]
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(-a / rate, b, rtol=1e-10, atol=1e-10)
    other = make(**MODELS[name], mlp=taught((13,), through="stop", signal="residual"))
    _, state = other(tokens)
    for i, same in ((0, False), (2, True)):
        after = state[f"block_{i}"]["mlp"]["levels"]["every_13"]["weights"]["W1"][2]
        write = after - other.blocks[i].mlp.levels.every_13.W1
        assert torch.allclose(-write / rate, wanted[2 * i], rtol=1e-10, atol=1e-10) == same


@pytest.mark.parametrize("name", SLOWLY)
@given(cuts=st.lists(st.integers(1, 13), max_size=4, unique=True))
@settings(max_examples=5, deadline=None)
def test_any_pieces_are_the_whole(name: str, cuts: list[int]) -> None:
    check_pieces(make(**MODELS[name], mlp=taught((4, 6))), cuts)


def test_only_what_surprises_in_any_pieces() -> None:
    check_pieces(make(mlp=taught((4, 6), surprise=0.7)), [5, 6, 11])
    every, some_of_it = make(mlp=taught((4, 6))), make(mlp=taught((4, 6), surprise=0.7))
    assert not torch.isclose(every(some())[0][:, 8:], some_of_it(some())[0][:, 8:]).any()


@pytest.mark.parametrize("name", SLOWLY)
def test_causal_and_each_sequence_by_itself(name: str) -> None:
    check_causal_and_alone(make(**MODELS[name]))


@pytest.mark.parametrize("name", ["deltanet", "window", pytest.param("both", marks=pytest.mark.slow)])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    """Rows then go on from different places of their segments, token by token and at once."""
    model, tokens, more = make(**MODELS[name], mlp=taught((4, 6))), some(3), some(3, 9, seed=5)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[1, {"left": [0, 1, 2], "right": [11, 12, 13], "holes": [2, 3, 9]}[side]] = False
    mask[2, :] = False
    with torch.no_grad():
        padded, state = model(tokens, mask=mask)
        at_once, _ = model(more, state)
        by_token = []
        for token in more.unbind(1):
            logits, state = model(token[:, None], state)
            by_token.append(logits)
        for row in range(3):
            alone, own = model(tokens[row][mask[row]][None]) if mask[row].any() else (padded[:1, :0], None)
            torch.testing.assert_close(padded[row][mask[row]], alone[0], rtol=1e-10, atol=1e-10)
            if "chunk" in repr(model.blocks[0].mixer.level):
                continue  # whose rows have no places of their own in a chunk
            torch.testing.assert_close(at_once[row], model(more[row : row + 1], own)[0][0], rtol=1e-10, atol=1e-10)
            torch.testing.assert_close(torch.cat(by_token, 1)[row], at_once[row], rtol=1e-10, atol=1e-10)


def test_rows_are_reset_chosen_and_put_together() -> None:
    check_rows(make())


@pytest.mark.parametrize(
    ("name", "through"),
    [
        ("deltanet", "full"),
        ("window", "first_order"),
        pytest.param("titans", "truncated", marks=pytest.mark.slow),
        pytest.param("both", "full", marks=pytest.mark.slow),
        pytest.param("both", "truncated", marks=pytest.mark.slow),
    ],
)
def test_recomputing_changes_no_gradient(name: str, through: str) -> None:
    plain, again = (make(**MODELS[name], mlp=taught(through=through), segment=segment) for segment in (0, 4))
    check_recomputing(plain, again)


def test_packed_documents_are_what_they_are_alone() -> None:
    model, tokens = make(), some(2, 14)
    starts = torch.zeros_like(tokens, dtype=torch.bool)
    starts[0, [0, 6]] = starts[1, [0, 9]] = True
    packed, state = model(tokens, starts=starts)
    for row, at in ((0, 6), (1, 9)):
        first, last = model(tokens[row : row + 1, :at])[0][0], model(tokens[row : row + 1, at:])
        torch.testing.assert_close(packed[row], torch.cat([first, last[0][0]]), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(
            model(some(2, 5), state)[0][row], model(some(2, 5)[row : row + 1], last[1])[0][0], rtol=1e-10, atol=1e-10
        )


def test_documents_that_go_on_beside_some_that_begin() -> None:
    model, tokens, more = make(), some(2, 7), some(2, 9, seed=2)
    starts = torch.zeros_like(more, dtype=torch.bool)
    starts[1, 0] = starts[0, 5] = True
    with torch.no_grad():
        _, state = model(tokens)
        packed, end = model(more, state, starts=starts)
        first = model(more[:1, :5], nn_.index(state, [0]))[0]
        last, own = model(more[:1, 5:])
        torch.testing.assert_close(packed[:1], torch.cat([first, last], 1), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(packed[1:], model(more[1:])[0], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(model(tokens, end)[0][:1], model(tokens[:1], own)[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("learn", [False, "mixer"])
def test_reading_without_writing_keeps_what_is_open(learn: object) -> None:
    model, tokens = make(), some()
    with torch.no_grad():
        _, state = model(tokens)
        _, after = model(some(seed=2), state, learn=learn)  # type: ignore[arg-type]
        assert all(x.equal(dict(leaves(after["taught"]))[k]) for k, x in leaves(state["taught"]))
        assert model(tokens, after)[0].isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type) -> None:
    """Of the caller: the model's own are made all the same, no graph is left, and one can be made from there."""
    model, tokens = make(**MODELS["both"]), some()
    wanted, _ = model(torch.cat([tokens, tokens], 1))
    with mode():
        first, state = model(tokens)
        second, end = model(tokens.clone(), state)
        assert not torch.is_grad_enabled()
    torch.testing.assert_close(torch.cat([first, second], 1), wanted.detach(), rtol=1e-10, atol=1e-10)
    assert all(x.grad_fn is None for _, x in leaves(end))
    loss, _ = model.loss(tokens, end)
    loss.backward()
    frozen = make(**MODELS["both"]).requires_grad_(False)
    torch.testing.assert_close(frozen(tokens)[0], wanted[:, :14].detach(), rtol=1e-10, atol=1e-10)


def test_generation() -> None:
    model, tokens = make(), some(1, 6)
    text, state = model.generate(tokens, 9, lambda logits: logits.argmax(-1))
    whole, end = model(text[:, :-1])
    assert whole[:, 5:].argmax(-1).equal(text[:, 6:])
    torch.testing.assert_close(dict(leaves(state or {})), dict(leaves(end)), rtol=1e-10, atol=1e-10)


def test_where_weights_are_cut_up_it_is_refused() -> None:
    model = make()
    with pytest.raises(ConfigError, match=r"model\.mlp\.signal: .exact. is not allowed; this engine cuts weights up"):
        check_signal(model)
    model.lockstep = True
    with pytest.raises(ValueError, match=r"backward pass within the forward one, and lockstep is set.*residual"):
        model(some())
    check_signal(make(mlp=taught(signal="residual")))
