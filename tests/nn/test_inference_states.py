"""States made under `torch.inference_mode`, which autograd can't save, are gone on from in training."""

from __future__ import annotations

import pytest
import torch

import nestopt
from nestopt.core.tree import leaves

NAMES = [
    "attention",
    "window_attention",
    "linear_attention",
    "retnet",
    "gated_linear",
    "deltanet",
    "gated_deltanet",
    "gla",
    "hgrn2",
    "kda",
    "rwkv6",
    "rwkv7",
    "comba",
    "deltaproduct",
    "oja",
    "omega",
    "ttt",
    "titans",
    "dla",
    "self_modifying",
]
LAYERS = {
    **{name: (name, {"heads": 2}) for name in NAMES},
    "cms": ("cms", {}),
    "cms, in context": (nestopt.levels.cms(periods=(2, 4), learn="context"), {}),
    "a composition": (nestopt.chain(nestopt.levels.momentum(), nestopt.levels.adam(period=2)), {"heads": 2}),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_trained_from_a_state_of_inference(name: str) -> None:
    torch.manual_seed(0)
    level, options = LAYERS[name]
    layer, x = nestopt.layer(level, dim=16, **options), torch.randn(2, 10, 16)
    found = []
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            _, state = layer(x)
        before = [leaf.clone() for _, leaf in leaves(state)]
        y, _ = layer(x, state)
        layer.zero_grad()
        y.square().sum().backward()
        found.append([y, *(p.grad for p in layer.parameters() if p.grad is not None)])
        assert all(torch.equal(a, b) for a, (_, b) in zip(before, leaves(state), strict=True))
    torch.testing.assert_close(found[1], found[0])


def test_a_model_is() -> None:
    model, tokens = nestopt.models.HopeLM(dim=16, blocks=2, heads=2), torch.randint(256, (2, 12))
    with torch.inference_mode():
        _, state = model(tokens)
    loss, _ = model.loss(tokens, state)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
