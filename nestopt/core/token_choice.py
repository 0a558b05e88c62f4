"""Which form runs a level on tokens, and why."""

from __future__ import annotations

import dataclasses
import functools
import logging
import os
from collections.abc import Mapping

from torch import Tensor

from nestopt.core.gates import per_head, refuse_schedules
from nestopt.core.level import Level
from nestopt.core.part import nearest
from nestopt.core.registry import registry
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_form import Choice, FormSetting, Refused, TokenForm
from nestopt.core.tree import State

LEAVE_OUT = "NESTOPT_WITHOUT_FORMS"
"""Environment variable: names of forms that are not asked, separated by commas; `all` leaves the reference machine."""

logger = logging.getLogger("nestopt")


def choose_form(level: Level, setting: FormSetting, name: str | None = None) -> Choice:
    """Choose the form that runs `level`: the one with the highest priority among those that accept it.

    Args:
        level: any level but `cms`.
        setting: where it is to run.
        name: of a form, to be taken whatever its priority; None asks all.

    Raises:
        ValueError: for a `name` that is no form's, or of one that refuses the level; for an unknown name in
            `NESTOPT_WITHOUT_FORMS`; for a level that no form takes.
    """
    known = {form: registry.get("token_form", form) for form in registry.names("token_form")}
    left_out = {word for word in os.environ.get(LEAVE_OUT, "").replace(" ", "").split(",") if word}
    for word in sorted(left_out - {"all"} - set(known)):
        raise ValueError(
            f"{LEAVE_OUT} names {word!r}, which is no form.{nearest(word, known)} Known: {', '.join(known)}"
        )
    if name is not None and name not in known:
        raise ValueError(f"form={name!r} is no form.{nearest(name, known)} Known: {', '.join(known)}")
    refused: list[tuple[str, str]] = []
    for form, cls in sorted(known.items(), key=lambda item: (-item[1].priority, item[0])):
        if not isinstance(level, cls.levels) or (setting.reference and not cls.reference) or name not in (None, form):
            continue
        if name is None and not cls.reference and (form in left_out or "all" in left_out):
            refused.append((form, f"left out by {LEAVE_OUT}"))
            continue
        answer = cls.accepts(level, setting.device, setting.dtype)
        if not isinstance(answer, Refused):
            return Choice(form, cls, answer.words, tuple(refused))
        if not answer.other_kind or name is not None:
            refused.append((form, answer.words))
    if name is not None:
        why = refused[0][1] if refused else "it is for " + ", ".join(cls.__name__ for cls in known[name].levels)
        raise ValueError(f"form={name!r} is not allowed for {level.label}: {why}")
    raise ValueError(f"no form runs {level.label} on tokens: " + "; ".join(f"{form}: {why}" for form, why in refused))


def make_form(level: Level, setting: FormSetting, name: str | None = None) -> TokenForm:
    """Make the form that `choose_form` chooses. That a level runs by the reference machine is logged once."""
    refuse_schedules(level)
    choice = choose_form(level, setting, name)
    form = choice.form(level, setting)
    form.choice = choice
    if choice.name == "reference" and not setting.reference:
        _log_slow(repr(level), "; ".join(why for _, why in choice.refused) or "no form is registered for it")
    return form


@functools.cache
def _log_slow(description: str, why: str) -> None:
    logger.info("%s runs on tokens by the reference machine, which is slow: %s", description, why)


def scan(
    level: Level,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    gates: Mapping[str, Tensor] | None = None,
    state: State | None = None,
    learned: Mapping[str, Tensor] | None = None,
    live: Tensor | None = None,
    learn: bool = True,
) -> tuple[Tensor, State]:
    """Run `level` by the reference machine, token by token, or chunk by chunk where it has chunks.

    Args:
        level: any level; its gates that are not in `gates` take their initial value.
        q, k: `[B, T, H, D_k]`.
        v: `[B, T, H, D_v]`.
        gates: values of the level's gates by dotted path, `[B, T, H]` each; of `Channels`, `[B, T, H, D_k]`.
        state: from a former call, to go on from there; None starts anew (from `learned`).
        learned: the start a layer learned, `[H, ...]` by name (`Level.learned_start`).
        live: `[B, T, H]`, which tokens are written; None is all. The others take their place in a chunk, and leave
            everything else as it was, but that a memory that grows takes them in with the rest.
        learn: False reads only (`nestopt.core.recall`), and gives `state` back; k and v are then not looked at.

    Returns:
        y `[B, T, H, D_v]` and the state. Differentiable throughout; every sequence and head has its own memory.
    """
    form = make_form(level, FormSetting(v.device, v.dtype, reference=True))
    tokens = TokenBatch.of(q, k, v, widen=False)
    if live is not None:
        tokens = dataclasses.replace(tokens, active=tokens.active & live.transpose(1, 2))
    if state is None:
        state = form.init(q.shape[0], q.shape[2], q.shape[-1], v.shape[-1], v, learned or {})
    given = {**per_head(form.gates, tokens.v), **{path: gate.transpose(1, 2) for path, gate in (gates or {}).items()}}
    if not learn:
        return tokens.answer(form.read(tokens, given, state)), state
    y, state = form.forward(tokens, given, state)
    return tokens.answer(y), state
