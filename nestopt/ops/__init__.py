"""Levels on tokens, as functions of tensors: queries, keys, values, gates and a state in; answers and the state out."""

from nestopt.levels.attention.softmax import attention
from nestopt.levels.deep.deep_memory import deep_memory
from nestopt.levels.matrix.delta_rule import delta_rule
from nestopt.levels.matrix.linear_attention import linear_attention
from nestopt.levels.matrix.oja import oja
from nestopt.levels.matrix.omega import omega
from nestopt.levels.matrix.rank_one import rank_one
from nestopt.levels.self_modifying.scan import self_modifying
from nestopt.ops.run import fast_form, run

__all__ = [
    "attention",
    "deep_memory",
    "delta_rule",
    "fast_form",
    "linear_attention",
    "oja",
    "omega",
    "rank_one",
    "run",
    "self_modifying",
]
