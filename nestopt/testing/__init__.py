"""What authors run in tests of theirs: `check_level(Lion())` for a level, `check_optimizer(Lion)` for an optimizer, and
`accelerator_rules()` around code on meta tensors, for what would fail or wait on a GPU.
"""

from nestopt.testing.accelerator import AcceleratorFault, accelerator_rules
from nestopt.testing.levels import check_layer, check_level
from nestopt.testing.optimizers import check_optimizer

__all__ = ["AcceleratorFault", "accelerator_rules", "check_layer", "check_level", "check_optimizer"]
