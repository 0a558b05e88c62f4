"""torch's own table of optimizers with ours in it: what torch's test_optim.py asks of every optimizer, asked here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import io
import pickle
import sys
import types
import unittest
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.optim import Optimizer, lr_scheduler, swa_utils

import nestopt.optim
from nestopt import levels
from nestopt.core import Level, Signal, advance, chain, nest, parallel, registry, start
from nestopt.core.memories import Window
from nestopt.core.tree import leaves
from nestopt.optim import Nested
from nestopt.optim.plan import RESTLESS
from nestopt.testing import check_optimizer

NAMES = ("SGD", "Adam", "AdamW", "Muon")


def torch_table() -> dict[str, Any]:
    """The entries of torch's table that we have an optimizer of the same name for."""
    with contextlib.ExitStack() as stack:
        if "expecttest" not in sys.modules:
            # torch's test cases derive from a class of it; its table, which is all that is wanted, makes no use of it
            unused = types.ModuleType("expecttest")
            unused.TestCase = unittest.TestCase
            stack.enter_context(mock.patch.dict(sys.modules, {"expecttest": unused}))
        from torch.testing._internal import common_optimizers
    found = {info.name: info for info in common_optimizers.optim_db if info.name in NAMES}
    # `differentiable` is refused by ours (test_named); on this device no entry asks for `capturable`
    options = {
        name: common_optimizers._get_optim_inputs_including_global_cliquey_kwargs(
            "cpu", torch.float32, info, skip=("differentiable",)
        )
        for name, info in found.items()
    }
    return {name: (info, options[name]) for name, info in found.items()}


TABLE = torch_table()
INPUTS = {
    f"{name}: {given.desc}": (name, given.kwargs) for name, (_, inputs) in TABLE.items() for given in inputs
}
ERRORS = {
    f"{name}: {error.optimizer_error_input.desc}": (name, error)
    for name, (info, _) in TABLE.items()
    for error in info.optim_error_inputs_func("cpu", torch.float32)
}
SCHEDULES = {
    f"{name} {i}": (name, makers) for name, (info, _) in TABLE.items() for i, makers in enumerate(info.scheduler_inputs)
}
