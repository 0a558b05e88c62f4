"""What authors run in tests of theirs: `check_level(Lion())` for a level, `check_optimizer(Lion)` for an optimizer."""

from nestopt.testing.levels import check_layer, check_level
from nestopt.testing.optimizers import check_optimizer

__all__ = ["check_layer", "check_level", "check_optimizer"]
