"""Levels on tokens, as modules: `y, state = module(x, state=None)`; and what can be done with their states."""

from nestopt.nn.attention import MemoryAttention
from nestopt.nn.block import MemoryBlock
from nestopt.nn.cms import CMS
from nestopt.nn.factory import layer
from nestopt.nn.sequence_memory import SequenceMemory
from nestopt.nn.state import cat, clone, detach, index, to

__all__ = ["CMS", "MemoryAttention", "MemoryBlock", "SequenceMemory", "cat", "clone", "detach", "index", "layer", "to"]
