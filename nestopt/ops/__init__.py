"""Levels on tokens, as functions of tensors: queries, keys, values, gates and a state in; answers and the state out."""

from nestopt.ops.attention import attention
from nestopt.ops.dispatch import fast_form, run
from nestopt.ops.linear_attention import linear_attention

__all__ = ["attention", "fast_form", "linear_attention", "run"]
