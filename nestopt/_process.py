"""What must be settled before torch is first imported, where the process is ours: the command line's."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def settle() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has said otherwise.

    They spin by default, and where anything else wants their cores they then wait for whole time slices, some hundred
    times a step. OpenMP reads the environment when torch loads it, so this comes first; a program that imports nestopt
    keeps its own settings.
    """
    as_module = ("-m", "nestopt") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    if as_module or Path(sys.argv[0]).stem == "nestopt":  # `python -m nestopt`, or the console script
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
