"""Levels that others publish, too: equal to pytorch-optimizer's where the algorithm is the same."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nestopt
from nestopt import Level
from nestopt.levels import (
    adam,
    adamuon,
    cautious,
    centralize,
    clip,
    ftrl,
    grokfast,
    lamb,
    lion_chain,
    mars,
    momentum,
    normuon,
    soap,
    trust_ratio,
)
from nestopt.optim import Nested

theirs = pytest.importorskip("pytorch_optimizer", reason="the outside reference")

Make = Callable[[list[Any]], torch.optim.Optimizer]
STEPS, LR = 20, 0.01


def muon_group(params: list[Any], kind: str, **given: Any) -> torch.optim.Optimizer:
    return getattr(theirs, kind)([{"params": params, "use_muon": True, **given}])


PEERS: dict[str, tuple[Level, Make, float]] = {
    # theirs makes up for the start of the first average only in the step, so both without
    "lamb": (
        lamb((0.9, 0.99), weight_decay=0.1, bias_correction=False),
        lambda p: theirs.Lamb(p, lr=LR, betas=(0.9, 0.99), weight_decay=0.1, weight_decouple=False, adam_debias=True),
        1e-9,
    ),
    "lars": (
        nestopt.chain(trust_ratio(1e-3), momentum(0.9)),
        lambda p: theirs.LARS(p, lr=LR, momentum=0.9, dampening=0.0, trust_coefficient=1e-3, nesterov=False),
        1e-9,
    ),
    "lion": (lion_chain((0.9, 0.99)), lambda p: theirs.Lion(p, lr=LR, betas=(0.9, 0.99), weight_decay=0.0), 1e-9),
    "ftrl": (
        ftrl(l1=0.05, l2=0.1, beta=0.5),
        lambda p: theirs.FTRL(p, lr=LR, beta=0.5, lambda_1=0.05, lambda_2=0.1),
        1e-9,
    ),
    "cautious lion": (
        cautious(of=lion_chain((0.9, 0.99))),
        lambda p: theirs.Lion(p, lr=LR, betas=(0.9, 0.99), weight_decay=0.0, cautious=True),
        1e-9,
    ),
    "centralized lion": (
        nestopt.chain(centralize(), lion_chain((0.9, 0.99))),
        lambda p: theirs.Lion(p, lr=LR, betas=(0.9, 0.99), weight_decay=0.0, use_gc=True),
        1e-9,
    ),
    # theirs adds ε before it makes up for the start, or puts it in the place of a small root
    "grokfast": (
        nestopt.chain(grokfast(0.9, 2.0), adam((0.9, 0.99))),
        lambda p: theirs.GrokFastAdamW(p, LR, (0.9, 0.99), grokfast_alpha=0.9, grokfast_lamb=2.0, normalize_lr=False),
        1e-6,
    ),
    "mars": (
        mars((0.95, 0.99), 0.025),
        lambda p: theirs.MARS(p, lr=LR, betas=(0.95, 0.99), gamma=0.025, weight_decay=0.0, optimize_1d=True),
        1e-5,
    ),
    # theirs does not correct the moments before it adds ε, and decomposes in float32
    "soap": (
        soap(adam((0.95, 0.95)), basis_every=3),
        lambda p: theirs.SOAP(p, lr=LR, betas=(0.95, 0.95), weight_decay=0.0, precondition_frequency=3),
        2e-5,
    ),
    # theirs orthogonalises in bfloat16 whatever it is given
    "normuon": (
        normuon(0.95, 0.95, dtype="bfloat16"),
        lambda p: muon_group(p, "NorMuon", lr=LR, momentum=0.95, beta2=0.95, update_scale="match_rms"),
        2e-2,
    ),
    "adamuon": (
        adamuon((0.9, 0.95), signed=False, dtype="bfloat16"),
        lambda p: muon_group(p, "AdaMuon", lr=LR, betas=(0.9, 0.95), use_adjusted_lr=True),
        2e-2,
    ),
}


def trained(make: Make, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 6), (4, 4)]
    weights = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]
    optimizer = make(weights)
    for _ in range(STEPS):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        optimizer.step()
    return [weight.detach() for weight in weights]


@pytest.mark.parametrize("name", PEERS)
def test_it_is_the_published_one(name: str) -> None:
    level, peer, tolerance = PEERS[name]
    begun = trained(lambda p: torch.optim.SGD(p, lr=0.0))
    for got, want, start in zip(trained(lambda p: Nested(p, level, lr=LR)), trained(peer), begun, strict=True):
        moved = (want - start).norm() / math.sqrt(want.numel())
        assert moved > 0.01 * LR
        assert float((got - want).norm() / (want - start).norm()) <= tolerance


def test_adaptive_clipping_is_theirs_on_matrices() -> None:
    param, grad = torch.randn(5, 3, dtype=torch.float64) * 0.01, torch.randn(5, 3, dtype=torch.float64)
    got, _ = clip(0.1, by="adaptive").step(grad, {}, nestopt.Signal(1, param))
    torch.testing.assert_close(got, theirs.agc(param, grad, agc_eps=1e-3, agc_clip_val=0.1))
