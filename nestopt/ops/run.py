"""The door for tokens: any level, by its form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nestopt.core.device import no_autocast
from nestopt.core.gates import per_head
from nestopt.core.level import Level
from nestopt.core.packing import Packing
from nestopt.core.part import nearest
from nestopt.core.precision import Precision, check_products, products_in
from nestopt.core.token_batch import TokenBatch, check_finite, check_gate, check_tokens, refuse_mask
from nestopt.core.token_choice import choose_form, make_form
from nestopt.core.token_form import FormSetting, TokenForm
from nestopt.core.tree import State


def run(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    learned: Mapping[str, Tensor] | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Any = None,
    checkpoint: int = 0,
    learn: bool = True,
    precision: Precision = "float32",
    form: str | None = None,
    validate: bool = False,
) -> tuple[Tensor, State]:
    """Run `level` over tokens by the form that is chosen for it (`nestopt.core.token_choice`).

    Built-in forms give what the reference machine (`nestopt.core.scan`) gives, with its states: a sequence may be begun
    by one and gone on with by the other. That a level runs by the reference machine, which is slow, is logged once.

    Args:
        level: any level; its gates that are not in `gates` take their initial value.
        q, k: `[B, T, H, D_k]`, T >= 1.
        v: `[B, T, H, D_v]`. Forms of attention let k and v have fewer heads, a number that divides H: the first H / n
            queries share the first key and value, and so on; so many heads the state has.
        gates: values of the level's gates by dotted path, `[B, T, H]` each; of `Channels`, `[B, T, H, D_k]`.
        state: from a former call, to go on from there; None starts anew (from `learned`).
        learned: the start a layer learned, `[H, ...]` by name.
        mask: `[B, T]`, True for tokens, False for padding, wherever it is: it changes nothing.
        cu_seqlens: for sequences end to end in one row, `[1, N, H, D]`: where each begins, and the end.
        checkpoint: of deep memories: recompute in the backward pass all but every so many chunks' weights.
        learn: False reads only: each token is answered from the memory that `state` holds (`nestopt.core.recall`), as
            if it came next, whatever else is in this call, and `state` is given back as it is.
        precision: of the memory's products (`nestopt.core.precision`): `"float32"`, `"tf32"` or `"bfloat16"`.
        form: the name of the form that is to run it; None chooses.
        validate: check that all numbers are finite, at the cost of waiting for the device.

    A token that holds a number that is not finite is not written; its own answer is NaN, and nobody else's. (Attention
    that reads `"before"` its write keeps a pair of zeros in its place.)

    Returns:
        y `[B, T, H, D_v]` in the dtype of v, and the state, which is float32 at least.

    Raises:
        ValueError: for shapes that do not fit, no tokens, a gate that the level does not have, padding for a memory
            that keeps every pair and reads before it, a `precision` that the device lacks, or a `form` that does not
            take the level; with `validate`, for a number that is not finite.
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    sharing = q.shape[2] // max(1, k.shape[2]) if q.ndim == k.ndim == 4 else 1
    made = make_form(level, FormSetting(q.device, dtype, checkpoint, sharing=sharing), form)
    check_tokens(q, k, v, shared=made.shares)
    gates, packing = dict(gates or {}), None
    if cu_seqlens is not None:
        refuse_mask(mask, q)
        packing = Packing.of(cu_seqlens, q, "run")
        gates = {path: packing.unpack_like(gate, q) for path, gate in gates.items()}
        (q, k, v), mask = (packing.unpack(x) for x in (q, k, v)), packing.mask
    if state is None:
        like = v.new_empty(0, dtype=dtype)
        start = {name: x.to(dtype) for name, x in (learned or {}).items()}
        state = made.init(q.shape[0], k.shape[2], q.shape[-1], v.shape[-1], like, start)
    y, state = run_form(made, q, k, v, gates, state, mask=mask, learn=learn, precision=precision, validate=validate)
    return y if packing is None else packing.pack(y), state


def run_form(
    form: TokenForm,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: State,
    *,
    mask: Tensor | None = None,
    live: Tensor | None = None,
    learn: bool = True,
    precision: Precision = "float32",
    validate: bool = False,
) -> tuple[Tensor, State]:
    """Run a form on tokens as a caller has them: check them, once, and lay them out. Arguments and result as `run`.

    Tokens that are not `live` `[B, T]` are answered, and not written.
    """
    check_products(precision, q.device, v.dtype)
    for path, gate in gates.items():
        if path not in form.gates:
            raise ValueError(
                f"{form.level.label} has no gate {path!r}.{nearest(path, form.gates)} "
                f"It has: {', '.join(sorted(form.gates)) or 'none'}."
            )
        check_gate(f"gate {path!r}", gate, q, width=form.gates[path].width(q.shape[-1]))
    if validate:
        check_finite(q=q, k=k, v=v, **{f"gate {path!r}": gate for path, gate in gates.items()})
    if mask is not None and learn:
        form.refuse_padding("mask and cu_seqlens are not")
    given = {path: gate.transpose(1, 2).to(form.setting.dtype) for path, gate in gates.items()}
    tokens = TokenBatch.of(q, k, v, mask, *given.values(), widen=form.widens, shared=form.shares)
    if live is not None:
        tokens = tokens.written_where(live)
    given = {**per_head(form.gates, tokens.q), **given}
    with no_autocast(q.device), products_in(precision):
        if learn:
            y, state = form.run(tokens, given, state)
        else:
            y = form.read(tokens, given, state)
    return tokens.answer(y), state


def fast_form(level: Level) -> str | None:
    """Name the form that runs `level` on tokens (on a CPU, in float32); None is the reference machine.

    `nestopt.core.token_choice.choose_form` also says why.
    """
    try:
        name = choose_form(level, FormSetting(torch.device("cpu"))).name
    except ValueError:
        return None
    return None if name == "reference" else name
