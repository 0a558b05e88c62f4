"""The contract of a form: how a level runs on tokens.

A level says what is computed, for one token; a form computes it, for many. A level does not know which forms there are
for it, a form knows its levels. Packages bring forms by the hook `nestopt_register_token_forms`, for levels of their
own or for nestopt's; `nestopt.core.token_choice` asks them, and `nestopt.core.token_reference` takes all others.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.func import vmap

from nestopt.core.device import number_like
from nestopt.core.gates import bind, gates_of, idle_gate
from nestopt.core.level import Level
from nestopt.core.part import Gate, Number
from nestopt.core.pending import COUNT, PENDING, RowChunks
from nestopt.core.recall import recalled
from nestopt.core.token_batch import TokenBatch
from nestopt.core.token_state import Rows, cat, index, reset_rows
from nestopt.core.tree import State, leaves, nested, tree_map


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A form takes a level as it is configured; `words` say what runs, as `describe` prints it."""

    words: str


@dataclasses.dataclass(frozen=True)
class Refused:
    """A form does not take a level as it is configured; `words` say why, as `describe` prints it.

    With `other_kind` it is for levels of another kind altogether, which is not worth saying unless it is asked for.
    """

    words: str
    other_kind: bool = False


@dataclasses.dataclass(frozen=True)
class FormSetting:
    """Where a form is to run, and how.

    Attributes:
        device: of the tokens.
        dtype: in which memories are: float32 or float64.
        checkpoint: of deep memories: recompute in the backward pass all but every so many chunks' weights; 0 keeps all.
        reference: whether only forms of the reference machine are asked.
        sharing: how many heads share a key and a value, where they do (`TokenForm.shares`).
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    checkpoint: int = 0
    reference: bool = False
    sharing: int = 1


@dataclasses.dataclass(frozen=True)
class Choice:
    """The form that runs a level.

    Attributes:
        name: of the form, as registered.
        form: its class.
        words: what it does.
        refused: the forms for levels of its kind that were asked before it: their names, and why each does not run.
    """

    name: str
    form: type[TokenForm]
    words: str
    refused: tuple[tuple[str, str], ...]

    def lines(self, level: Level) -> list[str]:
        """Say it in lines, for `level`."""
        chosen = f"{level.label} runs on tokens as {self.name}: {self.words}"
        return [chosen, *(f"  not as {name}: {why}" for name, why in self.refused)]


class TokenForm(ABC):
    """Run a level on tokens. A layer makes its form once.

    Write `accepts` and `forward`, and `levels`, those that it is asked about (and their subclasses). The state is
    nested dicts of tensors `[B, H, ..]`, in a layout of the form's own choice: what `forward` takes is what a
    checkpoint holds. By default it is that of the reference machine, so that a stream may go from one to the other:
    `"step"` `[B, H]` counts the tokens written, `"level"` is the memory, and a level with chunks has the tokens of one
    that is not over in `"pending"`.

    Args:
        level: accepted by `accepts`.
        setting: where it is to run.

    Attributes:
        gates: those of the level, by dotted path.
        chunk: how many tokens are learned together.
        choice: why it is this form that runs the level.
    """

    levels: ClassVar[tuple[type[Level], ...]] = ()
    priority: ClassVar[int] = 0
    """Of the forms that accept a level the one with the highest runs; built-in ones have 0, the reference -100."""
    reference: ClassVar[bool] = False
    """Whether it belongs to the reference machine."""
    widens: ClassVar[bool] = True
    """Whether tokens narrower than float32 are shown in float32."""
    shares: ClassVar[bool] = False
    """Whether heads may share keys and values: k, v and the state then have fewer heads than q and the gates."""
    piece: int = 64
    """Of how many tokens, or a multiple, a layer may make pieces of a long sequence; 0 is none."""

    choice: Choice

    def __init__(self, level: Level, setting: FormSetting) -> None:
        self.level, self.setting = level, setting
        self.gates, self._bound = gates_of(level), bind(level)
        self.chunk = level.chunk_size

    @classmethod
    @abstractmethod
    def accepts(cls, level: Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        """Return whether it runs `level` as configured, with memories of this dtype on this device; in words."""

    @property
    def takes_padding(self) -> bool:
        """Whether a memory can leave out padding, and forget some sequences of a batch."""
        return True

    def refuse_padding(self, what: str) -> None:
        """Raise ValueError, which begins with `what`, if the memory can't leave out padding."""
        if not self.takes_padding:
            raise ValueError(
                f"{what} for {self.level.label} with read={getattr(self.level, 'read', None)!r}, whose memory would "
                'keep padding; give read="after", or run sequences of one length together'
            )

    def init(
        self, batch: int, heads: int, dim_k: int, dim_v: int, like: Tensor, learned: Mapping[str, Tensor]
    ) -> State:
        """Return the state of `batch` sequences before their first token, on the device and in the dtype of `like`.

        `learned` is the start that a layer has learned, `[H, ..]` each (`Level.learned_start`); empty where it has not.
        By default the state is as the reference machine has it, its leaves `[B, H, ..]`. `"step"` counts the tokens
        seen. Of a level with a `chunk_size` above 1, `"level"` is the state at the start of a chunk that is not over,
        and `"pending"` has its tokens so far: k, v, which of them are live, and the gates by path, `[B, H, n, ..]`, and
        their `"count"` `[B]` where rows differ in it; a level that `owns_partial_chunk` has them in a way of its own.
        """

        def one(learned: State) -> State:
            return self._bound.init_tokens(dim_k, dim_v, like, learned)

        if learned:
            state = vmap(one, randomness="different")(dict(learned))  # a rule may start at random
        else:
            first = one({})
            state = tree_map(lambda leaf: leaf.expand(heads, *leaf.shape), first)
        state = tree_map(lambda leaf: leaf.expand(batch, *leaf.shape), state)
        whole: State = {"step": torch.zeros(batch, heads, dtype=torch.int64, device=like.device), "level": state}
        if self._bound.chunk_size > 1 and not self._bound.owns_partial_chunk:
            none = (batch, heads, 0)
            whole[PENDING] = {
                "k": like.new_zeros(*none, dim_k),
                "v": like.new_zeros(*none, dim_v),
                "live": torch.zeros(none, dtype=torch.bool, device=like.device),
                "gates": nested({path: like.new_zeros(none) for path in self.gates}),
            }
        return whole

    def run(
        self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State, *, step: bool = False
    ) -> tuple[Tensor, State]:
        """Answer tokens, and learn them, as layers do: by `forward`, or with one token each and `step` by that.

        Where rows are at places of their own in a chunk, or have padding, `forward` is shown each row's pending tokens
        again with those of the call, so laid out that the chunks of all rows begin together
        (`nestopt.core.pending.RowChunks`). A form with a layout of its own sees to that itself: it gets `tokens.mask`.
        """
        pending, rows = state.get(PENDING, {}), None
        if pending and (tokens.mask is not None or COUNT in pending):
            rows = RowChunks.of(pending, tokens.mask, tokens.k, self.chunk)
        if rows is None:
            return (self.step if step else self.forward)(tokens, gates, state)
        fresh = {"k": tokens.k, "v": tokens.v, "live": tokens.active, "gates": nested(self.every_gate(tokens, gates))}
        held = rows.joined(pending, fresh)
        q, live = rows.joined(None, {"q": tokens.q})["q"], held["live"]
        shown = dataclasses.replace(tokens, q=q, k=held["k"], v=held["v"], active=live, finite=live, mask=None)
        begun = {
            **state,
            "step": state["step"] - pending["live"].sum(2),
            PENDING: tree_map(lambda x: x[:, :, :0], {name: pending[name] for name in fresh}),
        }
        y, new = self.forward(shown, dict(leaves(held["gates"])), begun)
        return rows.back(y), {**new, PENDING: rows.kept(new[PENDING])}

    @abstractmethod
    def forward(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        """Answer tokens, and learn them: y `[B, H, T, D_v]` and the state after the last.

        `gates` are values of gates of the level by dotted path, `[B, H, T]` each (`Channels` `[B, H, T, D_k]`), and any
        number where a token is not active; one that is missing is at its initial value. Where the state has pending
        tokens, `run` has seen to it that all rows have as many and there is no padding. Nothing is changed in place.
        """

    def step(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> tuple[Tensor, State]:
        """Do as `forward` with one token of each sequence, T = 1: the place for what is faster then.

        Where a token is not active, gates are at their initial value.
        """
        return self.forward(tokens, gates, state)

    def read(self, tokens: TokenBatch, gates: Mapping[str, Tensor], state: State) -> Tensor:
        """Answer tokens, and learn nothing: `[B, H, T, D_v]`, each as if it came next."""
        return recalled(self.level, tokens, gates, state)

    def pending(self, state: State) -> int:
        """Return how many tokens of a chunk that is not over the state has: the most of any row, or more."""
        return state[PENDING]["live"].shape[2] if PENDING in state else 0

    @property
    def has_constants(self) -> bool:
        """Whether the state has parts that no token changes, whose start is learned (`Level.constant_keys`)."""
        return bool(self.level.constant_keys)

    def with_learned(self, state: State, learned: Mapping[str, Tensor]) -> State:
        """Put the learned start `[H, ..]`, as it is by now, where no token changes it; asked if `has_constants`."""
        batch = state["step"].shape[0]
        keys = self.level.constant_keys
        constants = {name: x.expand(batch, *x.shape) for name, x in learned.items() if name.split(".")[0] in keys}
        return {**state, "level": {**state["level"], **nested(constants)}}

    # -- rows of the batch -----------------------------------------------------------------------------------------

    def index(self, state: State, rows: Rows) -> State:
        """Choose sequences of the batch: see `nestopt.nn.index`."""
        return index(state, rows)

    def cat(self, states: Sequence[State]) -> State:
        """Make one batch of several: see `nestopt.nn.cat`."""
        return cat(states)

    def reset(self, state: State, begun: State, rows: Tensor) -> State:
        """Begin sequences anew: `rows` `[B]` (bool) of the tensors are those of `begun`, which `init` made."""
        return reset_rows(state, begun, rows)

    # -- for forms -------------------------------------------------------------------------------------------------

    def number(self, value: Number, path: str, gates: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return a number of the level at these tokens: its gate's values `[B, H, T]`, or the constant `[1, 1, 1]`."""
        if isinstance(value, Gate) and path in gates:
            return gates[path]
        return number_like(value, like).view(1, 1, 1)

    def every_gate(self, tokens: TokenBatch, gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return every gate `[B, H, T]` by dotted path, at its initial value where none is given or no token active."""
        return {
            path: tokens.gate(gates[path], gate.init) if path in gates else idle_gate(gate, tokens.k)
            for path, gate in self.gates.items()
        }

    def explain(self, indent: str = "") -> list[str]:
        """Say in lines which form runs the level, and why none of a higher priority."""
        return [indent + line for line in self.choice.lines(self.level)]
