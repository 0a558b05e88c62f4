"""A trained Transformer whose MLPs go on learning while it reads (NL section 7.3).

Each MLP becomes a level of a continuum: its weights are where every sequence starts, and a period of tokens is its
clock. With a rate of 0 it is the trained model, to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from nestopt.core.associative import Gd
from nestopt.core.device import by_contract, numbers_in
from nestopt.core.level import Level
from nestopt.core.precision import Precision, check_precision, check_products
from nestopt.core.token_batch import check_mask
from nestopt.core.tree import State, tree_map
from nestopt.levels.continuum.clock import Clocks, Phases, between_writes
from nestopt.levels.continuum.write import LearnerStep
from nestopt.models.continuation import go_on
from nestopt.models.exact_signal import ExactSignal, Passed, nothing_open
from nestopt.models.families import Family, as_cache, as_pairs, family_of
from nestopt.models.loss_signal import TAUGHT, LossTeaching, Read, nothing_carried
from nestopt.models.trained_mlp import LEVEL, Layer, TrainedMlp, reading
from nestopt.nn.rows import Rows


class Stacked(nn.Module):
    """A trained model with levels in the place of MLPs; made by `stack`.

    Attributes:
        pretrained: the model, which is never changed.
        periods: tokens between the writes of each layer that learns, by its number.
    """

    def __init__(
        self,
        pretrained: nn.Module,
        family: Family,
        periods: Mapping[int, int],
        rate: float,
        teach: Literal["loss", "local"],
        writer: LearnerStep,
        through: Literal["full", "first_order", "stop"],
        precision: Precision = "float32",
        signal: Literal["exact", "residual"] = "exact",
        bound: float | None = None,
        damping: float | None = None,
        surprise: float = 0.0,
    ) -> None:
        super().__init__()
        self.signal: Literal["exact", "residual"] = signal
        self._bound, self._through = bound, through
        self.pretrained, self.periods, self._family = pretrained, dict(periods), family
        self._blocks = family.blocks(pretrained)
        self.rates, self.targets = nn.ParameterDict(), nn.ParameterDict()
        self._layers: dict[int, Layer] = {}
        self._precision: Precision = precision
        if rate == 0:
            return
        for i, period in sorted(self.periods.items()):
            memory = TrainedMlp(family.mlp(self._blocks[i]))
            weight = next(iter(memory.start().values()))
            self.rates[str(i)] = nn.Parameter(torch.tensor([math.log(rate)], device=weight.device))
            if teach == "local":
                self.targets[str(i)] = nn.Parameter(torch.eye(family.width(pretrained), device=weight.device))
            target = self.targets[str(i)] if teach == "local" else None
            clocks = Clocks({LEVEL: period}, writer, through=through, surprise=surprise)
            self._layers[i] = Layer(memory, self.rates[str(i)], clocks, target, precision, damping)

    @property
    def precision(self) -> Precision:
        """That of products; set, it is that of all layers."""
        return self._precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        check_precision(precision, "Stacked")
        self._precision = precision
        for layer in self._layers.values():
            layer.precision = precision

    def init_state(self, batch: int) -> State:
        """Return the state of `batch` sequences before their first token."""
        found: State = {f"block_{n}": {LEVEL: layer.init_state(batch)} for n, layer in enumerate(self._layers.values())}
        if self._layers and not self.targets and self.signal == "exact":
            found[TAUGHT] = nothing_open(self._exact().width, batch, {}, next(self.pretrained.parameters()).device)
        elif self._layers and not self.targets:
            like = next(self.pretrained.parameters())
            found[TAUGHT] = nothing_carried(len(self._layers), batch, self._family.width(self.pretrained), like)
        return found

    def forward(
        self,
        tokens: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        attention_mask: Tensor | None = None,
        cache: bool = False,
        learn: bool = True,
    ) -> tuple[Tensor, State]:
        """Logits `[B, T, vocab]`, or the last hidden states of a model without a head, and the state.

        Args:
            tokens: `[B, T]`.
            state: from a former call; None begins new sequences.
            attention_mask: `[B, T]`, 0 for padding, on either side.
            cache: whether attention goes on from call to call, its keys and values in the state: then pieces give what
                the whole does. Else each call begins a context of its own, and only what was learned goes on.
            learn: False reads with the weights in the state, and changes none.

        Raises:
            ValueError: for a mask of another shape, a cache of an encoder, a context longer than the model has
                positions, or a state of a model with another signal.
        """
        like = next(self.pretrained.parameters())
        check_products(self.precision, like.device, like.dtype, "Stacked")
        state = dict(state) if state else self.init_state(tokens.shape[0])
        if TAUGHT in state and ("count" in state[TAUGHT]) != (self.signal == "exact"):
            other = "residual" if self.signal == "exact" else "exact"
            raise ValueError(f"Stacked: the state is of a model with signal={other!r}, and this has {self.signal!r}")
        past = state.pop("cache", None)
        past = past if cache else None
        if cache and not self._family.causal:
            raise ValueError("Stacked: cache=True is for decoders; an encoder reads each call as a whole")
        self._check_length(tokens.shape[1] + (0 if past is None else past["mask"].shape[1]))
        if not self._layers and not cache:
            return self._plain(tokens, attention_mask), state
        mask, rows = None, None
        if attention_mask is not None:
            check_mask(attention_mask.bool(), *tokens.shape)
            rows = Rows.of(attention_mask.bool())
            tokens, mask = rows.moved(tokens[..., None])[..., 0], rows.front
        if learn and self._layers and self.signal == "exact" and not self.targets:
            return self._exactly_taught(tokens, state, past, mask, rows, cache)
        context = self._family.context(self.pretrained, past, mask)
        if not self._family.causal:
            out, state = self._encoded(tokens, state, mask, learn)
        elif learn and self._layers:
            taught = self._by_themselves if self.targets else self._taught
            hidden, state = taught(tokens, state, context, mask)
            out = self._family.head(self.pretrained, hidden)
        else:
            hidden, _ = self._read(tokens, state, context)
            out = self._family.head(self.pretrained, hidden)
        if cache:
            state["cache"] = context.tensors()
        return (out if rows is None else rows.back(out)), state

    def _check_length(self, length: int) -> None:
        longest = self._family.longest(self.pretrained)
        if longest is not None and length > longest:
            raise ValueError(
                f"Stacked: a context of {length:,} tokens is longer than the {longest:,} positions of "
                f"{type(self.pretrained).__name__}; read the text in calls of at most {longest:,} tokens and "
                "cache=False, from which only what was learned goes on"
            )

    def _plain(self, tokens: Tensor, attention_mask: Tensor | None) -> Tensor:
        with by_contract("pretrained"):
            found = self.pretrained(tokens, attention_mask=attention_mask)
        return cast(Tensor, found.logits if hasattr(found, "logits") else found.last_hidden_state)

    def _taught(self, tokens: Tensor, state: State, context: Any, mask: Tensor | None) -> tuple[Tensor, State]:
        """Read as `HopeLM` does: from write to write, each position when its next token has come."""
        layers = list(self._layers.values())
        seen = Read.of(next(iter(state.values()))[LEVEL]["step"], state[TAUGHT])
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._through != "stop"):
            teaching = LossTeaching(tokens, state, layers, mask, seen, LEVEL)
            if teaching.waiting:
                teaching.observe_carried(self._family.signal(self.pretrained, *teaching.waiting))
            for part in teaching.parts():
                hidden, inputs = self._read(tokens[:, part], teaching.state, context)
                if known := teaching.took(hidden, inputs):
                    teaching.observe(self._family.signal(self.pretrained, *known))
            return teaching.end()

    def _exactly_taught(
        self, tokens: Tensor, state: State, past: State | None, mask: Tensor | None, rows: Rows | None, cache: bool
    ) -> tuple[Tensor, State]:
        """Read from write to write, each segment taught when it is over."""
        if past is not None:
            state["cache"] = as_pairs(past)
        elif cache and mask is not None:  # so that rows that end in the first segment have the start of one
            with torch.no_grad():
                first = self._family.context(self.pretrained, None, None)
                first.run(tokens[:, :1])
            state["cache"] = tree_map(lambda x: x.narrow(-2 if x.ndim > 2 else -1, 0, 0), as_pairs(first.tensors()))
        else:
            state["cache"] = {}
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._through != "stop"):
            hidden, state = self._exact(closes=not cache).run(tokens, state, mask)
            own = state.pop("cache")
            out = self._family.head(self.pretrained, hidden)
        if cache:
            state["cache"] = as_cache(own)
        return (out if rows is None else rows.back(out)), state

    def _exact(self, closes: bool = False) -> ExactSignal:
        def read(tokens: Tensor, state: State, mask: Tensor | None, learns: bool) -> Passed:
            context = self._family.context(self.pretrained, as_cache(state["cache"]) or None, mask)
            outputs: list[Tensor] | None = [] if learns else None
            with self._weights(state, outputs) as inputs:
                hidden = context.run(tokens)
            own = [inputs[i] for i in self._layers]
            return Passed(hidden, own, outputs or [], {**state, "cache": as_pairs(context.tensors())})

        return ExactSignal(
            continua={f"block_{n}": layer for n, layer in enumerate(self._layers.values())},
            key=LEVEL,
            read=read,
            head=partial(self._family.head, self.pretrained),
            mixers=lambda state: cast(State, state["cache"]),
            begin_at=lambda state, mixers: {**state, "cache": mixers},
            second_order=self._through == "full",
            bound=self._bound,
            closes=closes,
        )

    def _by_themselves(self, tokens: Tensor, state: State, context: Any, mask: Tensor | None) -> tuple[Tensor, State]:
        """Read from write to write, each level taught by its own objective."""
        found: list[Tensor] = []
        for part, phases in between_writes(tokens.shape[1], self._phases(state), self._layers.values()):
            hidden, inputs = self._read(tokens[:, part], state, context)
            found.append(hidden)
            live = None if mask is None else mask[:, part]
            blocks = enumerate(zip(self._layers.values(), inputs, strict=True))
            state = {
                f"block_{n}": {LEVEL: layer.observe(x, None, state[f"block_{n}"][LEVEL], live, phases=phases)}
                for n, (layer, x) in blocks
            }
        return torch.cat(found, dim=1), state

    def _encoded(self, tokens: Tensor, state: State, mask: Tensor | None, learn: bool) -> tuple[Tensor, State]:
        """Read all at once; then the levels learn from it, token by token, each from its own objective."""
        with self._weights(state) as inputs:
            out = self._plain(tokens, mask)
        if not learn:
            return out, state
        new = dict(state)
        for n, (i, layer) in enumerate(self._layers.items()):
            own = new[f"block_{n}"][LEVEL]
            for part, phases in between_writes(tokens.shape[1], self._phases(state), [layer]):
                live = None if mask is None else mask[:, part]
                own = layer.observe(inputs[i][:, part], None, own, live, phases=phases)
            new[f"block_{n}"] = {LEVEL: own}
        return out, new

    def _phases(self, state: State) -> Phases:
        """Return the different numbers of tokens that rows have learned from; waits where only a device knows."""
        return numbers_in(state["block_0"][LEVEL]["step"])

    def _read(self, tokens: Tensor, state: State, context: Any) -> tuple[Tensor, list[Tensor]]:
        """Return the stream before the last norm `[B, n, D]`, and the inputs of each layer that learns."""
        with self._weights(state) as inputs:
            hidden = context.run(tokens)
        return hidden, [inputs[i] for i in self._layers]

    @contextmanager
    def _weights(self, state: State, outputs: list[Tensor] | None = None) -> Iterator[dict[int, Tensor]]:
        """While this lasts, the MLPs have the weights in `state`; gives what they are shown, and notes `outputs`."""
        inputs: dict[int, Tensor] = {}
        with ExitStack() as patched:
            for n, (i, layer) in enumerate(self._layers.items()):
                weights = layer.weights(state[f"block_{n}"][LEVEL])
                took, gave = partial(inputs.__setitem__, i), None if outputs is None else outputs.append
                patched.enter_context(reading(layer, self._family.mlp(self._blocks[i]), weights, took, gave))
            yield inputs

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        choose: Callable[[Tensor], Tensor] = lambda logits: logits.argmax(-1),
        state: Mapping[str, Any] | None = None,
        *,
        learn: bool = True,
    ) -> tuple[Tensor, State]:
        """Go on with `prompt` `[B, n]` for `length` tokens: `[B, n + length]`, and the state after all but the last."""
        past = (state or {}).get("cache")
        self._check_length(prompt.shape[1] + max(length - 1, 0) + (0 if past is None else past["mask"].shape[1]))
        now: State = dict(state) if state else self.init_state(len(prompt))
        return go_on(partial(self, cache=True, learn=learn), prompt, length, choose, now)


def stack(
    pretrained: nn.Module,
    levels: int | Sequence[int] | Mapping[int, int] = 64,
    *,
    rate: float | None = None,
    teach: Literal["loss", "local"] = "loss",
    signal: Literal["exact", "residual"] = "exact",
    bound: float | None = 0.5,
    damping: float | None = 3.0,
    learner: Level | None = None,
    keep: float = 1.0,
    surprise: float = 0.0,
    through: Literal["full", "first_order", "stop"] = "stop",
    family: Family | None = None,
    precision: Precision = "float32",
) -> Stacked:
    r"""Let the MLPs of a trained Hugging Face model learn while it reads.

    Taught by the loss, each takes a step every period along the sum of its gradients: of its own next-token loss,
    backpropagated through the layers after it, a segment between two writes at a time (`nestopt.models.exact_signal`).
    With `cache=False` a call's segments are over where it ends, and its last token teaches nothing.

    Args:
        pretrained: a GPT-2, a Llama or one like it (Mistral, Qwen, SmolLM, …), or a BERT. It is not changed.
        levels: tokens between writes: of all MLPs; or several, spread evenly over the depth from the first layer on
            (slow ones first, as a rule); or by layer, counted from 0, or from the end with negative numbers: only these
            learn.
        rate: of the learner's steps, on sums of gradients: the same for all at first, learned as its logarithm. 0: the
            model is as it was. Default 4e-3, or 3e-4 where these are plain sums; with `teach="local"`, whose error
            grows as it is followed too far, 1e-5.
        teach: `"loss"`, of the model's own next-token prediction; `"local"`: M(x) is to be V x, with V learned and at
            first the identity, for models without a head.
        signal: the error at an MLP's output. `"exact"`: the derivative of the loss by it. `"residual"`: that by the
            stream before the last norm, as if no layer came after: cheaper, right in the last layer, and less and less
            like it below; bound and damping are not for it.
        bound: share of a segment's loss that a write may be foreseen to take off, above 0 and 2 at most: what keeps a
            rate that is too great from doing harm. None: none. A learner that divides by the size of what it is shown,
            as `adam` does, undoes it.
        damping: how many times at most a direction that all inputs of a linear layer share is written, in the place of
            once a token (`nestopt.models.trained_mlp`). None: gradients are plain.
        learner: what is shown the gradients. Default `gd`.
        keep: what is left, at each write, of the way from the trained weights.
        surprise: a token teaches an MLP only if its error there is, squared, at least so many times the mean of those
            before it; 0: every token.
        through: how the outer gradient passes a write, if weights or rates are to be trained
            (`nestopt.levels.continuum.level`).
        family: where a model of another kind has its parts.
        precision: of the products of MLPs that have learned, and of those by which they learn, where they are float32:
            `"float32"`, `"tf32"` or `"bfloat16"` (`nestopt.core.precision`).

    Raises:
        ValueError: for a model of no known family, layers that it does not have, periods below 1, an encoder that is to
            be taught by a loss it does not have, or a `precision` of another name.

    >>> from transformers import GPT2Config, GPT2LMHeadModel  # doctest: +SKIP
    >>> model = stack(GPT2LMHeadModel(GPT2Config(n_layer=4)), {-1: 16, -2: 64})  # doctest: +SKIP
    """
    check_precision(precision, "stack")
    family = family_of(pretrained) if family is None else family
    exact = teach == "loss" and signal == "exact"
    if rate is None:
        rate = 1e-5 if teach == "local" else 4e-3 if exact and damping is not None else 3e-4
    if rate < 0 or not math.isfinite(rate):
        raise ValueError(f"stack: rate={rate} is not allowed; give 0 or more")
    if teach not in ("loss", "local"):
        raise ValueError(f'stack: teach={teach!r} is not allowed; give "loss" or "local"')
    if signal not in ("exact", "residual"):
        raise ValueError(f'stack: signal={signal!r} is not allowed; give "exact" or "residual"')
    if bound is not None and not 0 < bound <= 2:
        raise ValueError(f"stack: bound={bound} is not allowed; give a number above 0, 2 or less, or None for no bound")
    if damping is not None and not 0 < damping < math.inf:
        raise ValueError(f"stack: damping={damping} is not allowed; give a number above 0, or None for plain gradients")
    if not 0 <= surprise < math.inf:
        raise ValueError(f"stack: surprise={surprise} is not allowed; give a number, 0 or more")
    if teach == "loss" and rate and not family.has_head(pretrained):
        raise ValueError(
            f"stack: {type(pretrained).__name__} predicts no next token, so that no loss can teach it; give "
            'teach="local", or rate=0'
        )
    periods = _periods(levels, len(family.blocks(pretrained)))
    writer = LearnerStep(Gd() if learner is None else learner, normalized=False, keep=keep)
    held = {"bound": bound, "damping": damping} if exact else {}
    return Stacked(
        pretrained, family, periods, rate, teach, writer, through, precision, signal, surprise=surprise, **held
    )


def _periods(levels: int | Sequence[int] | Mapping[int, int], depth: int) -> dict[int, int]:
    """Return the period of each layer that learns."""
    if isinstance(levels, Mapping):
        for i in levels:
            if not -depth <= i < depth:
                raise ValueError(f"stack: levels has layer {i}; there are layers 0 to {depth - 1}, or -{depth} to -1")
        found = {i % depth: period for i, period in levels.items()}
    else:
        spread = [levels] if isinstance(levels, int) else list(levels)
        if not spread:
            raise ValueError("stack: levels is empty; give a period, several, or a period by layer")
        found = {i: spread[i * len(spread) // depth] for i in range(depth)}
    for i, period in found.items():
        if isinstance(period, bool) or not isinstance(period, int) or period < 1:
            raise ValueError(f"stack: period {period!r} of layer {i} is not allowed; give whole tokens, 1 or more")
    return found


__all__ = ["Stacked", "stack"]
