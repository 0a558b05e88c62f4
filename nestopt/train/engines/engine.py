"""Train in one process: what every engine does, and what the others override."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nestopt.config import Config, ConfigError
from nestopt.optim import Nested
from nestopt.optim.sharded.optimizer import Placement, Sharded
from nestopt.train.checkpoints.manager import CheckpointManager
from nestopt.train.engines.finite import NORM, Finite, first_not_finite
from nestopt.train.engines.peers import processes
from nestopt.train.errors import TrainingError
from nestopt.train.run import check_precision

log = logging.getLogger("nestopt")

LOW = (torch.bfloat16, torch.float16)

SKIPS = 10
"""Steps that may be skipped one after another."""


class Engine:
    """One process. Others override what differs.

    Attributes:
        rank, world: this process's number and how many there are.
        device: where the model is.
        cut: whether weights are in pieces, so that all processes must call the model together.
        optimizer: whose groups a schedule changes.
        checkpoints: saves and loads the model and its optimizer.
        finite: notes what of a step is not finite.
        skipped: steps that were left out for that, in all; those of them that followed one another last.
    """

    name: ClassVar[str] = "single"
    rank: int = 0
    world: int = 1
    cut: bool = False
    comm: Any = None
    optimizer: Sharded
    checkpoints: CheckpointManager

    def __init__(self, config: Config) -> None:
        self.config = config
        self.device = device_of(config.train.device)
        if threads := config.threads:
            torch.set_num_threads(threads)
        self.finite, self.skipped = Finite(), [0, 0]
        self._check_dtype()
        check_precision(config, self.device)

    def _check_dtype(self) -> None:
        if self.config.train.dtype == "float16":
            raise ConfigError.refuse(
                "train.dtype",
                "float16",
                "its losses must be scaled, which train.engine=deepspeed does; or give bfloat16",
            )

    def cut_up(self, lm: nn.Module) -> None:
        """Cut up a model's weights, where that comes before there is an optimizer."""

    def attach(self, objective: nn.Module, lm: nn.Module, nested: Nested) -> None:
        """Take what is to be trained (on the device already), the model in it, and an optimizer of that."""
        self.lm = lm
        nested.tell_loss_scale(1 / self.config.train.accumulate)
        self.optimizer = Sharded(nested)
        self.model = self._wrapped(objective)
        self.optimizer.attach(self._placements(), self.comm)
        self.optimizer.spread = self._spread
        self.checkpoints = CheckpointManager(
            self.lm,
            self.optimizer,
            rank=self.rank,
            world=self.world,
            cut=self.cut,
            wait=self.wait,
            spread=self._spread,
        )
        self.finite.watch(self._leaves())

    def _leaves(self) -> Iterable[tuple[str, Tensor]]:
        """Return the tensors that get this process's own gradients, by name."""
        return [(name, param) for name, param in self.lm.named_parameters() if param.requires_grad]

    def _wrapped(self, objective: nn.Module) -> nn.Module:
        return objective

    def _placements(self) -> list[Placement]:
        """Return where parameters are: as the model has them, or in float32 copies, where it has less."""
        self._masters: list[tuple[Tensor, Tensor]] = []
        for group in self.optimizer.param_groups:
            for i, param in enumerate(group["params"]):
                if param.dtype in LOW:
                    group["params"][i] = master = nn.Parameter(param.detach().float())
                    self._masters.append((param, master))
        return [Placement(i, group["params"], group["params"]) for i, group in enumerate(self.optimizer.param_groups)]

    def update(self, batches: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
        """Take the gradients of the mean loss over batches, clip them, and step the optimizer.

        Args:
            batches: what the objective is called with, each.

        Returns:
            This process's loss, and the norm of the whole gradient before clipping.
        """
        self.optimizer.zero_grad()
        losses = []
        for i, batch in enumerate(batches):
            with self._together(i == len(batches) - 1):
                loss = self.model(*batch) / len(batches)
                losses.append(loss.detach())
                self.finite.note("the loss", losses[-1])
                loss.backward()
            for param, master in self._masters:
                if param.grad is not None:
                    grad = param.grad.float()
                    master.grad = grad if master.grad is None else master.grad.add_(grad)
                    param.grad = None
        for group in self.optimizer.param_groups:
            for param in group["params"]:
                if param.grad is None:  # not reached by this batch: zero, as DeepSpeed has it
                    param.grad = torch.zeros_like(param)
        norm = self._clip()
        self.finite.note(NORM, norm)
        if self._goes_on():
            self.optimizer.step()
            self._spread()
        else:
            self.optimizer.forget_inputs()
        return torch.stack(losses).sum(), norm

    def _goes_on(self) -> bool:
        """Return whether the step is taken; `check_finite` is later where it would have to wait for an accelerator."""
        if self.device.type == "cpu" or self.config.train.on_nonfinite == "skip":
            return self.check_finite()
        self.finite.end_step()
        return True

    def check_finite(self) -> bool:
        """Return whether losses and gradients were finite in all processes since the last call; all must call it.

        Raises:
            TrainingError: they were not, and are not to be skipped, or too often; says where.
        """
        if not self.finite.noted:
            return True
        found = self.finite.take()
        if not self.any(found is not None):
            self.skipped[1] = 0
            return True
        found_by = self.gathered(found)
        step, what = min((step, what == NORM, what) for step, what in filter(None, found_by))[::2]
        having = [rank for rank, other in enumerate(found_by) if other is not None and tuple(other) == (step, what)]
        where = f"step {step}: {what} is not finite in {processes(having)}"
        if self.config.train.on_nonfinite == "stop":
            raise TrainingError(
                f"{where}; it was not taken, and a checkpoint is from before it (train.on_nonfinite=skip leaves it out)"
            )
        self.skipped = [count + 1 for count in self.skipped]
        if self.skipped[1] > SKIPS:
            raise TrainingError(f"{where}, and so were the {SKIPS} steps before it: none was taken")
        if self.rank == 0:
            log.warning("%s; it is skipped", where)
        return False

    def check_weights(self) -> None:
        """Raise TrainingError where weights or states are not finite in any process; all must call it."""
        self.check_finite()
        items = itertools.chain(self.checkpoints.weights(), self.optimizer.states())
        found = first_not_finite((name, item.values) for name, item in items)
        if self.any(found is not None):
            name, having = next(
                (name, [rank for rank, other in enumerate(found_by) if other == name])
                for found_by in [self.gathered(found)]
                for name in found_by
                if name is not None
            )
            raise TrainingError(
                f"step {self.finite.step}: {name} is not finite in {processes(having)}; it is not saved, and a "
                "checkpoint is from before it"
            )

    @contextlib.contextmanager
    def _together(self, last: bool) -> Iterator[None]:
        """Run one of several batches of a step within this: gradients are averaged over processes with the last."""
        yield

    def _clip(self) -> Tensor:
        clip = self.config.train.clip
        params = [param for group in self.optimizer.param_groups for param in group["params"]]
        return nn.utils.clip_grad_norm_(params, float("inf") if clip is None else clip)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the model have the weights to evaluate with within this, where a level of weights has others.

        They stay where it fails: to put the others back all processes are needed, and one that has failed ends.
        """
        self.optimizer.eval()
        yield
        self.optimizer.train()

    @torch.no_grad()
    def _spread(self) -> None:
        """Let the model have what the optimizer has written."""
        if self._masters:
            params, masters = zip(*self._masters, strict=True)
            torch._foreach_copy_(params, masters)

    # -- processes -------------------------------------------------------------------------------------------------

    def total(self, value: Tensor) -> Tensor:
        """Return the sum of `value` over processes."""
        return value

    def mean(self, value: Tensor) -> Tensor:
        return self.total(value.detach().clone()) / self.world

    def any(self, flag: bool) -> bool:
        """Return whether `flag` is set in any process: all of them get the same answer."""
        return flag

    def agreed(self, seconds: float) -> float:
        """Return the mean of a time over processes, the same in all."""
        return seconds

    def gathered(self, value: Any) -> list[Any]:
        """Return what each process has given, in all of them; plain values."""
        return [value]

    def wait(self) -> None:
        """Wait until all processes are here."""

    def close(self) -> None:
        """Leave the group of processes, with all others."""

    def abandon(self) -> None:
        """Leave it where something has failed: without a wait for others."""


def device_of(name: str) -> torch.device:
    """Return the device that `train.device` names. Raises ConfigError if this machine has none such."""
    if name == "auto":
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return found or torch.device("cpu")
    if name.partition(":")[0] == "meta":
        raise ConfigError.refuse("train.device", name, "tensors there hold no numbers; give auto, cpu or cuda")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        raise ConfigError.refuse("train.device", name, f"this machine has no such device ({why})") from None
    return device
