"""Weights that others lay out in their own way are stepped as the same weights in torch's: turned, fused, of gates."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt.config import ConfigError
from nestopt.levels import delta_momentum, dgd, ggd, m3, matrix_adagrad, momentum, muon, shampoo
from nestopt.optim import Nested, Split
from nestopt.optim.layer_inputs.sums import means
from nestopt.optim.layer_inputs.watcher import Watcher
from tests.optim.watched import Cubic

transformers = pytest.importorskip("transformers")
Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D

ON_MATRICES = {
    "muon": muon(dtype="float64"),
    "muon, rms": muon(scale="match_rms_adamw", dtype="float64"),
    "muon, spectral": muon(scale="spectral_unclamped", dtype="float64"),
    "m3": m3(slow_period=2, dtype="float64"),
    "shampoo": shampoo(),
    "matrix_adagrad": matrix_adagrad(),
    "delta_momentum": delta_momentum(),
    "dgd of muon": dgd(muon(dtype="float64")),
}
ON_LAYERS = {
    "dgd": dgd(momentum()),
    "dgd exact": dgd(solver="exact"),
    "dgd exact, normalised": dgd(solver="exact", normalize_inputs=True),
    "ggd": ggd(),
    "ggd cubic": ggd(Cubic()),
}
LEVELS = ON_MATRICES | ON_LAYERS


class Net(nn.Module):
    """The same function, of torch's layers or of others' that are turned."""

    def __init__(self, turned: str | None = None) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 10), nn.Linear(10, 6), nn.Linear(6, 3)
        generator = torch.Generator().manual_seed(0)
        for param in self.parameters():
            param.data = torch.randn(param.shape, generator=generator) / 2
        if turned is not None:
            self.up, self.down = (_turned(layer, turned) for layer in (self.up, self.down))
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        for layer in (self.up, self.down):
            x = torch.tanh(layer(x) if layer.weight.ndim == 2 else layer(x.unsqueeze(-1)).squeeze(-1))
        return self.head(x)


def _turned(layer: nn.Linear, kind: str) -> Any:
    out, into = layer.weight.shape
    other: Any = Conv1D(out, into) if kind == "Conv1D" else nn.ConvTranspose1d(into, out, 1)
    other.weight.data = layer.weight.detach().mT.contiguous().reshape(other.weight.shape)
    other.bias.data = layer.bias.detach().clone()
    return other


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range, n: int = 12) -> None:
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(n, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()


def alike(one: nn.Module, turned: nn.Module) -> None:
    for (name, p), q in zip(one.named_parameters(), turned.parameters(), strict=True):
        same = q if p.shape == q.shape else q.flatten(1).mT
        torch.testing.assert_close(same, p, rtol=1e-7, atol=1e-9, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("period", [1, 2])
@pytest.mark.parametrize("n", [2, 12])
@pytest.mark.parametrize("level", LEVELS)
def test_a_conv1d_is_a_linear_layer(level: str, n: int, period: int) -> None:
    models = Net(), Net("Conv1D")
    for model in models:
        group = {"match": r"(up|down)\.weight", "period": period}
        train(model, nestopt.optimizer(model, LEVELS[level], 0.05, 0.1, groups=[group]), range(4), n)
    alike(*models)


@pytest.mark.parametrize("level", [key for key in ON_MATRICES if "dgd" not in key and "delta" not in key])
def test_a_transposed_convolution_is_a_linear_layer_turned(level: str) -> None:
    models = Net(), Net("ConvTranspose1d")
    for model in models:
        train(model, nestopt.optimizer(model, LEVELS[level], 0.05, 0.1), range(4))
    alike(*models)
    model = nn.Sequential(nn.ConvTranspose2d(4, 2, 3), nn.Linear(4, 4), nn.Linear(4, 4))
    why = {row.name: row.why for row in nestopt.optimizer(model, LEVELS[level]).explain()}
    assert why["0.weight"] == "a transposed convolution, 4×18 as it lies; seen transposed"


@pytest.mark.parametrize("width", [4, 64])
def test_turned_weights_of_one_shape_are_stepped_together(width: int) -> None:
    """In a stack where they are small, and saved and loaded as any."""
    start = torch.randn(3, 8, width)
    turned, plain = [nn.Parameter(w.clone()) for w in start], [nn.Parameter(w.mT.contiguous()) for w in start]

    def make() -> Nested:
        return Nested([{"params": turned, "view": Split(1, transposed=True)}], muon(dtype="float32"), 0.1, 0.1)

    one, other = make(), Nested(plain, muon(dtype="float32"), 0.1, 0.1)
    for step in range(4):
        for p, q in zip(turned, plain, strict=True):
            p.grad = torch.randn(8, width, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.mT.clone()
        if step == 2:
            file = io.BytesIO()
            torch.save(one.state_dict(), file)
            file.seek(0)
            one = make()
            one.load_state_dict(torch.load(file, weights_only=True))
        one.step()
        other.step()
    assert type(one._plan.shares[0].executors[0]).__name__ == "Stacked"
    for p, q in zip(turned, plain, strict=True):
        torch.testing.assert_close(p.mT, q)
    with pytest.raises(ValueError, match=r"view: .*give the group the view that it was saved with"):
        Nested(turned, muon(dtype="float32")).load_state_dict(one.state_dict())


def test_capturable_steps_of_turned_weights() -> None:
    start, grad = torch.randn(8, 4), torch.randn(8, 4)
    found = []
    for capturable in (False, True):
        for view in (Split(1, transposed=True), Split(2, 1, transposed=True)):
            param = nn.Parameter(start.clone())
            param.grad = grad.clone()
            built = Nested([{"params": [param], "view": view}], muon(), torch.tensor(0.1), capturable=capturable)
            built.step()
            found.append(param)
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.parametrize("level", ON_LAYERS)
def test_totals_of_several_processes_are_turned_too(level: str) -> None:
    """Twice the sums over twice the rows are the same means."""
    layer = Conv1D(5, 3).double()
    watcher = Watcher(layer, {layer.weight: LEVELS[level]})
    layer(torch.randn(7, 3, dtype=torch.float64)).square().mean().backward()
    alone, sums = watcher.totals(layer.weight), watcher._known[layer.weight].sums
    twice = sums.totals_of_all(layer.weight.shape, layer.weight.device, lambda tensor: tensor.add_(tensor))
    one, two = means(alone, layer.weight), means(twice, layer.weight)
    assert one is not None
    assert two is not None
    for key in ("wxx", "mean_square", "grad", "gram"):
        a, b = getattr(one, key), getattr(two, key)
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_the_exact_solver_is_not_shown_a_turned_weight() -> None:
    layer = Conv1D(5, 3)
    optimizer = nestopt.optim.DGD([layer.weight], 0.1, layer, solver="exact")
    layer(torch.randn(2, 7, 3)).sum().backward()
    with pytest.raises(ValueError, match=r"as \[out, in\], and its shape is \[3, 5\].*Split\(1, transposed=True\)"):
        optimizer.step()


# -- fused -------------------------------------------------------------------------------------------------------------


def apart(param: Tensor, grads: list[Tensor], parts: int, dim: int, turned: bool, level: Any) -> Tensor:
    """What the matrices of a fused weight become, each a parameter by itself, as torch's layers have it."""
    pieces = [nn.Parameter(p.mT.contiguous() if turned else p.clone()) for p in param.detach().chunk(parts, dim)]
    built = Nested(pieces, level, 0.1, 0.1)
    for grad in grads:
        for piece, own in zip(pieces, grad.chunk(parts, dim), strict=True):
            piece.grad = own.mT.clone() if turned else own.clone()
        built.step()
    return torch.cat([piece.detach().mT if turned else piece.detach() for piece in pieces], dim)


def gpt2() -> nn.Module:
    small = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 8, "add_cross_attention": True}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**small, bos_token_id=0, eos_token_id=0))


class Timm(nn.Module):
    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.qkv, self.proj, self.head = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim), nn.Linear(dim, 2)


def phi3() -> nn.Module:
    small = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return transformers.Phi3ForCausalLM(transformers.Phi3Config(**small, **heads, **ids))


FUSED: dict[str, tuple[Any, str, tuple[int, int, bool], str]] = {
    "LSTM": (lambda: nn.LSTM(5, 8), "weight_ih_l0", (4, 0, False), "4 gates"),
    "LSTM back": (
        lambda: nn.LSTM(5, 8, 2, bidirectional=True, proj_size=3),
        "weight_hh_l1_reverse",
        (4, 0, False),
        "4 gates",
    ),
    "LSTMCell": (lambda: nn.LSTMCell(5, 8), "weight_hh", (4, 0, False), "4 gates"),
    "GRU": (lambda: nn.GRU(5, 8), "weight_hh_l0", (3, 0, False), "3 gates"),
    "GRUCell": (lambda: nn.GRUCell(5, 8), "weight_ih", (3, 0, False), "3 gates"),
    "timm": (lambda: nn.Sequential(Timm()), "0.qkv.weight", (3, 0, False), "by its name 'qkv'"),
    "c_attn": (gpt2, "transformer.h.0.attn.c_attn.weight", (3, 1, True), "queries, keys and values"),
    "cross": (gpt2, "transformer.h.0.crossattention.c_attn.weight", (2, 1, True), "keys and values"),
    "gates": (phi3, "model.layers.0.mlp.gate_up_proj.weight", (2, 0, False), "gates and values"),
}


@pytest.mark.parametrize("level", [key for key in ON_MATRICES if "dgd" not in key])
@pytest.mark.parametrize("name", FUSED)
def test_fused_weights_are_stepped_as_their_matrices(name: str, level: str) -> None:
    make, key, (parts, dim, turned), word = FUSED[name]
    model = make().double()
    param = dict(model.named_parameters())[key]
    grads = [torch.randn_like(param) for _ in range(3)]
    want = apart(param, grads, parts, dim, turned, LEVELS[level])
    built = nestopt.optimizer(model, LEVELS[level], 0.1, 0.1, route=lambda name, param: name == key)
    for grad in grads:
        param.grad = grad.clone()
        built.step()
    torch.testing.assert_close(param.detach(), want, rtol=1e-8, atol=1e-10)
    (why,) = [row.why for row in nestopt.optimizer(model, "muon").explain() if row.name == key]
    assert word in why
    assert f"seen as {parts} matrices" in why


def test_what_is_no_fusion_stays_one_matrix() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.query_key_value = nn.Linear(8, 8 + 2 * 4), nn.Linear(8, 24)
            self.rnn, self.projected = nn.RNN(8, 8), nn.LSTM(8, 8, proj_size=3)
            self.head = nn.Linear(8, 2)

    built = nestopt.optimizer(Grouped(), "muon")
    seen = {name for group in built.param_groups if "view" in group for name in group["param_names"]}
    assert seen == {"projected.weight_ih_l0", "projected.weight_hh_l0"}


def test_views_of_fused_weights_can_be_overruled() -> None:
    whole = {"match": "qkv", "view": {"split": 1}}
    built = nestopt.optimizer(Timm(), "muon", groups=[whole])
    assert not any("view" in group for group in built.param_groups)
    turned = nestopt.optimizer(Timm(), "muon", groups=[{"match": "proj", "view": {"split": 2, "transposed": True}}])
    assert Split(2, 0, True) in [group.get("view") for group in turned.param_groups]
    with pytest.raises(ConfigError, match=r"view\.transposed"):
        nestopt.optimizer(Timm(), "muon", groups=[{"match": "proj", "view": {"split": 2, "transposed": 3}}])


def test_gpt2_trains_and_goes_on_from_a_checkpoint() -> None:
    model = gpt2()
    tokens = torch.arange(8)[None]
    states = torch.randn(1, 4, 8)
    for level in ("muon", dgd(muon()), "dgd"):
        optimizer = nestopt.optimizer(model, level, 0.01)

        def go(net: nn.Module, own: Nested) -> None:
            own.zero_grad()
            net(tokens, labels=tokens, encoder_hidden_states=states).loss.backward()
            own.step()

        model.eval()  # no dropout
        go(model, optimizer)
        twin = copy.deepcopy(model)
        other = nestopt.optimizer(twin, level, 0.01)
        other.load_state_dict(optimizer.state_dict())
        go(model, optimizer)
        go(twin, other)
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            assert torch.equal(p, q)
