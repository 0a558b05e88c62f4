"""The built-in tasks, registered by the hook that plugins use."""

from __future__ import annotations

from nestopt.core.hookspecs import Register, hookimpl
from nestopt.train.data.tasks import copying, languages, recall

TASKS = {
    "parity": languages.Parity,
    "aa_star": languages.AaStar,
    "abab_star": languages.AbabStar,
    "a_n_b_n": languages.AnBn,
    "a_n_b_n_c_n": languages.AnBnCn,
    "shuffle_2": languages.Shuffle2,
    "s3": languages.S3,
    "mod_3": languages.Mod3,
    "mqar": recall.Mqar,
    "noisy_mqar": recall.NoisyMqar,
    "needle": recall.Needle,
    "facts": recall.Facts,
    "selective_copy": copying.SelectiveCopy,
    "compress": copying.Compress,
    "memorise": copying.Memorise,
}


@hookimpl
def nestopt_register_tasks(register: Register) -> None:
    """Register the tasks of this folder."""
    for name, cls in TASKS.items():
        register(name, cls)
