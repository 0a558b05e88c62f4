"""A language model: blocks of a mixer, which is any level on tokens, and a continuum of MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from torch import Tensor, nn

from nestopt.core.device import blindly
from nestopt.core.level import Level
from nestopt.core.precision import Precision, check_precision, check_products
from nestopt.core.token_batch import check_mask
from nestopt.core.token_state import Rows as Chosen
from nestopt.core.token_state import as_mask, fitted, numbers, reset_rows, shapes_of
from nestopt.core.tree import State, leaves
from nestopt.levels.continuum.level import Cms
from nestopt.levels.presets import Attention
from nestopt.models import hope_reading, next_token
from nestopt.models.continuation import go_on
from nestopt.models.documents import Pieces, run_documents
from nestopt.models.exact_signal import nothing_open
from nestopt.models.loss_signal import TAUGHT, Read, nothing_carried
from nestopt.models.segments import in_segments
from nestopt.models.sleep import asleep
from nestopt.nn.consolidate import Consolidation, check_into
from nestopt.nn.hope import HopeBlock, Learn, to_the_last, writes
from nestopt.nn.rows import Rows


class HopeLM(nn.Module):
    """A language model over tokens 0 … vocab - 1: embedding, blocks, norm, and a head.

    A Transformer, RetNet, DeltaNet, Titans or Hope, by the choice of `mixer` and `mlp`. What it has read is in the
    state that goes in and comes out: nested dicts of tensors, `[batch, ...]` each, one memory per sequence
    (`nestopt.nn` has what is done with them: `detach`, `clone`, `to`, `index`, `cat`).

    Args:
        vocab: number of tokens. Default 256, bytes.
        dim: width.
        blocks: how many.
        heads: of each mixer; they divide `dim`.
        mixer: the level that mixes tokens. Default `attention`.
        mlp: the continuum of MLPs of each block. Default one MLP, on the fastest clock. With `learn="context"` it
            learns while the model reads; with `teach="loss"`, from the model's own next-token loss.
        mixers: one for each block, from the first on, again and again, in place of `mixer`.
        mlps: one for each block, in place of `mlp`; of fewer than there are blocks the last has the last, and the first
            comes again and again: of `[cms(), cms((32,), learn="context")]` the last block's learns.
        conv: width of each mixer's causal convolution; 0 is none.
        gate_output: whether each mixer's read is multiplied by silu(W_g h).
        out_norm: whether each head's read is normalised, and so has no size to count by; None: for all but attention.
        tie: whether the head's weights are the embedding's.
        segment: in training, recompute in the backward pass all but the states at the ends of so many tokens; 0 keeps
            everything. Activations of T tokens need the memory of T / segment states and one segment: least near √T.
        precision: of the products of all memories, and of the signal by which the model's loss teaches them, as of a
            `SequenceMemory`: `"float32"`, `"tf32"` or `"bfloat16"`. Set as an attribute, it is set of all blocks.
        kv_heads: keys and values of each mixer, which its heads share (`SequenceMemory`); 0 is as many as heads.

    Attributes:
        lockstep: whether, with `starts`, blocks are called as often whatever the documents are, some for nothing. It
            must be so where processes gather sharded parameters at each call (FSDP, ZeRO 3). All rows then begin anew,
            and the state that comes back is empty. Default False.

    Raises:
        ValueError: for a number that is out of range, or a `precision` of another name; as the model is called, for one
            that the device lacks.
    """

    lockstep: bool = False

    def __init__(
        self,
        vocab: int = 256,
        dim: int = 128,
        blocks: int = 3,
        heads: int = 4,
        mixer: Level | None = None,
        mixers: Sequence[Level] = (),
        mlp: Cms | None = None,
        mlps: Sequence[Cms] = (),
        conv: int = 4,
        gate_output: bool = False,
        out_norm: bool | None = None,
        tie: bool = False,
        segment: int = 0,
        precision: Precision = "float32",
        kv_heads: int = 0,
    ) -> None:
        super().__init__()
        least = {"vocab": vocab, "dim": dim, "blocks": blocks, "heads": heads, "segment": segment + 1}
        for name, value in least.items():
            if value < 1:
                given, low = (segment, 0) if name == "segment" else (value, 1)
                raise ValueError(f"HopeLM: {name}={given} is not allowed; give a whole number, {low} or more")
        self.vocab, self.segment = vocab, segment
        self.embedding = nn.Embedding(vocab, dim)
        levels = zip(cycle(mixers or [mixer or Attention()]), to_the_last(mlps or [mlp], blocks))
        options: dict[str, Any] = {"conv": conv, "gate_output": gate_output, "out_norm": out_norm}
        self.blocks = nn.ModuleList(
            HopeBlock(dim, heads, *pair, kv_heads=kv_heads or None, **options) for pair in levels
        )
        self.precision = precision
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        if tie:
            self.head.weight = self.embedding.weight
        self._shapes = shapes_of(self.init_state(1))

    @property
    def precision(self) -> Precision:
        return self._precision

    @precision.setter
    def precision(self, precision: Precision) -> None:
        check_precision(precision, "HopeLM")
        self._precision: Precision = precision
        for block in self._blocks():
            block.mixer.precision = block.mlp.precision = precision

    # -- states --------------------------------------------------------------------------------------------------------

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token: nested dicts of tensors, `[batch, ...]` each."""
        state: State = {f"block_{i}": block.init_state(batch) for i, block in enumerate(self._blocks())}
        if exact := hope_reading.exact(self):
            state[TAUGHT] = nothing_open(exact.width, batch, exact.mixers(state), self.embedding.weight.device)
        elif self._taught:
            dim = self.embedding.embedding_dim
            state[TAUGHT] = nothing_carried(len(self.blocks), batch, dim, self.embedding.weight)
        return state

    def reset(self, state: Mapping[str, Any], rows: Chosen) -> State:
        """Return `state` with the sequences `rows` begun anew, at the learned start, and all others as they are.

        Args:
            state: of this model.
            rows: their numbers (a list or an integer tensor), or a bool for each sequence of the batch.

        Raises:
            ValueError: for rows that the batch has not, or a state of another model.
        """
        first = next(leaf for _, leaf in leaves(state))
        batch = first.shape[0]
        now = fitted(state, self._shapes, batch, "HopeLM.reset")
        anew = as_mask(numbers(rows, batch, first.device, "HopeLM.reset"), batch)
        carried = now.pop(TAUGHT, None)
        start = self.init_state(batch)
        new = {name: reset_rows(part, start[name], anew) for name, part in now.items()}
        if carried is not None and hope_reading.exact(self):
            new[TAUGHT] = reset_rows(carried, start[TAUGHT], anew)
        elif carried is not None:
            new[TAUGHT] = {**carried, "live": carried["live"] & ~anew[:, None]}
        return new

    # -- tokens --------------------------------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        learn: Learn = True,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Read tokens `[B, T]`, T >= 1, of any integer dtype: logits `[B, T, vocab]` of the tokens after each.

        Args:
            tokens: 0 … vocab - 1; or embeddings `[B, T, dim]`: of tokens, where a continuum is to learn from next ones.
            state: from a former call, to go on with its sequences; None begins new ones.
            mask: `[B, T]`, True for tokens, False for padding, wherever it is: a row's tokens are read as if they were
                neighbours. Logits at padding mean nothing.
            starts: `[B, T]` bool, True where a document begins: there its row is begun anew, and each document is what
                it is alone. A row whose first token begins none goes on from `state`. Best on the CPU, as on another
                device it is waited for.
            learn: whether memories are written: True; False, all are read as the state has them, and none changes;
                `"mixer"` or `"mlp"`, only those of that half of each block.
            targets: as for `loss`; a continuum that learns from the loss is told those of a position once it is read.

        Returns:
            The logits and the state after the last token; with `starts`, of each row's last document.

        Raises:
            TypeError: for tokens that are not integers.
            ValueError: for another shape, no tokens, tokens out of range (on the CPU; elsewhere the device stops), or a
                state that does not fit.
        """
        hidden, state = self.hidden(tokens, state, mask=mask, starts=starts, learn=learn, targets=targets)
        return self._logits(hidden), state

    def hidden(
        self,
        tokens: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        learn: Learn = True,
        targets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """The residual stream after the last block, `[B, T, dim]`, and the state: `forward` but for norm and head."""
        next_token.check_tokens(tokens, "HopeLM", self.embedding.embedding_dim)
        check_products(self.precision, self.embedding.weight.device, self.embedding.weight.dtype, "HopeLM")
        batch = tokens.shape[0]
        now = None if state is None else fitted(state, self._shapes, batch, "HopeLM")
        if mask is not None:
            check_mask(mask, *tokens.shape[:2])
        taught = self._taught and writes(learn, "mlp")
        if taught and tokens.ndim == 3:
            tokens = next_token.numbered(tokens, mask, self.embedding, "HopeLM")
        if targets is not None:
            if taught and hope_reading.exact(self):
                raise ValueError(
                    "HopeLM: targets are given, and signal='exact' is of next tokens; give signal='residual'"
                )
            targets = next_token.checked_targets(targets, tokens, self.vocab, starts if taught else None)
        if starts is not None:
            next_token.check_starts(starts, tokens, "HopeLM")
            if self.lockstep and now is not None:
                raise ValueError("HopeLM: a state and starts are given, and lockstep is set; give no state")
            pieces = Pieces.of(starts, mask, goes_on=now is not None)
            if self.lockstep or not pieces.in_rows(batch):
                run = partial(self._sequences, learn=learn)
                return run_documents(tokens, pieces, now, run, self.init_state, self.lockstep)
            now = now if pieces.goes_on.all() else None
        rows = None if mask is None else Rows.of(mask)
        if rows is not None:
            tokens = rows.moved(tokens) if tokens.ndim == 3 else rows.moved(tokens[..., None])[..., 0]
            mask = rows.front
            targets = None if targets is None else rows.moved(targets.view(*mask.shape, -1)).view_as(targets)
        x, now = self._sequences(tokens, now, mask, learn, targets)
        return (x if rows is None else rows.back(x)), now

    def loss(
        self,
        tokens: Tensor,
        state: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
        learn: Learn = True,
        piece: int = 1024,
        reduction: Literal["mean", "sum"] = "mean",
        targets: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Return the mean loss, in nats, of all tokens of `[B, T + 1]` but the first, and the state after the first T.

        Logits are made, and in the backward pass made again, for `piece` positions of all sequences at a time: those
        of the whole sequence never exist.

        Args:
            tokens, state, learn: as for `forward`; one token more than is read, or `[B, T]` with `targets`.
            mask: `[B, T + 1]`; where a token or the one before it is padding, nothing is counted.
            starts: `[B, T + 1]`, as for `forward`; the first token of a document is not counted.
            piece: positions at a time, 1 or more.
            reduction: `"sum"` for the sum of the losses that are counted: of batches that count differently many, these
                sums add up to that of one batch, and means do not.
            targets: in the place of next tokens: classes `[B, T]`, or `[B, T, vocab]`, 1 for each that is right and 0
                for the others, whose losses (of a yes or no to each) are summed; -100 and padding are not counted.
        """
        tokens, mask, starts, count = next_token.asked(tokens, mask, starts, targets, piece, reduction)
        hidden, state = self.hidden(tokens, state, mask=mask, starts=starts, learn=learn, targets=targets)
        total = next_token.summed_loss(self._logits, hidden, count, piece)
        return (total if reduction == "sum" else total / next_token.counted(count).sum().clamp_min(1)), state

    # -- how -----------------------------------------------------------------------------------------------------------

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.head(self.norm(hidden))

    def _sequences(
        self, tokens: Tensor, state: State | None, mask: Tensor | None, learn: Learn, targets: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Read tokens at the front of their rows, from a state of this model, or None for new sequences.

        Where `segment` says so, each segment is run again in the backward pass.
        """
        read, length = Read([0], False, targets), tokens.shape[1]
        if state is None:
            state = self.init_state(tokens.shape[0])
        elif self._taught and not hope_reading.exact(self):
            i = next(i for i, block in enumerate(self._blocks()) if block.mlp.taught)
            read = Read.of(state[f"block_{i}"]["mlp"]["step"], state[TAUGHT], targets)
        if not self.segment or not torch.is_grad_enabled() or length <= self.segment:
            return self._run(tokens, state, mask, learn, read)

        def run(state: State, part: slice) -> tuple[Tensor, State]:
            masked = None if mask is None else mask[:, part]
            carried = read.carried if part.start == 0 else mask is None
            told = None if targets is None else targets[:, part]
            own = Read([phase + part.start for phase in read.phases], carried, told)
            return self._run(tokens[:, part], state, masked, learn, own, length - part.stop)

        return in_segments(run, state, length, self.segment)

    def _run(
        self, tokens: Tensor, state: State, mask: Tensor | None, learn: Learn, read: Read, ahead: int = 0
    ) -> tuple[Tensor, State]:
        with blindly() if self.lockstep else nullcontext():
            return self._read_on(tokens, state, mask, learn, read, ahead)

    def _read_on(
        self, tokens: Tensor, state: State, mask: Tensor | None, learn: Learn, read: Read, ahead: int
    ) -> tuple[Tensor, State]:
        if self._taught and writes(learn, "mlp"):
            if exact := hope_reading.exact(self, learn):
                if self.lockstep:
                    raise ValueError(
                        'HopeLM: signal="exact" takes a backward pass within the forward one, and lockstep is set, so '
                        'that weights may be cut up; give the cms signal="residual"'
                    )
                return exact.run(tokens, state, mask, ahead)
            return hope_reading.residual(self, tokens, state, mask, learn, read, ahead)
        # what is not written is not waited for
        carried = {TAUGHT: state[TAUGHT]} if self._taught else {}
        own = {key: part for key, part in state.items() if key != TAUGHT}
        x, _, new = hope_reading.through(self, tokens, own, mask, learn)
        return x, {**new, **carried}

    @property
    def _taught(self) -> bool:
        return any(block.mlp.taught for block in self._blocks())

    def _blocks(self) -> Sequence[HopeBlock]:
        return hope_reading.blocks_of(self)

    def fitted(self, state: Mapping[str, Any]) -> State:
        """Return `state`, such as one from a file, in which dicts without tensors may be missing.

        Raises:
            ValueError: if it is that of another model; says which tensor.
        """
        first = next((leaf for _, leaf in leaves(state)), None)
        return fitted(state, self._shapes, 1 if first is None else first.shape[0], "HopeLM")

    def consolidate(
        self,
        state: Mapping[str, Any],
        tokens: Tensor,
        *,
        into: Literal["state", "parameters"] = "state",
        steps: int = 200,
        lr: float = 0.003,
    ) -> tuple[State, dict[str, Consolidation]]:
        """Put the model to sleep: what its faster levels have learned goes to the slower ones (`nn.consolidate`).

        Args:
            state: of this model.
            tokens: `[B, T]` that each sequence goes through once more, to have its continua's inputs; nothing is
                written meanwhile.
            into: `"parameters"` also moves what the slowest levels have learned, the mean over sequences, to where all
                sequences start, and puts the slowest levels back there: the model has then changed, in place, and the
                state can be thrown away.
            steps, lr: of `nn.consolidate`.

        Returns:
            The state afterwards, and what was lost, by block. Of a continuum with one level nothing is to be moved
            between levels, and with `into="parameters"` its own goes.

        Raises:
            ValueError: if no continuum learns in context, or with `into="state"` none has two levels.
        """
        check_into(into)
        next_token.check_tokens(tokens, "HopeLM")
        now = fitted(state, self._shapes, tokens.shape[0], "HopeLM.consolidate")
        return asleep(self, now, self.init_state(len(tokens)), tokens, into=into, steps=steps, lr=lr)

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        length: int,
        choose: Callable[[Tensor], Tensor],
        state: Mapping[str, Any] | None = None,
        *,
        learn: Learn = True,
    ) -> tuple[Tensor, State | None]:
        """Go on with `prompt` for `length` tokens, one at a time, from the state.

        Args:
            prompt: `[B, n]` tokens, n >= 1.
            length: how many tokens to add, 0 or more.
            choose: from logits `[B, vocab]` the next tokens `[B]`, as `nestopt.train.sampling.choose` does. After a
                -1 (no token could be drawn) what follows in that row means nothing.
            state: what was read before the prompt; None is nothing.
            learn: as for `forward`.

        Returns:
            `[B, n + length]`, the prompt first; and the state after all but the last of them, which is not read yet
            (with `length` 0 nothing is read, and `state` comes back).
        """
        next_token.check_tokens(prompt, "HopeLM")
        tokens, end = go_on(partial(self, learn=learn), prompt, length, choose, state)
        return tokens, None if end is None else dict(end)
