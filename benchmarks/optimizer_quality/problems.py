"""The problems: a model with a seed's initial weights, its batches, and its loss on what it does not train on.

To add one, write a function of a seed that returns a `Task`, and name it in `PROBLEMS`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestopt.train.data.text import standard_library, windows


@dataclasses.dataclass(frozen=True)
class Task:
    """A model to train.

    Attributes:
        loss: of the batch of a step, from 0.
        validation: mean loss on what settings are chosen by.
        test: mean loss on what is reported.
    """

    model: nn.Module
    loss: Callable[[int], Tensor]
    validation: Callable[[], Tensor]
    test: Callable[[], Tensor]


# -- pictures ----------------------------------------------------------------------------------------------------------


@functools.cache
def _digits() -> tuple[Tensor, Tensor]:
    """Scikit-learn's 1,797 digits `[n, 1, 8, 8]` in [0, 1], in an order drawn once, and their labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    pictures = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    return pictures[order], torch.from_numpy(data.target).long()[order]


def _on_digits(model: nn.Module, seed: int, batch: int = 128, held_out: int = 450) -> Task:
    pictures, labels = _digits()
    x, y = pictures[2 * held_out :], labels[2 * held_out :]
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[int, Tensor] = {}

    def loss(step: int) -> Tensor:
        chosen = drawn.setdefault(step, torch.randint(len(x), (batch,), generator=generator))
        return F.cross_entropy(model(x[chosen]), y[chosen])

    def of(part: slice) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(model(pictures[part]), labels[part])

    return Task(model, loss, of(slice(held_out)), of(slice(held_out, 2 * held_out)))


def digits(seed: int) -> Task:
    """An MLP of two hidden layers of 128."""
    layers = [nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)]
    return _on_digits(nn.Sequential(*layers), seed)


def cnn(seed: int) -> Task:
    """Two convolutions, one of them with a stride, and a linear layer."""
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
    return _on_digits(nn.Sequential(*body, nn.Flatten(), nn.Linear(512, 10)), seed)


class _Vit(nn.Module):
    """Patches of 2 by 2 as tokens, their mean to a linear layer."""

    def __init__(self, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(_Block(width, 4, causal=False) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).mT + self.places
        return self.head(self.norm(self.blocks(tokens)).mean(1))


def vit(seed: int) -> Task:
    """A vision transformer of two blocks of width 32."""
    return _on_digits(_Vit(), seed, batch=64)


# -- text --------------------------------------------------------------------------------------------------------------


class _Block(nn.Module):
    """A pre-norm block of a transformer, its projections apart."""

    def __init__(self, width: int, heads: int, *, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.k, self.v, self.o = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        seen = self.norm1(x)
        q, k, v = (layer(seen).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class _Gpt(nn.Module):
    """A transformer on bytes."""

    def __init__(self, width: int = 48, layers: int = 2, length: int = 64) -> None:
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(_Block(width, 4) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for table in (self.bytes, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


class _LinearRnn(nn.Module):
    """Two layers of h_t = a_t ⊙ h_{t-1} + (1 - a_t) ⊙ b_t, all of the token at t, with a gated read."""

    def __init__(self, width: int = 48, layers: int = 2) -> None:
        super().__init__()
        self.bytes, self.head = nn.Embedding(256, width), nn.Linear(width, 256, bias=False)
        self.ins = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.outs = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers + 1))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens)
        for into, out, norm in zip(self.ins, self.outs, self.norms, strict=False):
            forget, value, read = into(norm(x)).chunk(3, -1)
            # in closed form: h_t = Σ_s exp(A_t - A_s) (1 - a_s) b_s, A the running sum of log a
            log_keep = F.logsigmoid(forget + 2.0)
            total = log_keep.cumsum(1)
            weights = (total[:, :, None] - total[:, None]).masked_fill(_later(total.shape[1]), -torch.inf).exp()
            h = torch.einsum("btsd,bsd->btd", weights, -torch.expm1(log_keep) * value)
            x = x + out(h * F.silu(read))
        return self.head(self.norms[-1](x))


def _later(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)[None, :, :, None]


@functools.cache
def _text() -> tuple[Tensor, Tensor, Tensor]:
    """What is trained on, and two halves of what is held out."""
    corpus = standard_library()
    return torch.from_numpy(corpus.train), *torch.from_numpy(corpus.held_out).chunk(2)


def _on_text(model: nn.Module, seed: int, batch: int = 4, length: int = 64) -> Task:
    train, validation, test = _text()

    def loss(text: Tensor, step: int, seed: int, batch: int) -> Tensor:
        tokens = windows(text, step, batch=batch, length=length, seed=seed)
        return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())

    def of(part: Tensor) -> Callable[[], Tensor]:
        return lambda: loss(part, 0, 0, 64)  # the same windows for all seeds

    return Task(model, lambda step: loss(train, step, seed, batch), of(validation), of(test))


def gpt(seed: int) -> Task:
    """A transformer of two blocks of width 48 on the bytes of Python's standard library."""
    return _on_text(_Gpt(), seed)


def rnn(seed: int) -> Task:
    """A linear recurrence of two layers of width 48 on the same."""
    return _on_text(_LinearRnn(), seed, length=32)


# -- embeddings --------------------------------------------------------------------------------------------------------


class _Pairs(nn.Module):
    """The last pairs of bytes, hashed to the rows of a table that has most of the weights, and a small MLP."""

    def __init__(self, rows: int = 8192, width: int = 32) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        nn.init.normal_(self.table.weight, std=0.1)
        self.mlp = nn.Sequential(nn.Linear(3 * width, 128), nn.ReLU(), nn.Linear(128, 256))

    def forward(self, tokens: Tensor) -> Tensor:
        before = [F.pad(tokens, (shift, 0))[:, : tokens.shape[1]] for shift in range(4)]
        pairs = [(257 * a + b) % len(self.table.weight) for a, b in pairwise(before)]
        return self.mlp(torch.cat([self.table(pair) for pair in pairs], -1))


def embedding(seed: int) -> Task:
    """The next byte by a table of 8,192 pairs of bytes and a small MLP."""
    return _on_text(_Pairs(), seed)


ON_DIGITS = frozenset({"digits", "cnn", "vit"})
"""Those that need scikit-learn."""

PROBLEMS: dict[str, Callable[[int], Task]] = {
    "digits": digits,
    "cnn": cnn,
    "gpt": gpt,
    "rnn": rnn,
    "vit": vit,
    "embedding": embedding,
}
