from __future__ import annotations

import pytest
import torch

from nestopt.core import scan
from nestopt.core.memories import Matrix, Mlp
from nestopt.levels import cms
from nestopt.nn import CMS, layer


@pytest.mark.parametrize("level", [cms(), cms(periods=(1,)), cms(periods=(2, 2, 8), memory=Mlp(hidden=5, depth=3))])
def test_equals_the_level_on_tokens_with_every_gradient(level: cms) -> None:
    module = CMS(6, level).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    parameters = dict(module.levels.named_parameters())
    y, state = module(x)
    # the level sees one head, and its weights stacked over heads
    start = {name: p[None] for name, p in parameters.items()}
    true, _ = scan(level, x[:, :, None], x[:, :, None], x[:, :, None], learned=start)
    assert state == {}
    torch.testing.assert_close(y, true[:, :, 0], rtol=1e-10, atol=1e-10)
    inputs = [x, *parameters.values()]
    fast, slow = (torch.autograd.grad(out.square().sum(), inputs) for out in (y, true))
    torch.testing.assert_close(fast, slow, rtol=1e-9, atol=1e-10)


def test_names_and_periods_are_those_of_the_level() -> None:
    module = CMS(4, cms(periods=(1, 16, 16)))
    assert [name for name, _ in module.named_parameters()] == [
        f"levels.{name}.{weight}" for name in ("every_1", "every_16", "every_16_2") for weight in ("W1", "W2")
    ]
    assert [block.period for block in module.levels.values()] == [1, 16, 16]
    assert module.levels["every_16"].W2.shape == (16, 4)
    assert [block.period for block in CMS(4, cms(periods=(1, 4), period=2)).levels.values()] == [2, 8]


def test_layer_makes_one() -> None:
    module = layer(cms(periods=(3,)), 8)
    assert isinstance(module, CMS)
    assert module.level == cms(periods=(3,))


def test_says_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="memory=Matrix"):
        CMS(4, cms(memory=Matrix()))
    module = CMS(4)
    with pytest.raises(ValueError, match=r"\[2, 3, 5\].*dim=4"):
        module(torch.zeros(2, 3, 5))
    with pytest.raises(ValueError, match="conv"):
        module(torch.zeros(2, 3, 4), {"conv": torch.zeros(2, 3, 4)})
