"""What learns at which frequency: any level, optimizer or model as its ordered levels."""

from nestopt.description.description import Description
from nestopt.description.entry import describe
from nestopt.description.memory import Memory

__all__ = ["Description", "Memory", "describe"]
