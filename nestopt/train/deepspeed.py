"""DeepSpeed: any level at ZeRO stages 0 to 3."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from nestopt.config import Config, ConfigError
from nestopt.core.inputs import INPUTS, request_of
from nestopt.optim import Nested
from nestopt.optim import optimizer as make_optimizer
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.train import deepspeed_settings, launch, zero
from nestopt.train.calls import run_hooks_around, users, weights_used
from nestopt.train.engines import Ddp
from nestopt.train.kept import Kept
from nestopt.train.parts import Parts


def initialize(
    model: nn.Module,
    spec: Any = "adamw",
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    **options: Any,
) -> tuple[Any, Sharded, Any, Any]:
    """`deepspeed.initialize` with levels for the optimizer: what it returns, engine, optimizer, loader and scheduler.

    Levels do at every stage what they do in one process: those that need whole matrices (muon, shampoo, dgd …) are
    shown them by the process that owns each, elementwise ones (adam, momentum …) step the slices where they lie. The
    engine is used as DeepSpeed says: `loss = engine(batch)`, `engine.backward(loss)`, `engine.step()`.

    Args:
        model: any module, also one made under `deepspeed.zero.Init`.
        spec: as for `nestopt.optimizer`.
        config: DeepSpeed's settings, or the path of its JSON. Clipping is off unless they say `gradient_clipping`.
        options: `lr`, `weight_decay`, `rest`, `groups` and others of `nestopt.optimizer`; `training_data`,
            `lr_scheduler`, `collate_fn` of `deepspeed.initialize`.

    Raises:
        ConfigError: a setting that levels can't be stepped under (an `optimizer` of DeepSpeed's own, NVMe …); a level
            that can't be itself under the others.
    """
    import_deepspeed()
    theirs = {key: options.pop(key) for key in ("training_data", "lr_scheduler", "collate_fn") if key in options}
    given = deepspeed_settings.read(config) if isinstance(config, str | os.PathLike) else dict(config or {})
    with _whole_shapes(model) as real:
        nested = make_optimizer(model, spec, **options)
    _stand_on(nested, real, model)
    return _initialized(model, model, nested, deepspeed_settings.checked(given, "config"), **theirs)


def save(engine: Any, folder: str | os.PathLike[str], meta: dict[str, Any] | None = None) -> None:
    """Save what was made by `initialize` so that any stage and any number of processes can load it. All must call it.

    Args:
        engine: DeepSpeed's.
        folder: made if it is not there; it holds one checkpoint, and at any moment a whole one.
        meta: numbers, strings, lists and dicts of your own.
    """
    engine.nestopt.save(Path(folder), {"own": meta or {}})


def load(engine: Any, folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Put back what `save` wrote, at whatever stage and by however many processes. Gives its `meta`.

    Raises:
        CheckpointError: there is none, it can't be read, or it is of another model or optimizer.
    """
    with Parts(folder) as parts:
        engine.nestopt.load(parts)
        return dict(parts.meta["own"])


def import_deepspeed(device: str = "auto") -> Any:
    """DeepSpeed, without what it does unasked at its start.

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


def _initialized(
    model: nn.Module, called: nn.Module, nested: Nested, settings: dict[str, Any], **options: Any
) -> tuple[Any, Sharded, Any, Any]:
    deepspeed = import_deepspeed()
    optimizer = Sharded(nested)
    _check_levels(optimizer, settings)
    if deepspeed_settings.stage_of(settings) == 3:
        _expect_cut_weights(deepspeed, model)
    engine, _, loader, scheduler = deepspeed.initialize(
        model=called, optimizer=optimizer, config=settings, dist_init_required=False, **options
    )
    nested.tell_loss_scale(1 / engine.gradient_accumulation_steps())
    lying, comm = zero.lying(engine, optimizer)
    optimizer.attach(lying, comm)
    if nested.watcher is not None:
        called.register_forward_pre_hook(lambda module, args: _begin_step(engine, optimizer))
    engine.nestopt = Kept(
        model,
        optimizer,
        rank=torch.distributed.get_rank(),
        world=torch.distributed.get_world_size(),
        cut=deepspeed_settings.stage_of(settings) == 3,
        wait=torch.distributed.barrier,
        spread=lambda: zero.spread(engine),
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


@contextlib.contextmanager
def _whole_shapes(model: nn.Module) -> Iterator[dict[int, nn.Parameter]]:
    """For a model that `zero.Init` has cut up: tensors without data, of the true shapes, in its parameters' place."""
    real: dict[int, nn.Parameter] = {}
    stand_ins: dict[int, nn.Parameter] = {}
    places = []
    for module in model.modules():
        for name, param in module._parameters.items():
            if param is not None and hasattr(param, "ds_shape"):
                places.append((module, name, param))
                if id(param) not in stand_ins:
                    blank = torch.empty(tuple(param.ds_shape), dtype=param.dtype, device="meta")
                    stand_ins[id(param)] = nn.Parameter(blank, requires_grad=param.requires_grad)
                    real[id(stand_ins[id(param)])] = param
    for module, name, param in places:
        module._parameters[name] = stand_ins[id(param)]
    try:
        yield real
    finally:
        for module, name, param in places:
            module._parameters[name] = param


def _stand_on(nested: Nested, real: Mapping[int, nn.Parameter], model: nn.Module) -> None:
    """Let an optimizer that was made for stand-ins refer to the model's own parameters."""
    if not real:
        return
    for group in nested.param_groups:
        group["params"] = [real.get(id(param), param) for param in group["params"]]
    if any(INPUTS in nested.level(group).needs for group in nested.param_groups):
        nested.watch(model)


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
            self.close()
            raise

    def _check_dtype(self) -> None:
        """Any: DeepSpeed scales losses."""

    def _initialise(self) -> None:
        import_deepspeed(self.device.type)

    def attach(self, objective: nn.Module, lm: nn.Module, nested: Nested) -> None:
        self.lm = lm
        engine, self.optimizer, *_ = _initialized(lm, objective, nested, self.settings_given)
        self.model, self.kept, self.cut = engine, engine.nestopt, engine.nestopt.cut

    def update(self, batches: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor]:
        engine: Any = self.model
        losses, norm = [], None
        for batch in batches:
            loss = engine(*batch)
            losses.append(loss.detach())
            engine.backward(loss)
            if engine.optimizer is self.optimizer:  # stage 0 in float32: DeepSpeed does not say
                norm = self._norm()
            engine.step()
        if engine.optimizer is not self.optimizer:
            norm = engine.get_global_grad_norm()
        return torch.stack(losses).mean(), torch.as_tensor(float("nan") if norm is None else norm)

    def _norm(self) -> Tensor:
        grads = [param.grad for group in self.optimizer.param_groups for param in group["params"]]
        return nn.utils.get_total_norm([grad for grad in grads if grad is not None])
