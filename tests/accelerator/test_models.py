"""HopeLM with every kind of mixer and MLP, consolidation and training, by the rules of an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt import levels
from nestopt.config import Config
from nestopt.config.sizes import NAMES
from nestopt.core.tree import State
from nestopt.models.build import build_model
from nestopt.optim import optimizer as make_optimizer
from nestopt.train import engines
from nestopt.train.objective import Objective
from nestopt.train.sampling import choose
from tests.accelerator.held import held

MIXERS = [
    *("attention", "window_attention", "linear_attention", "retnet", "gated_linear", "deltanet", "gated_deltanet"),
    *("oja", "omega", "ttt", "titans", "dla", "self_modifying"),
]
IN_CONTEXT: dict[str, Any] = {"periods": (2, 4), "learn": "context", "teach": "loss"}
MLPS: dict[str, dict[str, Any]] = {
    "static": {"periods": (1,)},
    "local": {**IN_CONTEXT, "teach": "local"},
    "nested": {**IN_CONTEXT, "variant": "nested"},
    "independent": {**IN_CONTEXT, "variant": "independent"},
    "auto": {**IN_CONTEXT, "periods": ("auto", 4)},
    "truncated": {**IN_CONTEXT, "through": "truncated"},
    "first order": {**IN_CONTEXT, "through": "first_order"},
    "stop": {**IN_CONTEXT, "through": "stop"},
}


def hope(mixer: str, mlp: dict[str, Any], **options: Any) -> nestopt.models.HopeLM:
    sizes = {"dim": 8, "heads": 2, "vocab": 32, "blocks": 1}
    return nestopt.models.HopeLM(mixers=[nestopt.build("level", mixer)], mlp=levels.cms(**mlp), **sizes | options)


def tokens(length: int = 9) -> Tensor:
    return torch.empty(2, length, dtype=torch.int64, device="meta")


def check(model: Any, *, whole: bool = True) -> None:
    model = model.to("meta")

    def trained(**options: Any) -> None:
        loss, _ = model.loss(tokens(), **options)
        loss.backward()

    def streamed() -> None:
        state: State | None = None
        for length in (3, 1, 5):
            logits, state = model(tokens(length), state)
        logits.sum().backward()
        model(tokens(3), state, learn=False)

    def decoded() -> None:
        with torch.inference_mode():
            model.generate(tokens(3), 2, lambda z: choose(z, top_k=8, top_p=0.9))

    starts = torch.zeros(2, 9, dtype=torch.bool)
    starts[0, 5] = starts[1, 0] = True
    held(lambda: trained(starts=starts))
    held(streamed)
    held(decoded)
    if whole:
        held(trained)
        held(lambda: trained(learn="mixer"))
        held(lambda: trained(mask=torch.empty(2, 9, dtype=torch.bool, device="meta")))


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_with(mixer: str) -> None:
    check(hope(mixer, IN_CONTEXT), whole=False)


@pytest.mark.parametrize("mlp", MLPS)
def test_a_model_with_an_mlp(mlp: str) -> None:
    check(hope("deltanet", MLPS[mlp]))


def test_a_model_in_segments() -> None:
    check(hope("titans", MLPS["first order"], segment=4), whole=False)


def test_a_model_of_blocks() -> None:
    check(hope("titans", IN_CONTEXT, blocks=2), whole=False)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith("340m")])
def test_a_model_of_a_size(name: str) -> None:
    section = Config.from_data({"model": name}).model.model_copy(update={"blocks": 1})
    with torch.device("meta"):
        model = build_model(section).to(torch.bfloat16)

    def trained() -> None:
        loss, _ = model.loss(tokens(513), learn="mixer")
        loss.backward()

    held(trained)


def test_rows_and_consolidation() -> None:
    model = hope("deltanet", IN_CONTEXT).to("meta")

    def run() -> None:
        with torch.no_grad():
            _, state = model(tokens())
            state, _ = model.consolidate(state, tokens(), steps=2)
            model.consolidate(state, tokens(), steps=2, into="parameters")

    held(run)
    _, state = model(tokens())
    held(lambda: model.reset(state, [1]))


@pytest.mark.parametrize(
    "draw", [{"temperature": 0}, {}, {"top_k": 3, "temperature": 0.5}, {"top_p": 0.5}], ids=lambda d: str(sorted(d))
)
def test_a_draw(draw: dict[str, Any]) -> None:
    held(lambda: choose(torch.empty(2, 9, device="meta"), **draw))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_training_step_of_the_engine(dtype: str) -> None:
    """Micro-batches, clipping, float32 masters and the optimizers of a run."""
    data = {"model": {"dim": 8, "heads": 2, "blocks": 1, "vocab": 32}, "train": {"dtype": dtype, "accumulate": 2}}
    config = Config.from_data(data)
    engine = engines.make(config)
    engine.device = torch.device("meta")
    model = build_model(config.model).to(device="meta", dtype=getattr(torch, dtype))
    engine.attach(Objective(model, True), model, make_optimizer(model, config))
    held(lambda: engine.update([(tokens(),), (tokens(),)]))
