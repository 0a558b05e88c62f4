"""Every level as a layer, by the rules of an accelerator."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt import levels
from nestopt.nn import CMS, MemoryAttention, MemoryBlock, SequenceMemory
from nestopt.ops import fast_form
from tests.accelerator.held import held
from tests.levels.gradient.tools import LINKS

PARTS = {"chain", "parallel", "nest"}
"""Made of other levels."""

COMPOSED: dict[str, Any] = {
    "associative_memory, huber": nestopt.AssociativeMemory(objective=nestopt.build("objective", "huber"), chunk=4),
    "chain": nestopt.chain(levels.momentum(0.9), levels.newton_schulz()),
    "parallel": nestopt.parallel(levels.retnet(), levels.deltanet()),
    "nest": nestopt.nest(outer=levels.momentum(0.5, period=4), inner=levels.momentum(0.9)),
    "titans by adam": levels.titans(rule=levels.adam(), step_size=0.01),
    "titans by delta_momentum": levels.titans(rule=levels.delta_momentum()),
    "titans of one layer, chunks": levels.titans(read="chunk", chunk=4),
    "omega of an mlp": levels.omega(memory=levels.titans().memory),
    "self_modifying with momentum": levels.self_modifying(momentum=0.9, chunk=4, projection_chunk=8),
}
ALL: dict[str, Any] = {name: name for name in nestopt.registry.names("level") if name not in PARTS | LINKS} | COMPOSED

NO_LAYERS = {"adamw", "dgd", "ftrl", "ggd", "schedule_free", "weight_average"}
"""They need a parameter beside what they remember, or its layer's inputs: errors that other tests look at."""


def made(name: str, dtype: torch.dtype) -> tuple[Any, Tensor]:
    layer = nestopt.layer(ALL[name], dim=8, **({} if name == "cms" else {"heads": 2}))
    length = 21 if name == "cms" or fast_form(layer.level) else 5  # the reference machine takes token by token
    return layer.to(device="meta", dtype=dtype), torch.empty(2, length, 8, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *(
            pytest.param(name, torch.bfloat16, marks=pytest.mark.slow if name.startswith("titans by") else ())
            for name in ALL
            if name not in NO_LAYERS
        ),
        ("deltanet", torch.float32),
    ],
)
def test_a_layer(name: str, dtype: torch.dtype) -> None:
    layer, x = made(name, dtype)
    length = x.shape[1]
    mask = torch.empty(2, length, dtype=torch.bool, device="meta")

    def trained(**options: Any) -> Any:
        y, state, *_ = layer(x, **options)
        y.float().square().sum().backward()
        return state

    def streamed() -> None:
        y, state = layer(x[:, :3])
        y, state = layer(x[:, 3:], state, learn=False)
        y, state = layer(x[:, 3:], state)
        y.float().sum().backward()

    def decoded() -> None:
        with torch.inference_mode():
            _, state = layer(x)
            for t in range(3):
                _, state = layer(x[:, t : t + 1], state) if isinstance(layer, CMS) else layer.step(x[:, t], state)

    for run in (trained, streamed, decoded, lambda: trained(mask=mask)):
        held(run)
    if not isinstance(layer, CMS):
        rows = x.flatten(0, 1)[None]
        held(lambda: layer(rows, cu_seqlens=[0, 2, length, 2 * length]))
        held(lambda: layer(rows, cu_seqlens=torch.tensor([0, length + 1, 2 * length])))
    if isinstance(layer, SequenceMemory):
        held(lambda: trained(return_stats=True))


CONTINUA: dict[str, dict[str, Any]] = {
    "chain": {},
    "nested": {"variant": "nested"},
    "independent": {"variant": "independent"},
    "auto": {"periods": ("auto", 4)},
    "raw": {"normalized": False},
    "truncated": {"through": "truncated"},
    "first order": {"through": "first_order"},
    "muon": {"learner": levels.muon()},
}


@pytest.mark.parametrize("name", CONTINUA)
def test_a_continuum_in_context(name: str) -> None:
    level = levels.cms(**{"periods": (2, 4), "learn": "context", "teach": "local"} | CONTINUA[name])
    layer, x = CMS(16, level).to("meta"), torch.empty(2, 9, 16, device="meta")

    def trained(**options: Any) -> Any:
        y, state = layer(x, **options)
        y.square().sum().backward()
        return state

    def streamed() -> None:
        _, state = layer(x[:, :3], layer.init_state(2))
        for t in range(2):
            _, state = layer(x[:, t : t + 1], state)
        _, state = layer(x, state, learn=False)

    mask = torch.empty(2, 9, dtype=torch.bool, device="meta")
    for run in (trained, torch.inference_mode()(streamed), lambda: trained(mask=mask)):
        held(run)


def test_blocks_and_attention() -> None:
    x = torch.empty(2, 9, 16, device="meta")
    block = MemoryBlock(levels.titans(), 16, 2).to("meta")
    held(lambda: block(x).sum().backward())
    attention = MemoryAttention(16, 2, level=levels.deltanet()).to("meta")
    causal = torch.empty(9, 9, dtype=torch.bool, device="meta")
    shut = torch.empty(2, 9, dtype=torch.bool, device="meta")
    held(lambda: attention(x, x, x, key_padding_mask=shut, attn_mask=causal, is_causal=True)[0].sum().backward())


def test_rows_of_a_state() -> None:
    from nestopt.nn import cat, index

    layer, x = made("titans", torch.float32)

    def rows() -> None:
        _, state = layer(x)
        state = cat([index(state, [1]), index(state, torch.tensor([0, 1]))])
        layer(x[:1].expand(3, -1, -1), layer.reset(state, [0]))

    held(rows)
