"""Levels on tokens, as modules: `y, state = module(x, state=None)`; and what can be done with their states."""

from nestopt.core.token_state import cat, clone, detach, index, to
from nestopt.nn.attention import MemoryAttention
from nestopt.nn.block import MemoryBlock
from nestopt.nn.cms import CMS
from nestopt.nn.consolidate import Consolidation, consolidate
from nestopt.nn.factory import layer
from nestopt.nn.hope import HopeAttentionBlock, HopeBlock
from nestopt.nn.replay import Replay
from nestopt.nn.self_modifying import SelfModifyingTitans
from nestopt.nn.sequence_memory import SequenceMemory
from nestopt.nn.titans import TitansMixer

__all__ = [
    "CMS",
    "Consolidation",
    "HopeAttentionBlock",
    "HopeBlock",
    "MemoryAttention",
    "MemoryBlock",
    "Replay",
    "SelfModifyingTitans",
    "SequenceMemory",
    "TitansMixer",
    "cat",
    "clone",
    "consolidate",
    "detach",
    "index",
    "layer",
    "to",
]
