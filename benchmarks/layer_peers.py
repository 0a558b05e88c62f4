"""The peers: titans-pytorch's NeuralMemory and nested-learning's SelfModifyingTitans, as they come."""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from typing import Any

from torch import Tensor

from benchmarks import layer_flops as flops
from benchmarks.layer_rows import Layer, Row, tokens
from benchmarks.layer_size import Size
from benchmarks.rows import Missing

TITANS = "titans-pytorch NeuralMemory"
TITANS_BATCHES = f"{TITANS}, batch_size=C"
TITANS_SETTLED = f"{TITANS_BATCHES}, max_lr=0.1"
SELF_MODIFYING = "nested-learning SelfModifyingTitans"
VERSIONS = {"titans-pytorch": "0.5.5", "nested-learning": "0.2.0"}


def rows() -> list[Row]:
    return [
        Row(TITANS, _titans, flops.titans, chunked=True),
        Row(TITANS_BATCHES, _titans_batches, flops.titans, chunked=True),
        Row(TITANS_SETTLED, _titans_settled, flops.titans, chunked=True),
        Row(SELF_MODIFYING, _self_modifying, flops.self_modifying, chunked=True),
    ]


def _module(name: str, distribution: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what its dependencies use, as they are imported
            return importlib.import_module(name)
    except ModuleNotFoundError as error:
        how = f"pip install --no-deps {distribution}=={VERSIONS[distribution]}"
        raise Missing(
            f"not installed (no module {error.name}): {how}, and what it needs: benchmarks/requirements.txt"
        ) from None


def _titans(size: Size, **options: Any) -> Layer:
    """One head of D → 4D → D, its defaults. All chunks' gradients are at the weights that the call began with."""
    memory = _module("titans_pytorch", "titans-pytorch").NeuralMemory(dim=size.dim, chunk_size=size.chunk, **options)

    def stream(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        return memory(x, state=state)

    return Layer(memory, lambda x: memory(x)[0], [tokens(size)], stream=stream)


def _titans_batches(size: Size) -> Layer:
    """Each chunk's gradients at the weights that the chunk before left: what its paper and `read="chunk"` say."""
    return _titans(size, batch_size=size.chunk)


def _titans_settled(size: Size) -> Layer:
    """At its default max_lr=1 the memory may diverge on random tokens; at 0.1 it does not."""
    return _titans(size, batch_size=size.chunk, default_step_transform_max_lr=0.1)


def _self_modifying(size: Size) -> Layer:
    """Five memories with D hidden units, its defaults. Forward is with the updates, which are never differentiated:

    a training step is the pass that reads only, its backward, and then the pass that updates the parameters.
    """
    titan = _module("nested_learning.titan.self_modifying", "nested-learning")
    config = titan.SelfModifyingTitansConfig(dim=size.dim, chunk_size_other=size.chunk, chunk_size_memory=size.chunk)
    module = titan.SelfModifyingTitans(config)

    def stream(x: Tensor, state: Any) -> tuple[Tensor, Any]:
        if state is None:
            state = module.init_fast_state()
        else:  # its weights are replaced in the state given, whose own parts are to stay
            parts = {field.name: getattr(state, field.name) for field in dataclasses.fields(state)}
            state = type(state)(**{name: dataclasses.replace(part) for name, part in parts.items()})
        return module.forward_with_updates(x, state)

    return Layer(
        module,
        module,
        [tokens(size)],
        infer=lambda x: stream(x, None)[0],
        update=module.apply_updates_inplace,
        stream=stream,
    )
