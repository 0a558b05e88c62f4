"""What a level is: parts, composition, clocks, the order of levels, the reference machine and the registry."""

import importlib
from typing import Any

from nestopt.core.associative import AssociativeMemory, Gd
from nestopt.core.clock import advance, start
from nestopt.core.compose import Chain, Parallel, chain, parallel
from nestopt.core.features import Features
from nestopt.core.gates import bind, gates_of
from nestopt.core.hookspecs import hookimpl
from nestopt.core.level import Level
from nestopt.core.memories import Memory
from nestopt.core.nesting import Nest, nest
from nestopt.core.objectives import Objective
from nestopt.core.order import Node, ordered
from nestopt.core.outputs import Output
from nestopt.core.part import Channels, Gate, Heads, Number, Part
from nestopt.core.registry import Plugin, PluginWarning, Registry, UnknownName, registry
from nestopt.core.retentions import Retention
from nestopt.core.signal import Signal
from nestopt.core.token_choice import scan
from nestopt.core.token_form import Accepted, Refused, TokenForm
from nestopt.core.tree import State

__all__ = [
    "Accepted",
    "AssociativeMemory",
    "Chain",
    "Channels",
    "Features",
    "Gate",
    "Gd",
    "Heads",
    "Level",
    "Memory",
    "Nest",
    "Node",
    "Number",
    "Objective",
    "Output",
    "Parallel",
    "Part",
    "Plugin",
    "PluginWarning",
    "Refused",
    "Registry",
    "Retention",
    "Signal",
    "State",
    "TokenForm",
    "UnknownName",
    "advance",
    "bind",
    "chain",
    "gates_of",
    "hookimpl",
    "nest",
    "ordered",
    "parallel",
    "registry",
    "scan",
    "start",
]


_DATASETS = ("Dataset", "DocumentDataset", "DocumentSet")
"""Of `nestopt.train.data`; found here too, where plugins had them from. They load when they are asked for."""


def __getattr__(name: str) -> Any:
    if name not in _DATASETS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("nestopt.train.data"), name)
