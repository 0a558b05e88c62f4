"""Choosing the next token from a model's logits."""

from collections.abc import Sequence

import torch
from torch import Tensor


def choose(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.LongTensor:
    """Draw one token a row from `distribution`; at temperature 0 take the likeliest, without chance.

    Args:
        logits: ``[B, V]``, V the size of the vocabulary.
        temperature, top_k, top_p: as for `distribution`.
        generator: source of chance, on the device of ``logits``; torch's global one by default.

    Returns:
        ``[B]`` tokens, ``int64``; on an accelerator, which is not waited for, -1 for a row that `distribution` has none
        for. `check_drawn` says so once the tokens are fetched.

    Raises:
        ValueError: as `distribution`.
    """
    probabilities = distribution(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    if temperature > 0:
        # torch.multinomial's own way, without its look at the sum, for which it waits
        noise = torch.empty_like(probabilities).exponential_(1, generator=generator)
        drawn = (probabilities / noise).argmax(dim=-1)
    else:
        drawn = probabilities.argmax(dim=-1)
    return drawn.where(probabilities[:, 0].isfinite(), -1)  # type: ignore[return-value]


def check_drawn(tokens: Sequence[int]) -> None:
    """Raise ValueError if among tokens that `choose` drew is one that it could not draw."""
    if min(tokens, default=0) < 0:
        raise ValueError(_NONE)


def distribution(
    logits: Tensor, *, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return what `choose` draws from: softmax(logits / temperature), cut to ``top_k``, then to ``top_p``.

    Args:
        logits: ``[B, V]``; ``-inf`` forbids a token.
        temperature: at least 0; the limit 0 puts all on the first of the largest logits.
        top_k: keep only the k likeliest tokens, k from 1 to V. ``None`` keeps all.
        top_p: of what is left, scaled to sum to 1, keep the fewest likeliest tokens that together have at least this
            probability, in (0, 1] (nucleus sampling, Holtzman et al., 2020). ``None`` keeps all.

    Returns:
        ``[B, V]``, each row sums to 1; in float32, or float64 where the logits are.

    Raises:
        ValueError: for a number out of range, a shape that is not ``[B, V]``, or, on the CPU, a row of logits that has
            NaN or ``+inf`` in it, or nothing but ``-inf``. On an accelerator, which is not waited for, such a row is
            NaN.
    """
    if logits.ndim != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits must have the shape [batch, vocabulary], not {list(logits.shape)}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number of at least 0, not {temperature}")
    if top_k is not None and not 1 <= top_k <= logits.shape[1]:
        raise ValueError(f"top_k must be from 1 to {logits.shape[1]} (the vocabulary), not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], not {top_p}")
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    largest = logits.amax(dim=-1, keepdim=True)
    sound = largest.isfinite()  # amax is NaN where any logit is
    if logits.device.type == "cpu" and not sound.all():
        raise ValueError(_NONE)
    logits = torch.where(sound, logits, torch.nan)
    if temperature < torch.finfo(logits.dtype).tiny:  # it would be 0 in the division
        likeliest = torch.zeros_like(logits).scatter(-1, logits.argmax(dim=-1, keepdim=True), 1.0)
        return likeliest.where(sound, torch.nan)
    logits = (logits - largest) / temperature
    if top_k is not None:
        kept = logits.topk(top_k, dim=-1)
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        ranked, tokens = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked
        ranked = ranked.where(before < top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, tokens, ranked)
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return probabilities


_NONE = "a row of logits has NaN, +inf, or only -inf in it: the model has diverged, or bars every token"
