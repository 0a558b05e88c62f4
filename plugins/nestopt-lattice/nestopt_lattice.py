"""Lattice (Karami et al. 2025, arXiv:2504.05646): slots on a sphere that learn what is new to them, for nestopt."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

import torch
from torch import Tensor

import nestopt
from nestopt.core import AssociativeMemory, Gate, Memory, Number, Objective, Output, Retention
from nestopt.core.precision import matmul


def unit(slots: Tensor) -> Tensor:
    """Return columns `[.., D, slots]` at length 1; an empty one stays, and its derivative is the identity."""
    square = slots.square().sum(-2, keepdim=True)
    return slots * torch.where(square > 0, square, 1.0).rsqrt()


class UnitSlots(Memory):
    r"""Slots $s_i$, the columns of S `[D_v, D_k]`, whose directions are read: $\sum_i k_i s_i/\lVert s_i\rVert$.

    A gradient through that is at right angles to each slot, $k_i (I - \hat s_i\hat s_i^\top)\,e/\lVert s_i\rVert$: a
    slot learns what it does not hold already. They start empty; a layer learns their start.

    On a gradient `[out, in]` the pairs are those of `matrix`, its rows as keys of e_i, and the direction is the slots.
    """

    requires: ClassVar[frozenset[str]] = frozenset({"shape"})
    linear: ClassVar[bool] = False

    def start(self, dim_k: int, dim_v: int, like: Tensor) -> dict[str, Tensor]:
        return {"m": like.new_zeros(dim_v, dim_k)}

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        return {"m": unit(torch.randn(dim_v, dim_k))}

    def start_on(self, param: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(self.pairs(param)[0])}

    def read(self, theta: dict[str, Tensor], k: Tensor) -> Tensor:
        return matmul(k, unit(theta["m"]).mT)

    def pairs(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        keys = grad.reshape(1, -1) if grad.ndim < 2 else grad.flatten(1)
        return keys, torch.eye(len(keys), dtype=keys.dtype, device=keys.device)

    def direction(self, theta: dict[str, Tensor], grad: Tensor, output: Output) -> Tensor:
        return output(unit(theta["m"])).reshape(grad.shape)


class UnitColumns(Retention):
    """What is kept of a weight are the directions of its columns: each is put back to length 1."""

    def __call__(self, theta: Tensor) -> Tensor:
        return unit(theta)


class Lattice(AssociativeMemory):
    r"""Lattice: slots of length 1 that each take from a token what is at right angles to them.

    $$s_i \leftarrow \mathrm{unit}\big(s_i + \eta\, k_i\, (I - s_i s_i^\top)\, e\big), \qquad e = v - S k,
      \qquad y = S q$$

    It is made of parts: the memory `unit_slots`, whose gradient has the projection in it, the retention `unit_columns`,
    which acts before the write, and an objective, `l2`; with `dot` it has e = v, the similarity form. Layers
    L2-normalise queries and keys for it, and learn the slots' start. Arguments: `associative_memory`; `lr` is η, a gate
    in (0, 1) that starts at ½.

    On tokens it runs by the reference machine, a token at a time.
    """

    qk_norm: ClassVar[bool] = True

    memory: Memory = dataclasses.field(default_factory=UnitSlots)
    objective: Objective = dataclasses.field(default_factory=nestopt.parts.L2)
    retention: Retention = dataclasses.field(default_factory=UnitColumns)
    lr: Number = Gate(0.5)
    fade: Literal["with", "before"] = "before"


@nestopt.hookimpl
def nestopt_register_memories(register: nestopt.core.hookspecs.Register) -> None:
    register("unit_slots", UnitSlots)


@nestopt.hookimpl
def nestopt_register_retentions(register: nestopt.core.hookspecs.Register) -> None:
    register("unit_columns", UnitColumns)


@nestopt.hookimpl
def nestopt_register_levels(register: nestopt.core.hookspecs.Register) -> None:
    register("lattice", Lattice)
