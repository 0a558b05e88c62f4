"""A language model: blocks of a mixer, which is any level on tokens, and a continuum of MLPs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestopt.core.level import Level
from nestopt.core.tree import State
from nestopt.levels.cms import Cms
from nestopt.levels.tokens import Attention
from nestopt.nn.cms import CMS
from nestopt.nn.sequence_memory import SequenceMemory
from nestopt.nn.state import fitted, shapes_of


class HopeBlock(nn.Module):
    r"""A mixer, then a continuum of MLPs, which has its own norms and residuals (NL eq. 94-97).

    $x \leftarrow x + \mathrm{mixer}(\mathrm{norm}(x))$, then $x \leftarrow \mathrm{mlp}(x)$.
    """

    def __init__(self, dim: int, heads: int, mixer: Level, mlp: Cms, conv: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim)
        self.mixer = SequenceMemory(mixer, dim, heads, conv=conv)
        self.mlp = CMS(dim, mlp)

    def init_state(self, batch: int) -> State:
        return {"mixer": self.mixer.init_state(batch), "mlp": self.mlp.init_state(batch)}

    def forward(self, x: Tensor, state: Mapping[str, Any]) -> tuple[Tensor, State]:
        y, mixer = self.mixer(self.norm(x), state["mixer"])
        x, mlp = self.mlp(x + y, state["mlp"])
        return x, {"mixer": mixer, "mlp": mlp}


class HopeLM(nn.Module):
    """A language model over tokens 0 … vocab - 1: embedding, blocks, norm, and a head of its own weights.

    A Transformer, RetNet, DeltaNet or Titans, by the choice of `mixer`.

    Args:
        vocab: number of tokens. Default 256, bytes.
        dim: width.
        blocks: how many.
        heads: of each mixer; they divide `dim`.
        mixer: the level that mixes tokens. Default `attention`.
        mlp: the continuum of MLPs of each block. Default one MLP, on the fastest clock.
        conv: width of each mixer's causal convolution; 0 is none.

    Raises:
        ValueError: for a number that is out of range.
    """

    def __init__(
        self,
        vocab: int = 256,
        dim: int = 128,
        blocks: int = 3,
        heads: int = 4,
        mixer: Level | None = None,
        mlp: Cms | None = None,
        conv: int = 4,
    ) -> None:
        super().__init__()
        for name, value in (("vocab", vocab), ("dim", dim), ("blocks", blocks), ("heads", heads)):
            if value < 1:
                raise ValueError(f"HopeLM: {name}={value} is not allowed; give a whole number, 1 or more")
        mixer = Attention() if mixer is None else mixer
        mlp = Cms(periods=(1,)) if mlp is None else mlp
        self.vocab = vocab
        self.embedding = nn.Embedding(vocab, dim)
        self.blocks = nn.ModuleList(HopeBlock(dim, heads, mixer, mlp, conv) for _ in range(blocks))
        self.norm = nn.RMSNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self._shapes = shapes_of(self.init_state(1))

    def init_state(self, batch: int) -> State:
        """The state of `batch` sequences before their first token: nested dicts of tensors, `[batch, ...]` each."""
        return {f"block_{i}": block.init_state(batch) for i, block in enumerate(self._blocks())}

    def forward(self, tokens: Tensor, state: Mapping[str, Any] | None = None) -> tuple[Tensor, State]:
        """Tokens `[B, T]`, T >= 1, of any integer dtype, to logits `[B, T, vocab]` of the tokens after each.

        Args:
            tokens: 0 … vocab - 1.
            state: from a former call, to go on with its sequences; None begins new ones.

        Returns:
            The logits and the state after the last token.

        Raises:
            TypeError: for tokens that are not integers.
            ValueError: for another shape, no tokens, tokens out of range, or a state that does not fit.
        """
        self._check(tokens)
        batch = tokens.shape[0]
        before = self.init_state(batch) if state is None else fitted(state, self._shapes, batch, "HopeLM")
        x = self.embedding(tokens.long())
        new: State = {}
        for name, block in zip(before, self._blocks(), strict=True):
            x, new[name] = block(x, before[name])
        return self.head(self.norm(x)), new

    def _blocks(self) -> list[HopeBlock]:
        return list(self.blocks)  # type: ignore[arg-type]  # a ModuleList forgets of what it is

    def _check(self, tokens: Tensor) -> None:
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"HopeLM: tokens are {tokens.dtype}; they must be integers")
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise ValueError(
                f"HopeLM: tokens have the shape {list(tokens.shape)}; give [batch, tokens], one or more of each"
            )
        if torch.compiler.is_compiling():
            return  # a check of values would break the graph
        low, high = (int(end) for end in tokens.aminmax())
        if low < 0 or high >= self.vocab:
            raise ValueError(f"HopeLM: tokens from {low} to {high} are given; they must be from 0 to {self.vocab - 1}")

    @torch.no_grad()
    def generate(self, prompt: Tensor, length: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        """Go on with `prompt` for `length` tokens, one at a time, from the state.

        Args:
            prompt: `[B, n]` tokens, n >= 1.
            length: how many tokens to add, 0 or more.
            choose: from logits `[B, vocab]` the next tokens `[B]`, as `nestopt.train.sampling.choose` does.

        Returns:
            `[B, n + length]`, the prompt first.
        """
        if length < 0:
            raise ValueError(f"HopeLM: length={length} is not allowed; give a whole number, 0 or more")
        self._check(prompt)
        tokens, seen, state = [prompt.long()], prompt, None
        for _ in range(length):
            logits, state = self(seen, state)
            seen = choose(logits[:, -1])[:, None]
            tokens.append(seen)
        return torch.cat(tokens, dim=1)
