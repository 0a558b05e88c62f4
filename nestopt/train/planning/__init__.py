"""What a run takes of many GPUs, before there is one: memory, time and traffic, counted on tensors without data."""

from nestopt.train.planning.passes import Pass, count_pass
from nestopt.train.planning.ranks import Rank, Simulation, simulate
from nestopt.train.planning.rates import Rates, measure
from nestopt.train.planning.scale import Gpu, Memory, Scale, scale
from nestopt.train.planning.sharing import Sharing
from nestopt.train.planning.text import ranks_table, scale_table

__all__ = [
    "Gpu",
    "Memory",
    "Pass",
    "Rank",
    "Rates",
    "Scale",
    "Sharing",
    "Simulation",
    "count_pass",
    "measure",
    "ranks_table",
    "scale",
    "scale_table",
    "simulate",
]
