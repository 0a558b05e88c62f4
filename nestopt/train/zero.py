"""DeepSpeed: ZeRO stages 0, 1 and 2, for stacks that don't need to see whole tensors."""

from __future__ import annotations

import os
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nestopt.config import Config, ConfigError
from nestopt.core.gates import bind
from nestopt.core.level import Level
from nestopt.optim import Nested
from nestopt.optim.checkpoint import checked_state
from nestopt.train.checkpoint import CheckpointError
from nestopt.train.engines import Ddp, Packed
from nestopt.train.snapshot import MODEL


class DeepSpeed(Ddp):
    """Optimizer state (stage 1) and gradients (stage 2) are spread over the processes.

    From stage 1 on DeepSpeed shows the optimizer flat slices of many parameters glued together. An elementwise level
    does not mind; one that needs a tensor's shape is refused.
    """

    name: ClassVar[str] = "deepspeed"

    def __init__(self, config: Config) -> None:
        self.stage = config.train.zero_stage
        if config.train.dtype != "float32":
            raise ConfigError.refuse("train.dtype", config.train.dtype, "with train.engine=deepspeed give float32")
        super().__init__(config)

    def _initialise(self) -> None:
        if self.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError.refuse(
                "train.engine", self.name, f"install it: pip install 'nestopt[deepspeed]' ({error})"
            ) from None
        if self.device.type == "cpu":
            # only inference wants this extension, which would be compiled for a minute at the first start
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="nccl" if self.device.type == "cuda" else "gloo", verbose=False)

    def attach(self, model: nn.Module, optimizer: Nested) -> None:
        import deepspeed

        check_stage(optimizer, self.stage)
        settings = {
            "train_batch_size": self.config.data.batch,
            "train_micro_batch_size_per_gpu": self.config.data.batch // self.world,
            "gradient_clipping": self.config.train.clip or 0.0,  # DeepSpeed's own default is to clip at 1
            "zero_optimization": {"stage": self.stage},
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 2**31,
        }
        self.module, self.optimizer = model, optimizer
        self.model, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )

    def update(self, loss: Tensor) -> Tensor:
        self.model.backward(loss)  # type: ignore[operator]
        self.model.step()  # type: ignore[operator]
        norm = self.model.get_global_grad_norm()  # type: ignore[operator]
        return torch.as_tensor(float("nan") if norm is None else norm)

    # -- checkpoints: from stage 1 on each process saves its own slices ------------------------------------------------

    @property
    def files(self) -> int:
        return self.world if self.stage else 1

    def pack(self) -> Packed:
        if not self.stage:
            return super().pack()
        tensors = {MODEL + name: value for name, value in self.module.state_dict().items()} if self.rank == 0 else {}
        for i, group in enumerate(self.optimizer.param_groups):
            for j, flat in enumerate(group["params"]):
                tensors[f"flat.{i}.{j}"] = flat.detach()
                tensors |= {f"flat.{i}.{j}|{key}": value for key, value in self.optimizer.state[flat].items()}
        return tensors, {"zero_stage": self.stage, "world": self.world}

    def unpack(self, packed: Packed) -> None:
        tensors, values = packed
        saved = (values.get("zero_stage", 0), values.get("world", self.world))
        if saved != (self.stage, self.world if self.stage else saved[1]):
            raise CheckpointError(
                f"saved at ZeRO stage {saved[0]} by {saved[1]} processes; resume it so, "
                f"not at stage {self.stage} by {self.world}"
            )
        if not self.stage:
            super().unpack(packed)
            return
        for i, group in enumerate(self.optimizer.param_groups):
            for j, flat in enumerate(group["params"]):
                self._load_slice(f"flat.{i}.{j}", tensors, flat, bind(self.optimizer.level(group)))
        self._load_weights(tensors)

    def _load_slice(self, name: str, tensors: dict[str, Tensor], flat: Tensor, level: Level) -> None:
        if name not in tensors or tensors[name].shape != flat.shape:
            raise CheckpointError(f"the checkpoint is of another model: {name} differs")
        saved = {key.partition("|")[2]: value for key, value in tensors.items() if key.startswith(f"{name}|")}
        try:
            self.optimizer.state[flat] = checked_state(self.optimizer, saved, flat, level, name)
        except ValueError as error:
            raise CheckpointError(f"the checkpoint is of another optimizer: {error}") from error
        with torch.no_grad():
            flat.copy_(tensors[name])

    def _load_weights(self, tensors: dict[str, Tensor]) -> None:
        """The weights are in the first process's file; the others get them from it."""
        weights = self.module.state_dict()
        for name, value in weights.items():
            if self.rank == 0:
                value.copy_(tensors[MODEL + name])
            dist.broadcast(value, src=0)


def check_stage(optimizer: Nested, stage: int) -> None:
    """Raise ConfigError if a level of `optimizer` could not be itself at this ZeRO stage."""
    for group in optimizer.param_groups:
        level = optimizer.level(group)
        if stage and level.needs:
            what = "matrices" if "matrix" in level.needs else "tensors in their true shape"
            raise ConfigError.refuse(
                "train.zero_stage",
                stage,
                f"the level {level.label} takes {what}, and ZeRO from stage 1 on shows it flat slices; "
                "give train.zero_stage=0, train.engine=ddp, or an elementwise stack such as adamw",
            )
