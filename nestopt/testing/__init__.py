"""What authors run in tests of theirs: `check_level(Lion())` for a level, `check_optimizer(Lion)` for an optimizer,
`check_part`, `check_form`, `check_dataset`, `check_task`, `check_schedule` and `check_in_a_run` (of callbacks and
loggers) for what else a plugin may bring; and `accelerator_rules()` around code on meta tensors, for what would fail or
wait on a GPU.
"""

from nestopt.testing.accelerator import AcceleratorFault, accelerator_rules
from nestopt.testing.levels import check_layer, check_level
from nestopt.testing.optimizers import check_optimizer
from nestopt.testing.parts import check_dataset, check_form, check_part, check_schedule, check_task
from nestopt.testing.training import check_in_a_run

__all__ = [
    "AcceleratorFault",
    "accelerator_rules",
    "check_dataset",
    "check_form",
    "check_in_a_run",
    "check_layer",
    "check_level",
    "check_optimizer",
    "check_part",
    "check_schedule",
    "check_task",
]
