"""Levels on tokens, as functions of tensors: queries, keys, values, gates and a state in; answers and the state out."""

from nestopt.ops.attention import attention
from nestopt.ops.deep_memory import deep_memory
from nestopt.ops.delta_rule import delta_rule
from nestopt.ops.dispatch import run
from nestopt.ops.forms import fast_form
from nestopt.ops.linear_attention import linear_attention
from nestopt.ops.oja import oja
from nestopt.ops.omega import omega
from nestopt.ops.self_modifying import self_modifying

__all__ = [
    "attention",
    "deep_memory",
    "delta_rule",
    "fast_form",
    "linear_attention",
    "oja",
    "omega",
    "run",
    "self_modifying",
]
