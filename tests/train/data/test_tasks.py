"""What tasks say is right, against twins that find it by brute force; and a run on one."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F

import nestopt
from nestopt.cli import main
from nestopt.config import Config, ConfigError, build
from nestopt.core.registry import registry
from nestopt.models import HopeLM
from nestopt.testing import check_task
from nestopt.train.data import Examples, Task
from nestopt.train.data.sources import make
from nestopt.train.data.task import Made, generator_of
from nestopt.train.data.tasks.languages import LENGTHS, Language
from nestopt.train.errors import CheckpointError
from nestopt.train.evaluate import measured
from nestopt.train.loop import train


def drawn(task: Task, part: str = "train", count: int = 32, seed: int = 0) -> Examples:
    return task.draw(count, torch.Generator().manual_seed(seed), part)


# -- languages: every word up to some length, by whether it is one -----------------------------------------------------


def brackets(word: str) -> bool:
    for pair in ("()", "[]"):
        rest = "".join(c for c in word if c in pair)
        while pair in rest:
            rest = rest.replace(pair, "")
        if rest:
            return False
    return True


def blocks(letters: str, word: str) -> bool:
    return word != "" and word == "".join(c * (len(word) // len(letters)) for c in letters)


WORDS = {
    "parity": lambda w: w.count("1") % 2 == 0,
    "aa_star": lambda w: re.fullmatch("(aa)*", w),
    "abab_star": lambda w: re.fullmatch("(abab)*", w),
    "a_n_b_n": lambda w: blocks("ab", w),
    "a_n_b_n_c_n": lambda w: blocks("abc", w),
    "shuffle_2": brackets,
}


@pytest.mark.parametrize("name", WORDS)
def test_what_may_come_next_is_what_words_go_on_with(name: str) -> None:
    task = build("task", name)
    assert isinstance(task, Language)
    longest = {1: 16, 2: 12, 3: 9, 4: 8}[len(task.alphabet)]
    every = ("".join(w) for n in range(longest + 1) for w in itertools.product(task.alphabet, repeat=n))
    legal: dict[str, set[str]] = {}
    begun = set()
    room = {"abab_star": 4, "a_n_b_n_c_n": 3}.get(name, 2)  # of whatever may come in a word, a longer one has it
    for word in filter(WORDS[name], every):
        for n in range(len(word) + 1):
            legal.setdefault(word[:n], set()).add((word + "$")[n])
            if len(word) <= longest - room:
                begun.add(word[:n])
    prefixes = sorted(begun)
    found = task.examples(prefixes, longest)
    assert found.targets is not None
    assert found.mask is not None
    symbols = "^$" + task.alphabet
    for row, prefix in enumerate(prefixes):
        assert found.mask[row].sum() == len(prefix) + 1
        told = {symbols[i] for i in found.targets[row, len(prefix)].nonzero()[:, 0].tolist()}
        assert told == legal[prefix], prefix
        assert "".join(symbols[i] for i in found.tokens[row, : len(prefix) + 1]) == "^" + prefix


@pytest.mark.parametrize("name", WORDS)
@pytest.mark.parametrize("part", LENGTHS)
def test_strings_have_the_lengths_of_their_part_and_can_become_words(name: str, part: str) -> None:
    task = build("task", name)
    tokens, _, mask = drawn(task, part, 64)
    assert mask is not None
    low, high = LENGTHS[part]
    sizes = mask.sum(1) - 1
    slack = 2 if name.startswith("a_n") else 0
    assert low - slack <= int(sizes.min()) < int(sizes.max()) <= high
    if part == "train":
        ends = [t for w, n in zip(tokens, sizes, strict=True) for t in w[1 : int(n) + 1].tolist()]
        assert {*ends} == {*range(2, task.vocab)}  # every symbol is drawn


def test_groups_multiply() -> None:
    s3, mod = drawn(build("task", "s3"), count=8), drawn(build("task", "mod_3"), count=8)
    elements = list(itertools.permutations("abc"))
    for tokens, targets in zip(s3.tokens.tolist(), s3.targets.tolist(), strict=True):
        things = "abc"
        for token, target in zip(tokens, targets, strict=True):
            order = ["abc".index(c) for c in elements[token]]
            # the permutation i -> order[i], after all those before it
            things = "".join("abc"[order["abc".index(c)]] for c in things)
            assert tuple(things) == elements[target]
    assert torch.equal(mod.targets, mod.tokens.cumsum(1) % 3)


# -- recall ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["mqar", {"task": "mqar", "pairs": 32}, {"task": "mqar", "pairs": 2, "tokens": 10}, "noisy_mqar"]
)
def test_each_key_is_answered_with_its_value(spec: object) -> None:
    task = build("task", spec)
    tokens, targets, _ = drawn(task)
    noise = 64
    for row, asked in zip(tokens.tolist(), targets.tolist(), strict=True):
        pairs: dict[int, int] = {}
        answers = 0
        for t, (token, target) in enumerate(zip(row, asked, strict=True)):
            if t % 2 or token >= noise:
                assert target == -100
            elif token in pairs:
                assert target == pairs[token]
                answers += 1
            else:
                assert target == -100
                pairs[token] = row[t + 1]
        assert len(pairs) == task.pairs
        assert answers == (task.tokens or 8 * task.pairs) // 2 - task.pairs


@pytest.mark.parametrize("part", ["train", "start", "middle", "end", "twice"])
def test_the_needle_is_where_it_is_said_to_be(part: str) -> None:
    task = build("task", "needle")
    tokens, targets, _ = drawn(task, part)
    for row, told in zip(tokens.tolist(), targets.tolist(), strict=True):
        marks = [t for t, token in enumerate(row[:-2]) if token == 0]
        needles = {row[t + 1]: (row[t + 2], t) for t in marks}
        assert len(needles) == len(marks) == 4
        assert row[-2] == 0
        value, place = needles[row[-1]]
        assert told == [-100] * (len(row) - 1) + [value]
        if part in ("start", "middle", "end"):
            assert place * 3 // (len(row) - 2) == ("start", "middle", "end").index(part)
    assert tokens.shape[1] == (194 if part == "twice" else 98)


def test_facts_lead_to_the_end_of_their_chain() -> None:
    task = build("task", {"task": "facts", "chains": 3, "hops": 3})
    tokens, targets, _ = drawn(task)
    for row, told in zip(tokens.tolist(), targets.tolist(), strict=True):
        follows = dict(zip(row[:18:2], row[1:18:2], strict=True))
        assert len(follows) == 9
        for t in range(18, 24, 2):
            assert row[t] == 32
            assert told[t + 1] == follows[follows[follows[row[t + 1]]]]
        assert sum(y != -100 for y in told) == 3


def test_copies_are_of_what_was_read() -> None:
    tokens, targets, _ = drawn(build("task", "selective_copy"))
    for row, told in zip(tokens.tolist(), targets.tolist(), strict=True):
        assert told[32:] == [token for token in row[:32] if token < 16]
        assert told[:32] == [-100] * 32
        assert row[32:] == [17] * 8
    tokens, several, _ = drawn(build("task", "compress"))
    for row, told in zip(tokens.tolist(), several.tolist(), strict=True):
        assert [i for i, y in enumerate(told[-1]) if y == 1] == sorted(row[:-1])
        assert [letter // 8 for letter in row[:-1]] == [*range(16)]
        assert {y for place in told[:-1] for y in place} == {-100}
    first, second = (drawn(build("task", "memorise"), seed=seed) for seed in (0, 1))
    known = dict(zip(first.tokens.flatten().tolist(), first.targets.flatten().tolist(), strict=True))
    for key, value in zip(second.tokens.flatten().tolist(), second.targets.flatten().tolist(), strict=True):
        assert known.setdefault(key, value) == value
    assert {*known.values()} == {*range(16)}


# -- what all of them do -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names("task"))
def test_draws_are_of_their_generator_and_right_answers_score_1(name: str) -> None:
    task = build("task", name)
    check_task(task)
    for part in ("train", *task.tests):
        first = drawn(task, part, 4, 0)
        _, targets, mask = first.told()
        one = targets.ndim == 2
        right = F.one_hot(targets.clamp_min(0), task.vocab).double() if one else targets.double() * 2 - 1
        counts = (targets if targets.ndim == 2 else targets[..., 0]) != -100
        counts = counts if mask is None else counts & mask
        wrong = right.clone()
        row, place = counts.nonzero()[0].tolist()
        wrong[row, place] = -wrong[row, place]
        score = task.score(wrong, first)
        assert float(score[row]) == pytest.approx(0 if task.whole else 1 - 1 / int(counts[row].sum()))
        assert float(score.sum()) == pytest.approx(3 + float(score[row]))


class Next(Task):
    """The next number."""

    tests: ClassVar[tuple[str, ...]] = ()

    @property
    def vocab(self) -> int:
        return 7

    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        first = torch.randint(7, (count, 1), generator=generator)
        mask = torch.ones(count, 9, dtype=torch.bool)
        mask[0, 5:] = False
        return Examples((first + torch.arange(9)) % 7, mask=mask)


class Leaky(Next):
    def draw(self, count: int, generator: torch.Generator, part: str = "train") -> Examples:
        return super().draw(count, torch.Generator().manual_seed(0), part)


class Narrow(Next):
    @property
    def vocab(self) -> int:
        return 6


class Unscored(Next):
    def score(self, logits: torch.Tensor, examples: Examples) -> torch.Tensor:
        return torch.zeros(len(examples.tokens))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Leaky, "another generator gives the same tokens"),
        (Narrow, "a token is 6, and vocab is 6"),
        (Unscored, "right answers score"),
    ],
)
def test_check_task_finds_what_is_wrong(task: type[Task], words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        check_task(task())


class Plugin:
    @staticmethod
    @nestopt.hookimpl
    def nestopt_register_tasks(register: Any) -> None:
        register("next_number", Next)


def config(task: object, out: Path, vocab: int = 64, **settings: Any) -> Config:
    small = {"steps": 4, "eval_every": 0, "final_bytes": 256, "sample_bytes": 10, "out": str(out), **settings}
    model = {"mixer": "deltanet", "mlp": {"level": "cms"}, "dim": 16, "blocks": 1, "heads": 2, "vocab": vocab}
    return Config(model=model, data={"task": task, "batch": 4}, train=small)


def test_a_task_of_a_plugin_is_a_task(tmp_path: Path) -> None:
    registry.add(Plugin, "numbers")
    try:
        found = config("next_number", tmp_path, vocab=8, steps=60)
        result = train(found, quiet=True)
    finally:
        registry.remove("numbers")
    assert result.bits_per_byte is not None
    assert result.bits_per_byte < 2.2  # of log2 7 = 2.8
    examples = drawn(Next(), count=2)
    tokens, targets, mask = examples.told()
    assert mask is not None
    assert targets[0].tolist() == [*((tokens[0, 1:5]).tolist()), -100, -100, -100, -100]
    with pytest.raises(ConfigError, match="no task is called 'next_number'"):
        config("next_number", tmp_path)


def test_a_run_on_a_task_goes_on_bit_for_bit(tmp_path: Path) -> None:
    level = {"warmup": 0.0, "decay": 0.0}  # a rate that does not depend on how many steps there are
    whole = train(config("parity", tmp_path, **level), quiet=True)
    half = train(config("parity", tmp_path, steps=2, **level), quiet=True)
    again = train(config("parity", tmp_path, **level), resume=half.run.path, quiet=True)
    assert again.step == whole.step == 4
    assert again.bits_per_byte == whole.bits_per_byte
    weights, theirs = (dict(found.run.load_model().state_dict()) for found in (again, whole))
    assert all(torch.equal(w, theirs[key]) for key, w in weights.items())
    other = config("aa_star", tmp_path)
    with pytest.raises(CheckpointError, match="the run is on the task Parity"):
        train(other, resume=whole.run.path, quiet=True)


def test_rows_do_not_depend_on_how_many_processes_there_are(tmp_path: Path) -> None:
    whole = make(config("mqar", tmp_path))
    halves = [make(config("mqar", tmp_path), rank, 2) for rank in range(2)]
    for _ in range(2):
        a, parts = whole.batch(), [half.batch() for half in halves]
        for one, several in zip(a[:2], zip(*(part[:2] for part in parts), strict=True), strict=True):
            assert torch.equal(one, torch.cat(several))
        assert a.targets == sum(part.targets for part in parts) == 4 * 24


def test_the_score_of_a_run_is_the_mean_over_its_answers() -> None:
    task = build("task", "parity")
    held = Made(task, batch=4, seed=0).held_out(400)
    torch.manual_seed(0)
    model = HopeLM(task.vocab, 16, 1, 2)
    with torch.no_grad():
        logits, _ = model(held.tokens, mask=held.mask)
    p, y = logits.double().sigmoid(), held.answers
    assert held.mask is not None
    each = -torch.where(y == 1, p, 1 - p).log2().sum(-1)[held.mask]
    assert measured(model, held, config("parity", Path())) == pytest.approx(float(each.mean()), rel=1e-5)
    beside = Made(task, batch=4, seed=0).beside(400, 400)
    assert not torch.equal(beside.tokens, held.tokens)
    assert Made(build("task", "mqar"), batch=4, seed=0).held_out(400).tokens.is_contiguous()
    assert generator_of(1, "a").initial_seed() != generator_of(1, "b").initial_seed()


def test_what_a_task_can_not_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.vocab: 3 is not allowed; parity .* up to 3: give 4"):
        train(config("parity", tmp_path, vocab=3))
    with pytest.raises(ConfigError, match=r"data\.path.*it does nothing beside task"):
        Config.from_data({"data": {"task": "parity", "path": str(tmp_path)}})
    for spec, message in (
        ({"task": "mqar", "pairs": 40}, "pairs"),
        ({"task": "mqar", "tokens": 17}, "give 0, or an even number of 18 or more"),
        ({"task": "facts", "chains": 11}, "chains"),
        ({"task": "needle", "length": 40}, "length"),
        ("party", "Did you mean 'parity'"),
    ):
        with pytest.raises(ConfigError, match=message):
            build("task", spec)
    given = "data.task.task=mqar data.task.pairs=2 model.dim=16 model.blocks=1 train.steps=1 train.final_bytes=64"
    assert main(["train", *given.split(), f"train.out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "mqar: examples made as it trains, 60 held-out tokens to measure on" in said
    assert "bits per answer on 60 held-out tokens" in said
    assert main(["generate", str(tmp_path / "001")]) == 2
    assert "data.task: 'mqar' is not allowed; text is needed here" in capsys.readouterr().err
