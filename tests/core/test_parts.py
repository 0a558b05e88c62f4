"""Every registered part has a public home."""

from __future__ import annotations

import pytest

import nestopt.parts
from nestopt.core.registry import registry


@pytest.mark.parametrize("kind", ["memory", "objective", "retention", "features", "output"])
def test_every_part_is_in_parts(kind: str) -> None:
    own = [name for name in registry.names(kind) if registry.owner(kind, name) == "nestopt"]
    assert own
    for name in own:
        cls = registry.get(kind, name)
        assert getattr(nestopt.parts, cls.__name__) is cls
        assert cls.__name__ in nestopt.parts.__all__


def test_documented_paths_go_on_working() -> None:
    from nestopt.core.features import Elu
    from nestopt.core.memories import Matrix, Mlp
    from nestopt.core.objectives import L2
    from nestopt.core.retentions import Decay

    for part in (Elu, Matrix, Mlp, L2, Decay):
        assert getattr(nestopt.parts, part.__name__) is part
