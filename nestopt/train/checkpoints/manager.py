"""Save and load a model and its optimizer, however their numbers are spread over processes."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.optim.sharded.optimizer import Sharded
from nestopt.optim.sharded.saved import WEIGHTS, CheckpointMismatch, TensorSlice
from nestopt.train.checkpoints.shards import ShardReader, ShardWriter
from nestopt.train.errors import CheckpointError

GROUPS = "groups"
"""Where in a checkpoint's meta the settings of the parameter groups are."""


class CheckpointManager:
    """Saves and loads a model and its optimizer under an engine.

    Args:
        lm: the model, whose names count.
        optimizer: attached.
        rank, world: this process's number, and how many there are.
        cut: whether weights are in pieces between steps.
        wait: returns when all processes have called it.
        spread: lets the model have what was written to the optimizer's own copies of weights.
    """

    def __init__(
        self,
        lm: nn.Module,
        optimizer: Sharded,
        *,
        rank: int = 0,
        world: int = 1,
        cut: bool = False,
        wait: Callable[[], None] = lambda: None,
        spread: Callable[[], None] = lambda: None,
    ) -> None:
        self.lm, self.optimizer, self.rank, self.world = lm, optimizer, rank, world
        self.cut, self.wait, self.spread = cut, wait, spread
        self._numbers: dict[Path, int] = {}

    @property
    def shards(self) -> int:
        """How many files a checkpoint has: the first so many processes write one each."""
        return self.world if self.cut or any(unit.divided for unit in self.optimizer.units()) else 1

    def save(
        self,
        folder: Path,
        meta: dict[str, Any],
        items: Callable[[], Iterator[tuple[str, TensorSlice]]] = lambda: iter(()),
    ) -> None:
        """Write the checkpoint of a folder, in place of the one that it has. All processes must call it.

        Args:
            folder: made if it is not there.
            meta: plain values of one's own.
            items: gives what this process keeps besides.
        """
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
        self.wait()
        writer = ShardWriter(folder, self.rank, self.shards, self.wait, self._number(folder))

        def everything() -> Iterator[tuple[str, TensorSlice]]:
            yield from self.weights()
            yield from self.optimizer.states()
            yield from items()

        writer.save(everything(), {**meta, GROUPS: self.optimizer.settings()})
        self._numbers[folder] = writer.number

    def _number(self, folder: Path) -> int:
        """Return the number of the last save there: counted, for another process may be ahead with the next."""
        if folder not in self._numbers:
            number = ShardReader.number_in(folder)
            self.wait()
            self._numbers[folder] = number
        return self._numbers[folder]

    def load(self, parts: ShardReader) -> None:
        """Put back what was saved, by any engine with any number of processes.

        Raises:
            CheckpointError: it is of another model or optimizer. Weights have not been changed then.
        """
        others = {name for name, _ in self._others()}
        for name, param in self.optimizer.models.items():
            if parts.shape(WEIGHTS + name) != tuple(getattr(param, "ds_shape", param.shape)):
                raise CheckpointError(f"{parts.path}: the checkpoint is of another model: {name} differs")
        known = {WEIGHTS + name for name in (*self.optimizer.models, *others)}
        strange = sorted(key for key in parts.keys() if key.startswith(WEIGHTS) and key not in known)  # noqa: SIM118
        if strange:
            raise CheckpointError(f"{parts.path}: the checkpoint is of another model: {strange[0]} is not here")
        try:
            self.optimizer.load(parts, parts.meta[GROUPS])
        except CheckpointMismatch as error:
            raise CheckpointError(f"{parts.path}: the checkpoint is of another optimizer: {error}") from error
        for name, tensor in self._others():
            with _gathered(tensor, write=True) as whole, torch.no_grad():
                whole.copy_(parts.whole(WEIGHTS + name))
        self.spread()
        self.wait()

    def weights(self) -> Iterator[tuple[str, TensorSlice]]:
        """Yield what this process keeps of weights, in float32 where the model's are less, and buffers."""
        yield from self.optimizer.weights()
        for name, tensor in self._others():
            with _gathered(tensor) as whole:
                if self.rank == 0:
                    yield WEIGHTS + name, TensorSlice(whole.detach())

    def whole_weights(self, folder: Path) -> dict[str, Tensor] | None:
        """Return all weights and buffers by the names of `state_dict`, in the first process. All must call it.

        Args:
            folder: where parts of them may lie for a while.
        """
        if self.shards == 1:
            if self.rank:
                return None
            found = {name.removeprefix(WEIGHTS): item.values for name, item in self.weights()}
            return self._with_ties(found)
        place = folder / ".weights"
        if self.rank == 0:
            place.mkdir(exist_ok=True)
        self.wait()
        ShardWriter(place, self.rank, self.shards, self.wait).save(self.weights(), {})
        if self.rank:
            return None
        with ShardReader(place) as parts:
            found = {name.removeprefix(WEIGHTS): parts.whole(name) for name in parts.keys()}  # noqa: SIM118
        shutil.rmtree(place)
        return self._with_ties(found)

    def _with_ties(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a weight under each of its names."""
        names: dict[int, str] = {id(param): name for name, param in self.lm.named_parameters()}
        ties = {
            name: names[id(param)]
            for name, param in self.lm.named_parameters(remove_duplicate=False)
            if names[id(param)] != name
        }
        return {**found, **{name: found[first] for name, first in ties.items()}}

    def _others(self) -> Iterator[tuple[str, Tensor]]:
        """Yield buffers, and parameters that are not optimized."""
        kept = self.lm.state_dict().keys()
        for name, tensor in [*self.lm.named_parameters(), *self.lm.named_buffers()]:
            if name in kept and name not in self.optimizer.models:
                yield name, tensor


@contextlib.contextmanager
def _gathered(tensor: Tensor, write: bool = False) -> Iterator[Tensor]:
    """Put a tensor together for a while, where DeepSpeed or FSDP2 has cut it up."""
    if hasattr(tensor, "ds_shape"):
        from deepspeed.runtime.zero import GatheredParameters  # `deepspeed.zero` is a name, and no module

        with GatheredParameters([tensor], modifier_rank=0 if write else None):
            yield tensor
    elif hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        whole = tensor.full_tensor()
        yield whole
        if write:
            part = distribute_tensor(whole, tensor.device_mesh, tensor.placements)  # type: ignore[attr-defined]
            tensor.to_local().copy_(part.to_local())  # type: ignore[attr-defined]
    else:
        yield tensor
