"""Matrix memories by the kernels of flash-linear-attention (fla), on CUDA, in bfloat16: forms on tokens for nestopt."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import nestopt
from nestopt.core import Accepted, AssociativeMemory, Refused, State, TokenForm
from nestopt.core.precision import current
from nestopt.core.retentions import Decay
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import FormSetting

WIDEST = 256
"""Numbers of a key that the kernels take."""

LEAST = torch.finfo(torch.float32).tiny
"""The least decay: the kernels are shown logarithms."""

Kernel = Callable[..., tuple[Tensor, Tensor]]


def kernel(path: str) -> Kernel:
    """Import one of fla's operations, `"simple_gla.chunk_simple_gla"`, when it is first run: that takes seconds."""
    module, name = path.split(".")
    found: Kernel = getattr(importlib.import_module(f"fla.ops.{module}"), name)
    return found


class FlaForm(TokenForm):
    """What the forms share: they take what one of nestopt's own forms takes, and less, with the same state.

    A layer or `nestopt.ops.run` with `precision="bfloat16"` runs by the kernel, with any other precision by nestopt's
    own form: a kernel that rounds to bfloat16 is not what `"float32"` means. So are single tokens.
    """

    levels: ClassVar[tuple[type[nestopt.Level], ...]] = (AssociativeMemory,)
    priority: ClassVar[int] = 1
    of: ClassVar[str]
    """nestopt's own form."""

    level: AssociativeMemory

    def __init__(self, level: nestopt.Level, setting: FormSetting) -> None:
        super().__init__(level, setting)
        self.own: TokenForm = nestopt.registry.get("token_form", self.of)(level, setting)

    @classmethod
    def accepts(cls, level: nestopt.Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        assert isinstance(level, AssociativeMemory)
        own = nestopt.registry.get("token_form", cls.of).accepts(level, device, dtype)
        if isinstance(own, Refused):
            return own
        if why := cls.lacks(level) or _elsewhere(device, dtype):
            return Refused(why)
        return Accepted(f"fla's {cls.kernel_of(level).split('.')[1]} where precision='bfloat16', else {own.words}")

    @classmethod
    def lacks(cls, level: AssociativeMemory) -> str:
        """Say what the kernel does not compute of what nestopt's own form does; empty where nothing."""
        if level.read != "after":
            return f"read={level.read!r}: fla's kernels read after the write"
        return ""

    @classmethod
    def kernel_of(cls, level: AssociativeMemory) -> str:
        """Name the operation of fla's that computes `level`."""
        raise NotImplementedError

    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        if current() != "bfloat16":
            return self.own.forward(tokens, gates, state)
        features, level = self.level.features, self.level
        x = tokens.replace(q=features(tokens.q), k=features(tokens.k))
        if x.k.shape[-1] > WIDEST:
            raise ValueError(
                f"{level.label}: keys of {x.k.shape[-1]} numbers (with their features) are not allowed with fla's "
                f"kernels; give {WIDEST} or fewer, or form={self.of!r}"
            )
        rate = self.number(level.lr, "lr", gates, x.k) * self.number(level.step_size, "step_size", gates, x.k)
        given = self.arguments(x, x.gate(rate, 0.0))
        if isinstance(level.retention, Decay):
            decay = self.number(level.retention.keep, "retention.keep", gates, x.k)
            given["g"] = x.gate(decay.clamp_min(LEAST).log(), 0.0).transpose(1, 2).contiguous()
        given["initial_state"] = state["level"]["memory"]["m"].mT.contiguous()  # theirs is [B, H, K, V]
        if torch.is_grad_enabled():
            given = {name: _Once.apply(value, self.of) for name, value in given.items()}
        y, end = kernel(self.kernel_of(level))(**given, scale=1.0, output_final_state=True)
        new = {**state["level"], "memory": {"m": end.mT}}
        return y.transpose(1, 2).to(x.v.dtype), {"step": state["step"] + tokens.length, "level": new}

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        return self.own.step(tokens, gates, state)

    def arguments(self, x: TokenBatch, rate: Tensor) -> dict[str, Tensor]:
        """Return queries, keys and values `[B, T, H, D]` in bfloat16, and how strongly they are written."""
        raise NotImplementedError


class FlaLinearAttention(FlaForm):
    """Sums of values times keys, with a decay per token and head or none: `linear_attention`, `retnet`, …"""

    of: ClassVar[str] = "linear_attention"

    @classmethod
    def kernel_of(cls, level: AssociativeMemory) -> str:
        return "simple_gla.chunk_simple_gla"

    def arguments(self, x: TokenBatch, rate: Tensor) -> dict[str, Tensor]:
        return _theirs(x, x.v * rate[..., None])


class FlaDeltaRule(FlaForm):
    """Correct what the memory answers, once it has faded or without fading: `deltanet`, `gated_deltanet`."""

    of: ClassVar[str] = "delta_rule"

    @classmethod
    def lacks(cls, level: AssociativeMemory) -> str:
        if level.normalized:
            return f"normalized={level.normalized}: fla's kernels take the step as it is"
        if type(level.rule) is not nestopt.levels.gd:
            return f"rule={level.rule.label}: fla's kernels have no momentum"
        if isinstance(level.retention, Decay) and level.fade == "with":
            return "fade='with': fla's kernel fades before the write"
        return super().lacks(level)

    @classmethod
    def kernel_of(cls, level: AssociativeMemory) -> str:
        fades = isinstance(level.retention, Decay)
        return "gated_delta_rule.chunk_gated_delta_rule" if fades else "delta_rule.chunk_delta_rule"

    def arguments(self, x: TokenBatch, rate: Tensor) -> dict[str, Tensor]:
        return {**_theirs(x, x.v), "beta": rate.transpose(1, 2).contiguous()}


def _theirs(x: TokenBatch, values: Tensor) -> dict[str, Tensor]:
    """`[B, H, T, D]` as fla has it: `[B, T, H, D]` in bfloat16."""
    given = {"q": x.q, "k": x.k, "v": values}
    return {name: part.to(torch.bfloat16).transpose(1, 2).contiguous() for name, part in given.items()}


def _elsewhere(device: torch.device, dtype: torch.dtype) -> str:
    """Say why fla's kernels can't run there; empty where they can."""
    if device.type != "cuda":
        return f"fla's kernels run on CUDA, not on {device.type!r}"
    if dtype != torch.float32:
        return f"the memories are {str(dtype).removeprefix('torch.')}, and fla's kernels have them in float32"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed; pip install 'nestopt-fla[cuda]'"
    return ""


class _Once(torch.autograd.Function):
    """The identity, whose gradient has none: fla's backward passes would give zeros for it, without a word."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, instead: str) -> Tensor:
        ctx.instead = instead
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if torch.is_grad_enabled():
            raise RuntimeError(f"fla's kernels have no second derivatives; give form={ctx.instead!r}")
        return grad, None


@nestopt.hookimpl
def nestopt_register_token_forms(register: nestopt.core.hookspecs.Register) -> None:
    register("fla_linear_attention", FlaLinearAttention)
    register("fla_delta_rule", FlaDeltaRule)
