"""Whether parts, forms and datasets keep the contract that the library relies on."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nestopt.config import ConfigError, build, to_spec
from nestopt.core import AssociativeMemory, Level, Part, Refused, TokenForm, registry
from nestopt.models.next_token import counted
from nestopt.ops.run import run
from nestopt.testing.levels import check_layer, check_level
from nestopt.train.data.dataset import Dataset, DocumentDataset
from nestopt.train.data.task import Task
from nestopt.train.schedule import Schedule


def check_part(part: Part) -> None:
    """Assert that a memory, an objective, a retention, a feature map or an output works in an `AssociativeMemory`.

    On tokens it does what `check_layer` asks, and so on gradients what `check_level` asks, unless it is of features,
    which only tokens have. Written as a spec and read back it is equal.

    Raises:
        AssertionError: it does not, in words.
    """
    given: dict[str, Any] = {part.kind: part}
    level = AssociativeMemory(**given)
    (check_layer if part.kind == "features" else check_level)(level)
    check_spec(part)


def check_spec(part: Part) -> None:
    """Assert that a part, if it is registered, is equal once it is written as plain data and read back."""
    try:
        spec = to_spec(part)
    except ConfigError:
        return  # not registered, which is allowed
    again = build(part.kind, spec)
    assert again == part, f"{part.label}: written as {spec} and read back, it is another {part.kind}"


def check_form(form: type[TokenForm], level: Level) -> None:
    """Assert that a form, which must be registered, gives what the reference machine gives for `level`.

    Answers, the state, gradients of queries, keys and values, padding, and a sequence in two parts are compared.

    Raises:
        AssertionError: it does not, or refuses the level on the CPU in float64; in words.
    """
    answer = form.accepts(level, torch.device("cpu"), torch.float64)
    assert not isinstance(answer, Refused), f"{form.__name__} refuses {level.label}: {answer.words}"
    name = registry.name_of(form)
    assert name is not None, f"{form.__name__} is not registered; add its plugin (nestopt.registry.add)"
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 9, 2, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[1, 6:] = False

    def of(which: str) -> tuple[Tensor, list[Tensor]]:
        q, k, v = (x.clone().requires_grad_() for x in inputs)
        y, _ = run(level, q, k, v, mask=mask, form=which)
        (y * torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)).sum().backward()
        return y.detach(), [x.grad for x in (q, k, v) if x.grad is not None]

    y, grads = of(name)
    want, want_grads = of("reference")
    words = f"{form.__name__} on {level.label}"
    _near(y, want, f"{words}: answers differ from the reference machine's")
    assert len(grads) == len(want_grads), f"{words}: q, k or v gets no gradient"
    for which, got, wanted in zip("qkv", grads, want_grads, strict=True):
        _near(got, wanted, f"{words}: the gradient of {which} differs from the reference machine's")
    q, k, v = inputs
    whole, _ = run(level, q, k, v, form=name)
    first, state = run(level, q[:, :4], k[:, :4], v[:, :4], form=name)
    second, _ = run(level, q[:, 4:], k[:, 4:], v[:, 4:], form=name, state=state)
    _near(torch.cat([first, second], 1), whole, f"{words}: a sequence in two parts differs from the whole")


def _near(got: Tensor, want: Tensor, words: str) -> None:
    error = float((got - want).abs().max())
    assert error <= 1e-8 * (1 + float(want.abs().max())), f"{words} (by {error:.2g})"


def check_dataset(dataset: Dataset) -> None:
    """Assert that a dataset gives what training reads: bytes, or documents that are alike whenever they are read.

    Raises:
        AssertionError: it does not, in words.
    """
    check_spec(dataset)
    name = dataset.label
    if not isinstance(dataset, DocumentDataset):
        text = dataset.load()
        for part in ("train", "held_out"):
            found = getattr(text, part)
            good = isinstance(found, np.ndarray) and found.dtype == np.uint8 and found.ndim == 1
            assert good, f"{name}: {part} is no one-dimensional array of uint8"
            assert len(found) >= 2, f"{name}: {part} has {len(found)} bytes; give 2 or more"
        return
    documents = dataset.documents()
    assert documents.blocks >= 1, f"{name}: it has no blocks"
    first, again = (list(some.texts(0)) for some in (documents, pickle.loads(pickle.dumps(documents))))
    assert first, f"{name}: block 0 has no documents"
    assert first == again, f"{name}: block 0 is not the same when a copy in another process reads it"
    tokens = list(documents.encode(first[0]))
    assert tokens, f"{name}: a document becomes no token"
    assert all(0 <= token < documents.vocab for token in tokens), (
        f"{name}: a token is not below vocab={documents.vocab}"
    )
    assert isinstance(documents.decode(documents.encode_prompt("a")), str), f"{name}: decode gives no text"


def check_task(task: Task) -> None:
    """Assert that a task draws from its generator alone, within its vocabulary, and scores right answers 1.

    Raises:
        AssertionError: it does not, in words.
    """
    check_spec(task)
    for part in ("train", *task.tests):
        first, again, other = (task.draw(4, torch.Generator().manual_seed(seed), part) for seed in (0, 0, 1))
        words = f"{task.label}: draw of {part!r}"
        assert torch.equal(first.tokens, again.tokens), f"{words}: the same generator gives other tokens"
        assert not torch.equal(first.tokens, other.tokens), f"{words}: another generator gives the same tokens"
        tokens, targets, mask = first.told()
        assert tokens.dtype == torch.int64, f"{words}: tokens are {tokens.dtype}, not int64"
        assert tokens.ndim == 2, f"{words}: the shape is {list(tokens.shape)}, not [n, T]"
        assert len(tokens) == 4, f"{words}: asked for 4 examples, it gives {len(tokens)}"
        one = targets.ndim == 2
        for what, found in (("token", tokens), ("target", targets if one else targets.clamp(max=0))):
            assert int(found.max()) < task.vocab, f"{words}: a {what} is {int(found.max())}, and vocab is {task.vocab}"
        counts = counted(targets) if mask is None else counted(targets) & mask
        assert counts.any(1).all(), f"{words}: an example has no target that counts"
        right = F.one_hot(targets.clamp_min(0), task.vocab).double() if one else targets.double() * 2 - 1
        scores = task.score(right, first).tolist()
        assert scores == [1.0] * 4, f"{words}: right answers score {scores}; each must be 1"


def check_schedule(schedule: Schedule) -> None:
    """Assert that a schedule gives finite multipliers, none negative and not all 0. Raises AssertionError, in words."""
    check_spec(schedule)
    found = [schedule(step / 100, 0.1, 0.5) for step in range(1, 101)]
    wrong = [value for value in found if not 0 <= value < math.inf]
    assert not wrong, f"{schedule.label}: it gives {wrong[0]!r}; give 0 or more"
    assert any(found), f"{schedule.label}: it is 0 all the time"
