"""What the operations on tokens agree on about shapes, and how they say that something does not fit."""

from __future__ import annotations

from torch import Tensor

from nestopt.core.part import nearest


def check_tokens(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless q, k `[B, T, H, D_k]` and v `[B, T, H, D_v]` fit together and hold a token at least."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has the shape {list(x.shape)}; it must be [batch, tokens, heads, width]")
    if k.shape != q.shape:
        raise ValueError(f"k has the shape {list(k.shape)} and q {list(q.shape)}; they must be the same")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(
            f"v has the shape {list(v.shape)} and q {list(q.shape)}; they must agree in batch, tokens and heads"
        )
    if q.shape[1] == 0:
        raise ValueError(f"q has the shape {list(q.shape)}: there is no token in it; give one or more")


def check_gate(name: str, gate: Tensor, q: Tensor) -> None:
    """Raise ValueError unless `gate` is `[B, T, H]` for `q` `[B, T, H, D_k]`."""
    if gate.shape != q.shape[:3]:
        raise ValueError(
            f"{name} has the shape {list(gate.shape)} and q {list(q.shape)}; it must be {list(q.shape[:3])}, a number "
            "for each token and head"
        )


def check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        hint = nearest(value, allowed) if isinstance(value, str) else ""
        raise ValueError(f"{name}={value!r} is not allowed; give one of {', '.join(map(repr, allowed))}.{hint}")


def check_whole(name: str, value: object, least: int) -> None:
    """Raise ValueError unless `value` is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}={value!r} is not allowed; give a whole number, {least} or more")
