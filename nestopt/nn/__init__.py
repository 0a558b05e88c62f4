"""Levels on tokens, as modules: `y, state = module(x, state=None)`."""

from nestopt.nn.cms import CMS
from nestopt.nn.factory import layer
from nestopt.nn.sequence_memory import SequenceMemory

__all__ = ["CMS", "SequenceMemory", "layer"]
