"""A model whose continuum learns from its own next-token loss, against a loop over tokens from the equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nestopt.core.memories import Window
from nestopt.core.tree import State, leaves
from nestopt.levels import attention, cms, deltanet, titans, window_attention
from nestopt.levels.continuum.level import Cms
from nestopt.levels.self_modifying.level import SelfModifying
from nestopt.models import HopeLM
from nestopt.models.loss_signal import teach_signal
from tests.models.taught import check_causal_and_alone, check_loop, check_pieces, check_recomputing, check_rows, some

PERIODS = [(1,), (3, 5), (4, 2), (7, 100)]


def taught(periods: tuple[int, ...] = (3, 5), **options: object) -> Cms:
    return cms(**{"periods": periods, "learn": "context", "teach": "loss", "rate": 0.7, "normalized": True, **options})


def make(**options: object) -> HopeLM:
    given = {"vocab": 11, "dim": 8, "blocks": 2, "heads": 2, "mixer": deltanet(), "mlp": taught(), **options}
    torch.manual_seed(0)
    return HopeLM(**given).double()  # type: ignore[arg-type]


def test_the_teach_signal_is_the_gradient_of_the_loss() -> None:
    model, h, targets = make(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True), some(2, 5)
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 1.5)
    loss = F.cross_entropy(model.head(model.norm(h)).flatten(0, 1), targets.flatten(), reduction="sum")
    (true,) = torch.autograd.grad(loss, h)
    torch.testing.assert_close(teach_signal(h, targets, model.norm, model.head), true, rtol=1e-10, atol=1e-12)


class Slow:
    """One sequence, token by token: every clock ticks by itself, and gradients are autograd's."""

    def __init__(self, model: HopeLM) -> None:
        self.model, self.mixers = model, [block.mixer.init_state(1) for block in model.blocks]
        self.weights = [
            {
                name: {k: w for k, w in level.named_parameters() if k.startswith("W")}
                for name, level in b.mlp.levels.items()
            }
            for b in model.blocks
        ]
        self.sums: list[dict[str, dict[str, Tensor]]] = [
            {name: {k: torch.zeros_like(w) for k, w in ws.items()} for name, ws in of.items()} for of in self.weights
        ]
        self.energy = [{name: torch.zeros((), dtype=torch.float64) for name in of} for of in self.weights]
        self.seen, self.waiting = 0, None  # type: ignore[var-annotated]

    def loss(self, logits: Tensor, token: int) -> Tensor:
        return F.cross_entropy(logits, torch.tensor([token]))

    def continuum(self, i: int, x: Tensor, weights: dict[str, dict[str, Tensor]]) -> Tensor:
        cms_ = self.model.blocks[i].mlp
        for name in cms_.level.chain():
            k = F.rms_norm(x, x.shape[-1:])
            x = x + F.silu(k @ weights[name]["W2"].mT) @ weights[name]["W1"].mT
        return x

    def observe(self, token: int) -> None:
        """The token came that the last position was to guess."""
        inputs, h = self.waiting
        model = self.model
        hh = h.detach().requires_grad_() if not h.requires_grad else h
        loss = self.loss(model.head(model.norm(hh)), token)
        (delta,) = torch.autograd.grad(loss, hh, create_graph=True)
        self.seen += 1
        for i, (x, of) in enumerate(zip(inputs, self.weights, strict=True)):
            if not model.blocks[i].mlp.taught:
                continue
            out, pull = torch.func.vjp(lambda ws, i=i, x=x: self.continuum(i, x, ws), of)
            (grads,) = pull(delta.view_as(out))
            for name, ws in grads.items():
                for k, g in ws.items():
                    self.sums[i][name][k] = self.sums[i][name][k] + g
            self.add_energy(i, x)
            for name in of:
                level = model.blocks[i].mlp.levels[name]
                if self.seen % model.blocks[i].mlp.level.chain()[name] == 0:
                    rate = level.rate.exp()
                    for k, w in of[name].items():
                        of[name][k] = w - rate * self.sums[i][name][k] / (EPS + self.energy[i][name])
                        self.sums[i][name][k] = torch.zeros_like(w)
                    self.energy[i][name] = torch.zeros((), dtype=torch.float64)

    def add_energy(self, i: int, x: Tensor) -> None:
        cms_ = self.model.blocks[i].mlp
        for name in cms_.level.chain():
            w1, w2 = self.weights[i][name]["W1"], self.weights[i][name]["W2"]
            k = F.rms_norm(x, x.shape[-1:])[0]
            z = w2 @ k
            s = z.sigmoid()
            a, slope = z * s, s * (1 + z * (1 - s))
            j2 = ((w1 * slope) ** 2).sum()
            self.energy[i][name] = self.energy[i][name] + (a @ a) + (k @ k) * j2
            x = x + (w1 @ a)[None]

    def read(self, token: int) -> Tensor:
        """One more token; the logits of the next."""
        if self.waiting is not None:
            self.observe(token)
        x, inputs = self.model.embedding(torch.tensor([[token]])), []
        for i, block in enumerate(self.model.blocks):
            y, self.mixers[i] = block.mixer(block.norm(x), self.mixers[i])
            x = x + y
            inputs.append(x[0])
            x = self.continuum(i, x[0], self.weights[i])[None]
        self.waiting = (inputs, x[0])
        return self.model.head(self.model.norm(x[0]))[0]


EPS = 1e-4


@pytest.mark.parametrize(
    "mlps", [*([taught(periods)] for periods in PERIODS), [cms(), taught((3,))], [taught(), cms()]]
)
def test_it_is_the_loop_over_tokens(mlps: list[Any]) -> None:
    model, tokens = make(mlps=mlps), some(2, 12)
    slow = torch.stack([torch.stack([s.read(t) for t in row]) for row in tokens.tolist() if (s := Slow(model))])
    check_loop(model, tokens, slow, unread="every_100.rate")  # nothing is written in 12 tokens


MODELS = {
    "deltanet": {"mixer": deltanet()},
    "titans": {"mixer": titans(chunk=4, read="chunk")},
    "window": {"mixer": window_attention(memory=Window(4))},
    "hope": {"mixer": SelfModifying(chunk=2, projection_chunk=4)},
    "both": {"mixers": [SelfModifying(chunk=2, projection_chunk=4), attention()]},
    "local": {"mlp": taught((3, 5), teach="local")},
    "the last": {"mlps": [cms(), taught((3, 5))]},
    "surprised": {"mlp": taught((3, 5), surprise=0.5)},
}


@pytest.mark.parametrize("name", MODELS)
@given(cuts=st.lists(st.integers(1, 13), max_size=4, unique=True))
@settings(max_examples=8, deadline=None)
def test_any_pieces_are_the_whole(name: str, cuts: list[int]) -> None:
    check_pieces(make(**MODELS[name]), cuts)


@pytest.mark.parametrize("name", MODELS)
def test_streaming_in_float32(name: str) -> None:
    model, tokens = make(**MODELS[name]).float(), some()
    whole, _ = model(tokens)
    first, state = model(tokens[:, :5])
    second, _ = model(tokens[:, 5:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_causal_and_each_sequence_by_itself(name: str) -> None:
    check_causal_and_alone(make(**MODELS[name]))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(name: str, side: str) -> None:
    model, tokens = make(**MODELS[name]), some()
    mask = torch.ones_like(tokens, dtype=torch.bool)
    place = slice(0, 4) if side == "left" else slice(10, 14)
    mask[1, place] = False
    padded, state = model(tokens, mask=mask)
    alone, own = model(tokens[1:][mask[1:]][None])
    torch.testing.assert_close(padded[1][mask[1]], alone[0], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(padded[0], model(tokens)[0][0], rtol=1e-10, atol=1e-10)
    more = some(2, 7, seed=5)
    torch.testing.assert_close(model(more, state)[0][1], model(more[1:], own)[0][0], rtol=1e-10, atol=1e-10)


def test_rows_are_reset_chosen_and_put_together() -> None:
    check_rows(make())


@pytest.mark.parametrize("name", MODELS)
def test_read_without_writing(name: str) -> None:
    model, tokens = make(**MODELS[name]), some()
    _, state = model(tokens)
    _, after = model(some(seed=2), state, learn=False)

    def memories(state: State) -> dict[str, Tensor]:
        return {key: leaf for key, leaf in leaves(state) if ".conv" not in key}

    torch.testing.assert_close(memories(after), memories(state), rtol=0, atol=0)
    _, after = model(some(seed=2), state, learn="mixer")
    changed = {
        key
        for key, leaf in memories(after).items()
        if leaf.shape != memories(state)[key].shape or not leaf.equal(memories(state)[key])
    }
    assert changed
    assert not any(".mlp." in key or key.startswith("taught") for key in changed)
    with pytest.raises(ValueError, match="learn='mlps' is not allowed"):
        model(tokens, learn="mlps")  # type: ignore[arg-type]


def test_without_learning_it_is_the_static_model() -> None:
    model = make()
    static = make(mlp=cms(periods=(3, 5)))
    static.load_state_dict(model.state_dict(), strict=False)
    tokens = some()
    torch.testing.assert_close(model(tokens, learn="mixer")[0], static(tokens)[0], rtol=0, atol=0)


@pytest.mark.parametrize("name", MODELS)
def test_recomputing_changes_no_gradient(name: str) -> None:
    check_recomputing(make(**MODELS[name]), make(**MODELS[name], segment=4))


def test_the_loss_is_the_mean_over_what_counts() -> None:
    model, tokens = make(), some()
    logits, _ = model(tokens[:, :-1])
    true = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model.loss(tokens)[0], true)
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 9:] = False
    a, b = model.loss(tokens[:1, :9])[0] * 8, model.loss(tokens[1:])[0] * 13
    torch.testing.assert_close(model.loss(tokens, mask=mask)[0], (a + b) / 21)
    with pytest.raises(ValueError, match="two tokens or more"):
        model.loss(tokens[:, :1])
    with pytest.raises(ValueError, match="piece=0"):
        model.loss(tokens, piece=0)


def test_meta_gradients_are_finite_differences() -> None:
    model, tokens = make(dim=4, blocks=1, mlp=taught((2,))), some(1, 7)
    for p in model.parameters():
        p.requires_grad_(False)
    weight = model.blocks[0].mlp.levels["every_2"].W1.detach().clone().requires_grad_()
    rate = model.blocks[0].mlp.levels["every_2"].rate.detach().clone().requires_grad_()

    def loss(weight: Tensor, rate: Tensor) -> Tensor:
        given = {"blocks.0.mlp.levels.every_2.W1": weight, "blocks.0.mlp.levels.every_2.rate": rate}
        logits, _ = torch.func.functional_call(model, given, (tokens[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    assert torch.autograd.gradcheck(loss, (weight, rate), eps=1e-6, atol=1e-7)
