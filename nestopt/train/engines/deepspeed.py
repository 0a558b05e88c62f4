"""Train under DeepSpeed: any level at ZeRO stages 0 to 3."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nestopt.config import Config, ConfigError
from nestopt.core.inputs import INPUTS, request_of
from nestopt.optim import Nested
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.train.checkpoints.manager import CheckpointManager
from nestopt.train.engines import deepspeed_settings, launch, zero_layout
from nestopt.train.engines.ddp import Ddp
from nestopt.train.engines.finite import NORM
from nestopt.train.engines.fsdp_methods import run_hooks_around, users, weights_used


def import_deepspeed(device: str = "auto") -> Any:
    """Import DeepSpeed, without what it does unasked at its start.

    Raises:
        ConfigError: it is not installed.
    """
    if device == "cpu" or not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError.refuse(
            "train.engine", "deepspeed", f"install it: pip install 'nestopt[deepspeed]' ({error})"
        ) from None
    if os.environ.get("DS_ACCELERATOR") == "cpu":
        # only inference wants this extension, which would be compiled for a minute at the first start
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    launch.hush()
    launch.prepare()
    if not torch.distributed.is_initialized():
        if launch.processes() == 1:
            launch.alone()
        deepspeed.init_distributed(
            dist_backend="gloo" if os.environ.get("DS_ACCELERATOR") == "cpu" else "nccl", verbose=False
        )
    return deepspeed


def initialized(
    model: nn.Module, called: nn.Module, nested: Nested, settings: dict[str, Any], **options: Any
) -> tuple[Any, Sharded, Any, Any]:
    """Initialize DeepSpeed with levels for the optimizer.

    Args:
        model: whose parameters and names count.
        called: the module that DeepSpeed wraps; it calls `model`.
        nested: the optimizer of `model`.
        settings: DeepSpeed's, checked.
        options: of `deepspeed.initialize`.

    Returns:
        What `deepspeed.initialize` does: engine, optimizer, loader and scheduler. The engine has a `nestopt`, the
        `CheckpointManager`.

    Raises:
        ConfigError: a level can't be itself under the settings.
    """
    deepspeed = import_deepspeed()
    optimizer = Sharded(nested)
    _check_levels(optimizer, settings)
    if deepspeed_settings.stage_of(settings) == 3:
        _expect_cut_weights(deepspeed, model)
    engine, _, loader, scheduler = deepspeed.initialize(
        model=called, optimizer=optimizer, config=settings, dist_init_required=False, **options
    )
    nested.tell_loss_scale(1 / engine.gradient_accumulation_steps())
    placements, comm = zero_layout.placements(engine, optimizer)
    optimizer.attach(placements, comm)
    optimizer.spread = partial(zero_layout.spread, engine)
    if any(INPUTS in optimizer.level(group).needs for group in optimizer.param_groups):
        called.register_forward_pre_hook(lambda module, args: _begin_step(engine, optimizer))
    engine.nestopt = CheckpointManager(
        model,
        optimizer,
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
        cut=deepspeed_settings.stage_of(settings) == 3,
        wait=torch.distributed.barrier,
        spread=optimizer.spread,
    )
    return engine, optimizer, loader, scheduler


def _expect_cut_weights(deepspeed: Any, model: nn.Module) -> None:
    """Have weights put together around all that uses them: DeepSpeed sees to modules that are called, one by one."""
    for module, methods in users(model):
        for param in weights_used(module):
            deepspeed.zero.register_external_parameter(module, param)
        for method in methods:
            run_hooks_around(module, method)


def _begin_step(engine: Any, optimizer: Sharded) -> None:
    """Forget what layers were shown for a step that was not taken (DeepSpeed clears gradients by itself)."""
    first = engine.micro_steps % engine.gradient_accumulation_steps() == 0
    if first and torch.is_grad_enabled():
        optimizer.forget_inputs()


def _check_levels(optimizer: Sharded, settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a level that could not be itself under these settings."""
    section = settings.get("zero_optimization") or {}
    offloaded = (section.get("offload_optimizer") or {}).get("device", "none") not in ("none", None)
    half = bool((settings.get("fp16") or {}).get("enabled"))
    stage = deepspeed_settings.stage_of(settings)
    if half and stage == 0:
        raise ConfigError.refuse(
            "fp16",
            settings["fp16"],
            "at stage 0 DeepSpeed 0.19 divides gradients by a scale that losses were not multiplied with; give "
            "zero_optimization.stage 1 or more, or bf16",
        )
    experts = [name for name, param in optimizer.models.items() if not getattr(param, "allreduce", True)]
    if experts:
        raise ValueError(
            f"{experts[0]} is an expert's of DeepSpeed's MoE, which only some processes have; it can't be stepped"
        )
    for group in optimizer.param_groups:
        level = optimizer.level(group)
        if offloaded and not level.is_elementwise:
            raise ConfigError.refuse(
                "zero_optimization.offload_optimizer",
                section["offload_optimizer"],
                f"the level {level.label} is shown whole tensors, which are put together on the accelerator; leave it "
                "out, or give an elementwise stack such as adamw",
            )
        if half and INPUTS in level.needs:
            raise ConfigError.refuse(
                "fp16", settings["fp16"], f"the level {level.label} sums up inputs of steps that are skipped; give bf16"
            )
        wants = request_of(level)
        if stage == 3 and wants is not None and wants.grad is not None:
            raise ConfigError.refuse(
                "zero_optimization.stage",
                3,
                f"the level {level.label} reads weights in the backward pass, when they are cut up; give stage 2",
            )


class DeepSpeed(Ddp):
    """DeepSpeed's engine. Optimizer state is spread over processes from stage 1 on, gradients from 2, weights at 3."""

    name: ClassVar[str] = "deepspeed"

    def __init__(self, config: Config) -> None:
        if config.train.dtype == "float64":
            raise ConfigError.refuse("train.dtype", "float64", "DeepSpeed has float32, bfloat16 and float16")
        super().__init__(config)
        try:
            self.settings_given = deepspeed_settings.merged(config, self.world)
        except ConfigError:
            self.abandon()
            raise

    def _check_dtype(self) -> None:
        """Allow any: DeepSpeed scales losses."""

    def _initialise(self) -> None:
        super()._initialise()
        import_deepspeed(self.device.type)

    def attach(self, objective: nn.Module, lm: nn.Module, nested: Nested) -> None:
        self.lm = lm
        engine, self.optimizer, *_ = initialized(lm, objective, nested, self.settings_given)
        self.model, self.checkpoints, self.cut = engine, engine.nestopt, engine.nestopt.cut
        if not self._scales:
            self.finite.watch(self._leaves())

    @property
    def _scales(self) -> bool:
        """Whether losses are scaled by DeepSpeed, which leaves out steps whose gradients overflow, and scales less."""
        return self.config.train.dtype == "float16"

    def update(self, batches: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
        engine: Any = self.model
        losses, norm = [], None
        for i, batch in enumerate(batches):
            loss = engine(*batch)
            losses.append(loss.detach())
            self.finite.note("the loss", losses[-1])
            engine.backward(loss)
            if engine.optimizer is self.optimizer:  # stage 0 in float32: DeepSpeed does not say
                norm = self._norm()
            self.optimizer.skipping = i == len(batches) - 1 and not self._goes_on()
            engine.step()
        skipped, self.optimizer.skipping = self.optimizer.skipping, False
        if skipped:
            self.optimizer.forget_inputs()
        if engine.optimizer is not self.optimizer:
            norm = engine.get_global_grad_norm()
        found = torch.as_tensor(float("nan") if norm is None else norm, device=self.device)
        if norm is not None and not skipped and not self._scales:
            self.finite.note(NORM, found)  # of slices added up: each process's own were finite
            self._goes_on()  # DeepSpeed has left such a step out
        return torch.stack(losses).mean(), found

    def _norm(self) -> Tensor:
        grads = [param.grad for group in self.optimizer.param_groups for param in group["params"]]
        return nn.utils.get_total_norm([grad for grad in grads if grad is not None])
