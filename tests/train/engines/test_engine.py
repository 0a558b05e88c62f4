"""The engine of one process: what a step is made of."""

from __future__ import annotations

import copy

import pytest
import torch

from nestopt.config import Config
from nestopt.optim import optimizer as make_optimizer
from nestopt.train import engines
from nestopt.train.objective import Objective
from nestopt.train.run import build_model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_on_the_sum_of_its_batches_gradients(dtype: str) -> None:
    """In bfloat16 they are added up in float32, in the copies that the optimizer keeps."""
    config = Config.from_data(
        {
            "model": {"dim": 16, "blocks": 1, "heads": 2},
            "optimizer": {"stack": "adam"},
            "train": {"dtype": dtype, "accumulate": 3, "clip": None},
        }
    )
    lm = build_model(config)
    twin = copy.deepcopy(lm)
    engine = engines.make(config)
    engine.attach(Objective(lm), lm, make_optimizer(lm, config))
    batches = [torch.randint(256, (2, 9), generator=torch.Generator().manual_seed(i)) for i in range(3)]
    loss, norm = engine.update([(batch,) for batch in batches])

    wanted: dict[str, torch.Tensor] = {}
    total = 0.0
    for batch in batches:
        twin.zero_grad()
        mean = twin.loss(batch)[0] / 3
        mean.backward()
        total += float(mean.detach())
        for name, param in twin.named_parameters():
            if param.grad is not None:
                wanted[name] = wanted.get(name, torch.zeros(())) + param.grad.float()
    found = {
        name: param.grad
        for group in engine.optimizer.param_groups
        for name, param in zip(group["param_names"], group["params"], strict=True)
    }
    assert {found[name].dtype for name in found} == {torch.float32}
    assert set(wanted) <= set(found)
    for name, grad in wanted.items():
        torch.testing.assert_close(found[name], grad, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(norm, torch.stack([grad.norm() for grad in wanted.values()]).norm())
    assert float(loss) == pytest.approx(total)
