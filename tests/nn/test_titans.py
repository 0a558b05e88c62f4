"""Titans beside attention (MAC, MAG, MAL): against a loop over tokens, in pieces, padded, in models and in YAML."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core.part import FieldError
from nestopt.core.tree import leaves
from nestopt.levels import attention, deltanet, mac, mag, mal, titans
from nestopt.models import HopeLM
from nestopt.nn import SequenceMemory, TitansMixer, cat, index

F64 = torch.float64
SIZE, PERSISTENT, LENGTH, DIM, HEADS = 4, 3, 10, 8, 2
BLOCKS = {
    "mac": mac(titans(chunk=3), SIZE, PERSISTENT),
    "mag": mag(titans(chunk=4), SIZE, PERSISTENT),
    "mal": mal(deltanet(), SIZE, PERSISTENT),
    "mac of one token": mac(titans(chunk=1), 1, PERSISTENT),
}
each = pytest.mark.parametrize("name", BLOCKS)


def make(name: str, **options: object) -> TitansMixer:
    torch.manual_seed(0)
    module = nestopt.layer(BLOCKS[name], DIM, HEADS, **options).double()
    assert isinstance(module, TitansMixer)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return module


# -- a loop over tokens of one sequence --------------------------------------------------------------------------------


def turned(x: Tensor, position: int) -> Tensor:
    """x `[D]`, each pair of entries as a complex number times e^{i·position·1000^{-2j/D}}."""
    half = len(x) // 2
    pairs = torch.complex(x[:half], x[half:])
    angle = torch.tensor([position * 1000.0 ** (-j / half) for j in range(half)], dtype=F64)
    found = pairs * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([found.real, found.imag])


def attend(module: TitansMixer, x: Tensor, position: int, seen: list[tuple[Tensor, int]]) -> Tensor:
    """Attend from x `[dim]` at a position to the persistent tokens, and to tokens with their positions."""
    own, size, out = module.attention, DIM // HEADS, []
    for h in range(HEADS):
        wq, wk, wv = (part.weight[h * size : (h + 1) * size] for part in (own.query, own.key, own.value))
        q = wq @ x
        scores = [q @ (wk @ p) for p in own.persistent]
        scores += [turned(q, position) @ turned(wk @ token, at) for token, at in seen]
        values = [wv @ token for token in [*own.persistent, *(token for token, _ in seen)]]
        shares = torch.softmax(torch.stack(scores) / math.sqrt(size), 0)
        out.append(sum(share * value for share, value in zip(shares, values, strict=True)))
    return own.out.weight @ torch.cat(out)


def times(module: TitansMixer, y: Tensor, read: Tensor) -> Tensor:
    unit = [
        x / (x.square().mean() + 1e-5).sqrt() * norm.weight for x, norm in zip((y, read), module.norms, strict=True)
    ]
    return unit[0] * torch.sigmoid(unit[1])


def loop(module: TitansMixer, x: Tensor) -> Tensor:
    """`[T, dim]` to `[T, dim]`, a token at a time, by sections 4.1 to 4.3."""
    block, size = module.block, module.block.size
    memory = SequenceMemory(block.memory, DIM, HEADS, conv=0, form="reference").double()
    memory._modules.update(module.memory._modules)  # with the same weights
    state, ys = memory.init_state(1), []
    if module.conv is not None:
        seen = torch.cat([torch.zeros(3, DIM, dtype=F64), x])
        x = x + torch.stack([(seen[t : t + 4] * module.conv.weight[:, 0].T).sum(0) for t in range(len(x))])
    history: list[Tensor] = []
    for t, token in enumerate(x):
        if block.way == "mac":
            if t % size == 0:
                begun, history = state, []
            history += [token]
            place = t % size
            known = [memory(one[None, None], begun, learn=False)[0][0, 0] for one in history]
            y = attend(module, token, place, [(one, i) for part in (known, history) for i, one in enumerate(part)])
            read, state = memory(y[None, None], state)
            ys.append(times(module, y, read[0, 0]))
            continue
        read, state = memory(token[None, None], state)
        history += [token if block.way == "mag" else read[0, 0]]
        window = list(enumerate(history))[-size:]
        y = attend(module, history[-1], t, [(one, i) for i, one in window])
        ys.append(times(module, y, read[0, 0]) if block.way == "mag" else y)
    return torch.stack(ys)


@each
def test_it_is_a_loop_over_tokens(name: str) -> None:
    module = make(name, conv=0 if name == "mag" else 4)
    x = torch.randn(1, LENGTH, DIM, dtype=F64, requires_grad=True)
    y, _ = module(x)
    want = torch.stack([loop(module, one) for one in x])
    torch.testing.assert_close(y, want, rtol=0, atol=1e-10)
    weighed = torch.cos(torch.arange(y.numel(), dtype=F64)).view_as(y)
    wanted = [x, *module.parameters()]
    found = [torch.autograd.grad((out * weighed).sum(), wanted, retain_graph=True) for out in (y, want)]
    for (path, _), got, right in zip([("x", x), *module.named_parameters()], *found, strict=True):
        assert right.any(), path
        torch.testing.assert_close(got, right, rtol=1e-8, atol=1e-10, msg=lambda m, path=path: f"{path}: {m}")


@each
def test_in_pieces_and_token_by_token(name: str) -> None:
    module = make(name)
    x = torch.randn(2, LENGTH, DIM, dtype=F64)
    whole, end = module(x)
    for cut in ([3, 1, 6], [1] * LENGTH):
        state, ys = None, []
        for piece in x.split(cut, dim=1):
            y, state = module.step(piece[:, 0], state) if piece.shape[1] == 1 else module(piece, state)
            ys.append(y.view(2, -1, DIM))
        torch.testing.assert_close(torch.cat(ys, 1), whole, rtol=0, atol=1e-10)
        torch.testing.assert_close(dict(leaves(state)), dict(leaves(end)), rtol=0, atol=1e-10)


@each
def test_rows_are_what_they_are_alone(name: str) -> None:
    """Padding left, right and in holes, twice; then chosen, put together, reset, and gone on with."""
    module = make(name)
    rows = [torch.randn(n, DIM, dtype=F64) for n in (16, 11, 3)]
    alone = [module(row[None])[0][0] for row in rows]
    state, found = None, [[] for _ in rows]
    for cut in (slice(0, 2), slice(2, None)):
        parts = [row[cut] for row in rows]
        length = max(map(len, parts)) + 1
        spots = [torch.arange(length) >= length - len(parts[0]), torch.arange(length) < len(parts[1])]
        spots.append(torch.arange(length).flip(0) % 2 == 0)
        spots[2] &= spots[2].cumsum(0) <= len(parts[2])
        mask = torch.stack(spots)
        x = torch.full((3, length, DIM), torch.nan, dtype=F64).masked_scatter(mask[..., None], torch.cat(parts))
        y, state = module(x, state, mask=mask)
        assert not y[~mask].any()
        for own, one, here in zip(found, y, mask, strict=True):
            own.append(one[here])
    for own, want in zip(found, alone, strict=True):
        torch.testing.assert_close(torch.cat(own), want, rtol=0, atol=1e-10)
    y, _ = module(torch.cat(rows)[None], cu_seqlens=[0, 16, 27, 30])
    torch.testing.assert_close(y[0], torch.cat(alone), rtol=0, atol=1e-10)
    state = module.reset(state, [1])
    state = cat([index(state, [2]), index(state, [1]), index(state, [0])])
    more = torch.randn(3, 7, DIM, dtype=F64)
    y, _ = module(more, state)
    for got, before, own in zip(y, (rows[2], rows[1][:0], rows[0]), more, strict=True):
        torch.testing.assert_close(got, module(torch.cat([before, own])[None])[0][0, -7:], rtol=0, atol=1e-10)


@each
def test_reading_changes_nothing_and_answers_as_if_next(name: str) -> None:
    """Every token is answered alike wherever it stands, sees what came before, and not what stands beside it."""
    module = make(name, conv=0)
    x = torch.randn(1, 8, DIM, dtype=F64)
    _, state = module(x[:, :7])
    asked = x[:, 7:].expand(-1, 3, -1)
    y, after = module(asked, state, learn=False)
    torch.testing.assert_close(dict(leaves(after)), dict(leaves(state)), rtol=0, atol=0)
    torch.testing.assert_close(y[:, 1:], y[:, :1].expand(-1, 2, -1), rtol=0, atol=1e-12)
    other, _ = module(torch.cat([asked[:, :1], torch.randn(1, 1, DIM, dtype=F64)], 1), state, learn=False)
    torch.testing.assert_close(other[:, 0], y[:, 0], rtol=0, atol=1e-12)
    assert not torch.allclose(module(asked, learn=False)[0], y)


@pytest.mark.parametrize("name", ["mac", "mag", "mal"])
def test_a_model_of_them_is_causal_and_streams(name: str) -> None:
    torch.manual_seed(0)
    section = {"vocab": 11, "dim": 8, "blocks": 2, "heads": 2, "mixer": {"level": name, "size": 4}, "mlp": "cms"}
    model = nestopt.model(section).double()
    assert isinstance(model, HopeLM)
    tokens = torch.randint(10, (3, 11))
    whole, _ = model(tokens)
    other = tokens.clone()
    other[0, 6], other[1] = 10, other[1] + 1
    changed, _ = model(other)
    torch.testing.assert_close(changed[0, :6], whole[0, :6], rtol=0, atol=1e-12)
    torch.testing.assert_close(changed[2], whole[2], rtol=0, atol=1e-12)
    assert not torch.isclose(changed[0, 6:], whole[0, 6:]).all(-1).any()
    state, found = None, []
    for t in range(tokens.shape[1]):
        logits, state = model(tokens[:, t : t + 1], state)
        found.append(logits)
    torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-10)
    loss, _ = model.loss(tokens)
    loss.backward()
    assert [path for path, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_what_is_not_allowed() -> None:
    for block, key in (
        (lambda: mac(size=0), "size"),
        (lambda: mag(persistent=0), "persistent"),
        (lambda: mal(attention()), "memory"),
        (lambda: mal(mac()), "memory"),
    ):
        with pytest.raises(FieldError, match=key):
            block()
    with pytest.raises(TypeError, match=r"nestopt\.nn\.TitansMixer"):
        SequenceMemory(mac(), 8, 2)
    with pytest.raises(ValueError, match="dim=8"):
        make("mac")(torch.zeros(1, 3, 7, dtype=F64))


def test_described_by_its_two_memories() -> None:
    text = str(nestopt.describe(nestopt.layer("mac", dim=16, heads=2)))
    assert "memory" in text
    assert "attention" in text
