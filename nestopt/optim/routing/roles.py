"""What a parameter is in its model: a hidden matrix, or something that matrix levels should leave alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from nestopt.core.periodic import Periodic
from nestopt.optim.layer_inputs.rows import is_transposed, multiplies

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_CONVOLUTIONS = nn.modules.conv._ConvNd
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.RMSNorm)


@dataclasses.dataclass(frozen=True)
class Role:
    """Attributes:
    hidden: whether this is a hidden matrix.
    why: what decided it, in words.
    period: of the module that holds it: the slow memories of a CMS have one above 1.
    layer: whether it is the weight of a linear or convolution layer whose inputs can be watched, and of nothing else.
    parts: how many matrices of one size it holds.
    dim: along which dimension they lie.
    transposed: whether it is `[in, out]`.
    """

    hidden: bool
    why: str
    period: int = 1
    layer: bool = False
    parts: int = 1
    dim: int = 0
    transposed: bool = False


def roles(model: nn.Module) -> dict[str, Role]:
    """Return the role of each parameter by name, tied ones once. The type of its module decides, not names."""
    head, why_head = head_of(model)
    periods = _periods(model)
    called = {id(module): name.rpartition(".")[2] for name, module in model.named_modules()}
    found: dict[int, Role] = {}
    for module in model.modules():
        for name, param in module.named_parameters(recurse=False):
            if isinstance(module, EMBEDDINGS):
                role = Role(False, "an embedding")
            elif isinstance(module, _NORMS):
                role = Role(False, "of a normalisation")
            elif param.ndim < 2:
                role = Role(False, "a vector" if param.ndim else "a scalar")
            elif head is not None and param is head.weight:
                role = Role(False, why_head)
            else:
                role = _matrix(module, name, param, called.get(id(module), ""))
            # the weight of a layer that is called as a layer (that of MultiheadAttention never is)
            layer = name == "weight" and multiplies(module) and not isinstance(module, NonDynamicallyQuantizableLinear)
            role = dataclasses.replace(role, period=periods.get(id(param), 1), layer=layer)
            before = found.get(id(param))
            if before is not None:  # a tied weight is what its least ordinary use is
                usual = role if before.hidden and not role.hidden else before
                role = dataclasses.replace(usual, layer=before.layer and role.layer)
            found[id(param)] = role
    return {name: found[id(param)] for name, param in model.named_parameters()}


def _matrix(module: nn.Module, name: str, param: Tensor, called: str) -> Role:
    if isinstance(module, _CONVOLUTIONS):
        if module.in_channels == module.groups > 1:
            return Role(False, "a depthwise convolution, which mixes no channels")
        out, into = param.shape[0], param[0].numel()
        if module.transposed:
            return Role(True, f"a transposed convolution, {out}×{into} as it lies", transposed=True)
        return Role(True, f"a convolution, seen as {out}×{into}")
    if param.ndim > 2:
        return Role(False, f"{param.ndim}-dimensional, and not a convolution")
    if isinstance(module, nn.MultiheadAttention) and name == "in_proj_weight":
        return Role(True, "the hidden matrices of queries, keys and values", parts=3)
    if name.startswith(("weight_ih", "weight_hh")) and (gates := _gates(module)) > 1:
        return Role(True, f"the hidden matrices of {gates} gates", parts=gates)
    transposed = is_transposed(module)
    parts, what = _fused(module, called, *(reversed(param.shape) if transposed else param.shape))
    why = f"the hidden matrices of {what}, by its name {called!r}" if parts > 1 else "a hidden matrix"
    if transposed:
        return Role(True, f"{why}, [in, out] in a {type(module).__name__}", parts=parts, dim=1, transposed=True)
    return Role(True, why, parts=parts)


def _gates(module: nn.Module) -> int:
    if isinstance(module, nn.LSTM | nn.LSTMCell):
        return 4
    return 3 if isinstance(module, nn.GRU | nn.GRUCell) else 1


_QKV = frozenset({"qkv", "to_qkv", "Wqkv", "c_attn"})
"""What vision models (timm's and their kin), GPT-2 and others call one projection to queries, keys and values."""


def _fused(module: nn.Module, called: str, out: int, into: int) -> tuple[int, str]:
    """Return how many matrices a linear layer's weight is, one above the other, and of what.

    Where heads lie side by side, each with its own queries, keys and values (GPT-NeoX, BLOOM), there is no such view;
    their layers have other names.
    """
    if called in _QKV and out == 3 * into:
        return 3, "queries, keys and values"
    if called == "c_attn" and out == 2 * into:
        return 2, "keys and values"
    if called == "gate_up_proj" and out % 2 == 0:
        return 2, "gates and values"
    return 1, ""


def head_of(model: nn.Module) -> tuple[nn.Module | None, str]:
    """Return the output layer, and why: as the model says it (Hugging Face's method), else its last linear layer."""
    for module in model.modules():  # the model may be wrapped, or be a part of another
        says = getattr(module, "get_output_embeddings", None)
        layer = says() if callable(says) else None
        if layer is not None and getattr(layer, "weight", None) is not None:
            return layer, "the output layer, by get_output_embeddings()"
    mixing = [m for m in model.modules() if isinstance(m, nn.Linear | _CONVOLUTIONS) or is_transposed(m)]
    linear = [m for m in mixing if isinstance(m, nn.Linear)]
    if len(mixing) > 1 and linear and mixing[-1] is linear[-1]:
        return linear[-1], "the last linear layer, taken for the output"
    return None, ""


def _periods(model: nn.Module) -> dict[int, int]:
    slow = [module for module in model.modules() if isinstance(module, Periodic)]
    return {id(param): module.period for module in slow for param in module.parameters()}


def unnamed(params: Iterator[tuple[str, Tensor]]) -> dict[str, Role]:
    """Return roles where there is no model to look at, by the number of dimensions alone."""
    return {
        name: Role(param.ndim == 2, f"{param.ndim}-dimensional (no model was given to tell its role)")
        for name, param in params
    }
