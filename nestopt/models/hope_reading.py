"""How a `HopeLM` reads: through its blocks, and, where its loss teaches their continua, from write to write."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Protocol, cast

from torch import Tensor, nn

from nestopt.core.device import no_autocast
from nestopt.core.precision import Precision, matmul, products_in
from nestopt.core.tree import State
from nestopt.models import next_token
from nestopt.models.exact_signal import ExactSignal, Passed
from nestopt.models.loss_signal import LossTeaching, Read, teach_signal
from nestopt.nn.hope import HopeBlock, Learn, writes


class Model(Protocol):
    """What is read of a language model: a `HopeLM` is one."""

    embedding: nn.Embedding
    blocks: nn.ModuleList
    norm: nn.RMSNorm
    head: nn.Linear
    precision: Precision


def blocks_of(model: Model) -> list[HopeBlock]:
    """Return its blocks, from the first."""
    return cast(list[HopeBlock], list(model.blocks))  # a ModuleList forgets of what it is


def through(
    model: Model, tokens: Tensor, state: State, mask: Tensor | None, learn: Learn, outputs: list[Tensor] | None = None
) -> tuple[Tensor, list[Tensor], State]:
    """Run all blocks on tokens of which none crosses a write of a continuum that is taught.

    Returns:
        The stream after the last block and the input of each continuum, `[B, n, dim]` each, and the state; `outputs`
        gets the output of each that is taught, of which a gradient can be asked.
    """
    x = next_token.embedded(model.embedding, tokens, "HopeLM")
    inputs, new = [], {}
    for name, block in zip(state, blocks_of(model), strict=True):
        own = state[name]
        x, mixer = block.mixed(x, own["mixer"], mask=mask, learn=learn)
        inputs.append(x)
        if block.mlp.taught:
            x, mlp = block.mlp.read(x, own["mlp"]), own["mlp"]
            if outputs is not None:
                x = x if x.requires_grad else x.requires_grad_()
                outputs.append(x)
        else:
            x, mlp = block.mlp(x, own["mlp"], mask=mask, learn=writes(learn, "mlp"))
        new[name] = {"mixer": mixer, "mlp": mlp}
    return x, inputs, new


def residual(
    model: Model, tokens: Tensor, state: State, mask: Tensor | None, learn: Learn, read: Read, ahead: int
) -> tuple[Tensor, State]:
    """Read from write to write, each position taught once its target is known, by the residual stream's error."""
    continua = [block.mlp if block.mlp.taught else None for block in blocks_of(model)]
    teaching = LossTeaching(next_token.numbers_of(tokens), state, continua, mask, read, "mlp", ahead)
    if teaching.waiting:
        teaching.observe_carried(_signal(model, *teaching.waiting))
    for part in teaching.parts():
        masked = None if mask is None else mask[:, part]
        hidden, inputs, teaching.state = through(model, tokens[:, part], teaching.state, masked, learn)
        if known := teaching.took(hidden, inputs):
            teaching.observe(_signal(model, *known))
    return teaching.end()


def exact(model: Model, learn: Learn = True) -> ExactSignal | None:
    """Return how a model reads whose continua are taught the gradient of its loss; None where they are not."""
    taught = {f"block_{i}": block.mlp for i, block in enumerate(blocks_of(model)) if block.mlp.taught}
    if not any(mlp.level.signal == "exact" for mlp in taught.values()):
        return None

    def read(tokens: Tensor, state: State, mask: Tensor | None, learns: bool) -> Passed:
        outputs: list[Tensor] | None = [] if learns else None
        hidden, inputs, new = through(model, tokens, state, mask, learn, outputs)
        own: Sequence[Tensor] = [x for name, x in zip(state, inputs, strict=True) if name in taught]
        return Passed(hidden, own, outputs or [], new)

    return ExactSignal(
        continua=taught,
        key="mlp",
        read=read,
        head=lambda hidden: _logits(model, hidden),
        mixers=lambda state: {name: part["mixer"] for name, part in state.items()},
        begin_at=lambda state, mixers: {name: {**part, "mixer": mixers[name]} for name, part in state.items()},
        lift=lambda tokens: next_token.lifted(tokens, model.embedding),
        second_order=any(mlp.level.through in ("full", "truncated") for mlp in taught.values()),
    )


@contextmanager
def _products(model: Model, hidden: Tensor) -> Iterator[None]:
    """Run a model's head in its precision; in float32 as the caller's autocast has it."""
    autocast = nullcontext() if model.precision == "float32" else no_autocast(hidden.device)
    with autocast, products_in(model.precision):
        yield


def _logits(model: Model, hidden: Tensor) -> Tensor:
    with _products(model, hidden):
        return matmul(model.norm(hidden), model.head.weight.mT)


def _signal(model: Model, hidden: Tensor, targets: Tensor) -> Tensor:
    with _products(model, hidden):
        return teach_signal(hidden, targets, model.norm, model.head)
