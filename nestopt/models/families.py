"""Where trained models of several families have their parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.core.device import by_contract, holds_only, known, remember
from nestopt.core.tree import State


class Context(Protocol):
    """One context of attention."""

    def run(self, tokens: Tensor) -> Tensor:
        """More tokens `[B, n]`, after those before: the stream before the last norm, `[B, n, D]`."""

    def tensors(self) -> State:
        """Its keys and values, to go on from."""


class Family(Protocol):
    """What `nestopt.models.stack` asks of a kind of model.

    Attributes:
        causal: whether no token sees those after it.
    """

    causal: bool

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """Its layers, from the first."""

    def mlp(self, block: nn.Module) -> list[nn.Module]:
        """Return the modules that a layer's MLP runs one after another, from x to what is added to the stream."""

    def width(self, model: nn.Module) -> int:
        """Return the width of its stream."""

    def longest(self, model: nn.Module) -> int | None:
        """Return how many tokens a context can have at most, where positions are learned one by one; else None."""

    def has_head(self, model: nn.Module) -> bool:
        """Return whether it predicts tokens."""

    def head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        """Logits of the stream before the last norm."""

    def signal(self, model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        """Return the derivative by `hidden` `[B, n, D]` of the loss of the tokens after it, `[B, n]`."""

    def context(self, model: nn.Module, past: Mapping[str, Any] | None, mask: Tensor | None) -> Context:
        """Return a context that begins, or goes on from the tensors of another."""


class Decoder:
    """GPT-2, or Llama and those like it: `core` with layers, and a last norm.

    Args:
        layers, norm: their names in the core.
        core: the name of the core in a model with a head.
        positions: the name of its embedding of positions, if it has one.
    """

    causal = True

    def __init__(self, core: str, layers: str, norm: str, positions: str | None = None) -> None:
        self._core, self._layers, self._norm, self._positions = core, layers, norm, positions

    def core(self, model: nn.Module) -> nn.Module:
        """Return the model without its head."""
        return cast(nn.Module, getattr(model, self._core, model))

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(getattr(self.core(model), self._layers))

    def mlp(self, block: nn.Module) -> list[nn.Module]:
        return [cast(nn.Module, block.mlp)]

    def width(self, model: nn.Module) -> int:
        return int(cast(Any, model).config.hidden_size)

    def longest(self, model: nn.Module) -> int | None:
        if self._positions is None:
            return None
        return int(getattr(self.core(model), self._positions).num_embeddings)

    def has_head(self, model: nn.Module) -> bool:
        return hasattr(model, "lm_head")

    def head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        normed = getattr(self.core(model), self._norm)(hidden)
        return cast(Tensor, cast(Any, model).lm_head(normed)) if self.has_head(model) else normed

    def signal(self, model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        create = torch.is_grad_enabled()
        with torch.enable_grad():
            at = hidden if create and hidden.requires_grad else hidden.detach().requires_grad_()
            logits = self.head(model, at)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
            (found,) = torch.autograd.grad(loss, at, create_graph=create)
        return found

    def context(self, model: nn.Module, past: Mapping[str, Any] | None, mask: Tensor | None) -> Context:
        return _Cached(self.core(model), self._norm, past, mask)


class _Cached:
    """A decoder's context: its cache of keys and values."""

    def __init__(self, core: nn.Module, norm: str, past: Mapping[str, Any] | None, mask: Tensor | None) -> None:
        from transformers import DynamicCache

        self.core, self.norm = core, getattr(core, norm)
        self.cache: Any = DynamicCache()
        self.seen: Tensor | None = None
        self.coming = mask
        if past is not None:
            with by_contract("pretrained"):
                for i, layer in enumerate(past["layers"].values()):
                    self.cache.update(layer["keys"], layer["values"], i)
            self.seen = past["mask"]

    def run(self, tokens: Tensor) -> Tensor:
        n = tokens.shape[1]
        if self.coming is None:
            new = remember(torch.ones_like(tokens, dtype=torch.bool), [1])
        else:
            new, self.coming = self.coming[:, :n], self.coming[:, n:]
        mask = new if self.seen is None else _together(self.seen, new)
        # a row's tokens are counted, not its places
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -n:]
        # on an accelerator nobody waits to see whether there is padding
        whole = holds_only(mask, 1)
        found: list[Tensor] = []
        handle = self.norm.register_forward_pre_hook(lambda module, args: found.append(args[0]))
        try:
            with by_contract("pretrained"):
                self.core(
                    input_ids=tokens,
                    attention_mask=None if whole else mask.long(),
                    position_ids=positions,
                    cache=self.cache,
                    use_cache=True,
                )
        finally:
            handle.remove()
        self.seen = mask
        return found[0]

    def tensors(self) -> State:
        layers = {str(i): {"keys": x.keys, "values": x.values} for i, x in enumerate(self.cache.layers)}
        assert self.seen is not None
        return {"layers": layers, "mask": self.seen}


class Bert:
    """An encoder such as BERT, in which each layer's MLP is two modules with a norm and the residual after them."""

    causal = False

    def core(self, model: nn.Module) -> Any:
        """Return the model without its head."""
        return getattr(model, "bert", model)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(self.core(model).encoder.layer)

    def mlp(self, block: nn.Module) -> list[nn.Module]:
        return [cast(nn.Module, block.intermediate), cast(nn.Module, cast(Any, block.output).dense)]

    def width(self, model: nn.Module) -> int:
        return int(cast(Any, model).config.hidden_size)

    def longest(self, model: nn.Module) -> int | None:
        return int(self.core(model).embeddings.position_embeddings.num_embeddings)

    def has_head(self, model: nn.Module) -> bool:
        return False  # what it predicts is not the next token

    def head(self, model: nn.Module, hidden: Tensor) -> Tensor:
        return hidden

    def signal(self, model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        raise ValueError(f"{type(model).__name__} predicts no next token")

    def context(self, model: nn.Module, past: Mapping[str, Any] | None, mask: Tensor | None) -> Context:
        return cast(Context, None)  # it has none: each call is read as a whole


GPT2, LLAMA, BERT = Decoder("transformer", "h", "ln_f", "wpe"), Decoder("model", "layers", "norm"), Bert()


def family_of(model: nn.Module) -> Family:
    """Return the family of a model, by the parts it has.

    Raises:
        ValueError: if it is none that is known.
    """
    for family in (GPT2, LLAMA, BERT):
        try:
            blocks = family.blocks(model)
            parts = [part for part in family.mlp(blocks[0]) if isinstance(part, nn.Module)]
            if parts and (not isinstance(family, Decoder) or hasattr(family.core(model), family._norm)):
                return family
        except (AttributeError, IndexError, TypeError):
            continue
    raise ValueError(
        f"{type(model).__name__} is of no family that is known: GPT-2 (transformer.h[i].mlp), Llama and those like it "
        "(model.layers[i].mlp), BERT (encoder.layer[i].intermediate and output). Give family=, an object like "
        "nestopt.models.families.Decoder"
    )


def _together(seen: Tensor, new: Tensor) -> Tensor:
    """Both masks, which together hold a token in every place if both are known to."""
    mask = torch.cat([seen, new], dim=1)
    return remember(mask, [1]) if known(seen) == known(new) == [1] else mask


def as_pairs(cache: State) -> State:
    """Return attention's cache as the kept pairs of layers, whose rows can be chosen and put together."""
    return {name: {**pairs, "mask": cache["mask"]} for name, pairs in cache["layers"].items()}


def as_cache(pairs: State) -> State:
    """Return kept pairs of layers as a cache; empty of none."""
    if not pairs:
        return {}
    layers = {name: {"keys": own["keys"], "values": own["values"]} for name, own in pairs.items()}
    return {"layers": layers, "mask": next(iter(pairs.values()))["mask"]}
