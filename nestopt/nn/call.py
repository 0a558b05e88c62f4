"""One call of a layer: how its level is run, and tokens of other streams beside its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestopt.core.token_form import TokenForm
from nestopt.core.tree import State
from nestopt.nn.stats import Stats, run_in_pieces
from nestopt.ops.run import run_form

STORE = "store_mask"


@dataclasses.dataclass
class Call:
    """Run a level on q, k, v, gates and its state, with a mask.

    Attributes:
        form: of the level.
        options: of `run_form`.
        streams: other streams by name, `"queries"` and `"values"` `[B, T, dim]` and `"store_mask"` `[B, T]`, or None.
        stats: what was seen; None asks for none.
    """

    form: TokenForm
    options: dict[str, Any]
    streams: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stats: Stats | None = None

    def __post_init__(self) -> None:
        self.streams = {name: one for name, one in self.streams.items() if one is not None}

    def _check(self, x: Tensor) -> None:
        """Raise ValueError for streams that do not fit tokens x `[B, T, dim]`, or that the level does not take."""
        for name, one in self.streams.items():
            shape, kind = (x.shape[:2], "bool") if name == STORE else (x.shape, "floating")
            if one.shape != shape or (kind == "bool") != (one.dtype == torch.bool):
                raise ValueError(
                    f"SequenceMemory: {name} is {one.dtype} {list(one.shape)}; it must be {kind} {list(shape)}"
                )
        if STORE in self.streams and (self.form.level.appends or self.stats is not None):
            why = f"{self.form.level.label}, whose memory keeps every pair" if self.stats is None else "return_stats"
            raise ValueError(f"SequenceMemory: store_mask is not allowed with {why}; leave it out")

    def joined(self, x: Tensor) -> Tensor:
        """Return x with all streams behind its own numbers, so that they go where x goes."""
        self._check(x)
        others = (one[..., None].to(x) if name == STORE else one for name, one in self.streams.items())
        return torch.cat([x, *others], dim=-1) if self.streams else x

    def parted(self, x: Tensor, dim: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return x `[B, T, dim]` and the streams of what was `joined`."""
        if not self.streams:
            return x, {}
        x, *others = x.split([dim, *(1 if name == STORE else dim for name in self.streams)], dim=-1)
        return x, dict(zip(self.streams, others, strict=True))

    def __call__(self, *tokens: Any, mask: Tensor | None = None, store: Tensor | None = None) -> tuple[Tensor, State]:
        """Return the answers to q, k, v with gates and a state, `tokens`, and the state; `store` is `[B, T, 1]`."""
        if self.stats is None:
            live = None if store is None else store[..., 0] > 0
            return run_form(self.form, *tokens, mask=mask, live=live, **self.options)
        y, state, seen = run_in_pieces(self.form, *tokens, mask=mask, **self.options)
        self.stats.update(seen)
        return y, state
