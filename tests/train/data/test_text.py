import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nestopt.train.data.text import from_path, standard_library, windows
from nestopt.train.errors import CorpusError


def write_files(root: Path, count: int, size: int = 300) -> dict[str, bytes]:
    texts = {f"part{n % 3}/file{n}.txt": (f"line of file {n}\n" * size)[:size].encode() for n in range(count)}
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return texts


def pieces(part: np.ndarray, texts: dict[str, bytes]) -> set[str]:
    """Names of the files that a part is made of, found by looking for their text in it."""
    return {name for name, text in texts.items() if text in part.tobytes()}


def test_the_standard_library_is_split_by_file_and_holds_no_tests() -> None:
    corpus = standard_library()
    root = Path(sysconfig.get_paths()["stdlib"])
    size = len(corpus.train) + len(corpus.held_out)
    assert corpus.train.dtype == corpus.held_out.dtype == np.uint8
    assert size > 5_000_000
    assert 0.01 < len(corpus.held_out) / size < 0.10
    texts = {name: (root / name).read_bytes() for name in ("argparse.py", "heapq.py", "json/decoder.py", "ast.py")}
    for text in texts.values():
        assert (text in corpus.train.tobytes()) != (text in corpus.held_out.tobytes())
    everything = corpus.train.tobytes() + corpus.held_out.tobytes()
    for outside in (Path(np.__file__), *root.glob("test/test_heapq.py"), *root.glob("unittest/test/test_case.py")):
        assert outside.read_bytes() not in everything
    again = standard_library()
    assert np.array_equal(corpus.train, again.train)
    assert np.array_equal(corpus.held_out, again.held_out)


def test_a_python_without_source_is_told_of_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(CorpusError, match="--data"):
        standard_library()


def test_a_folder_is_split_by_file(tmp_path: Path) -> None:
    texts = write_files(tmp_path, 200)
    corpus = from_path(tmp_path)
    train, held_out = pieces(corpus.train, texts), pieces(corpus.held_out, texts)
    assert train | held_out == set(texts)
    assert not train & held_out
    assert (corpus.train_files, corpus.held_out_files) == (len(train), len(held_out))
    assert len(corpus.train) == sum(len(texts[n]) + 1 for n in train) - 1
    assert corpus.name == tmp_path.name


def test_a_file_keeps_its_side_when_others_come(tmp_path: Path) -> None:
    texts = write_files(tmp_path, 200)
    before = pieces(from_path(tmp_path).held_out, texts)
    more = write_files(tmp_path, 300)
    after = pieces(from_path(tmp_path).held_out, more)
    assert before == after & set(texts)
    assert after - before


def test_hidden_files_other_kinds_and_empty_files_are_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, 40)
    plain = from_path(tmp_path)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("SECRET" * 100)
    (tmp_path / ".hidden.txt").write_text("SECRET" * 100)
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 SECRET" * 100)
    (tmp_path / "image.bin").write_bytes(b"\0\1\2 SECRET" * 100)
    (tmp_path / "empty.txt").write_bytes(b"")
    corpus = from_path(tmp_path)
    assert np.array_equal(plain.train, corpus.train)
    assert np.array_equal(plain.held_out, corpus.held_out)
    assert corpus.train_files == plain.train_files


def test_few_files_are_split_by_bytes(tmp_path: Path) -> None:
    texts = write_files(tmp_path, 10, size=1000)
    corpus = from_path(tmp_path)
    joined = b"\n".join(texts[name] for name in sorted(texts))
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == joined
    assert 0.05 <= len(corpus.held_out) / len(joined) <= 0.10
    assert corpus.train.tobytes().endswith(b"\n")
    assert (corpus.train_files, corpus.held_out_files) == (10, 1)


def test_one_file_with_most_of_the_text_cannot_decide_the_split(tmp_path: Path) -> None:
    texts = write_files(tmp_path, 200)
    for name in texts:  # whichever side each falls to, its text now outweighs all others
        (tmp_path / name).write_bytes(b"a big file\n" * 100_000)
        corpus = from_path(tmp_path)
        share = len(corpus.held_out) / (len(corpus.train) + len(corpus.held_out))
        assert 0.05 <= share <= 0.10
        (tmp_path / name).write_bytes(texts[name])
        if name in pieces(from_path(tmp_path).held_out, texts):
            return
    pytest.fail("no file was held out")


@given(st.integers(4096, 9000), st.lists(st.floats(0.85, 0.999), max_size=5))
@settings(max_examples=50, deadline=None)
def test_a_file_is_cut_near_its_end_and_nothing_is_lost(
    tmp_path_factory: pytest.TempPathFactory, size: int, newlines: list[float]
) -> None:
    marks = {int(place * size) for place in newlines}
    text = bytes(10 if n in marks else 97 + n % 26 for n in range(size))
    path = tmp_path_factory.mktemp("corpus") / "text"
    path.write_bytes(text)
    corpus = from_path(path)
    assert corpus.train.tobytes() + corpus.held_out.tobytes() == text
    tail = len(text) // 20
    assert tail <= len(corpus.held_out) <= 2 * tail
    if b"\n" in text[len(text) - 2 * tail : len(text) - tail]:
        assert corpus.train[-1] == ord("\n")
    assert (corpus.train_files, corpus.held_out_files) == (1, 1)


def test_a_line_end_is_preferred(tmp_path: Path) -> None:
    (tmp_path / "lines").write_bytes(b"x" * 99 + b"\n" + b"y" * 9_450 + b"\n" + b"z" * 449)
    corpus = from_path(tmp_path / "lines")
    assert len(corpus.held_out) == 500  # the last newline is inside the held-out part, and the one before too far off
    (tmp_path / "lines").write_bytes(b"y" * 9_450 + b"\n" + b"z" * 549)
    assert from_path(tmp_path / "lines").held_out.tobytes() == b"z" * 549


def test_files_are_counted_where_their_bytes_are(tmp_path: Path) -> None:
    for name, size in {"a": 5000, "b": 4499, "c": 499}.items():  # the cut is at the end of b
        (tmp_path / name).write_bytes(name.encode() * size)
    corpus = from_path(tmp_path)
    assert corpus.held_out.tobytes() == b"\n" + b"c" * 499
    assert (corpus.train_files, corpus.held_out_files) == (2, 1)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("missing", None, "does not exist"),
        ("short", b"x" * 4095, "4095 bytes"),
        ("folder/image", b"\0" * 5000, "no UTF-8 text"),
    ],
)
def test_errors_say_what_is_wrong(tmp_path: Path, name: str, content: bytes | None, reason: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=reason):
        from_path(tmp_path / name.split("/", maxsplit=1)[0])


def test_corpus_arrays_become_tensors_without_a_warning(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    (tmp_path / "text").write_bytes(b"some text\n" * 500)
    torch.from_numpy(from_path(tmp_path / "text").train)
    assert not recwarn.list


@given(
    size=st.integers(2, 300),
    length=st.integers(1, 299),
    batch=st.integers(1, 8),
    seed=st.integers(-(2**70), 2**70),
    step=st.integers(0, 2**70),
)
@settings(deadline=None)
def test_windows_are_stretches_of_the_text(size: int, length: int, batch: int, seed: int, step: int) -> None:
    tokens = torch.arange(size, dtype=torch.int32)  # a token is its own position
    if length + 1 > size:
        with pytest.raises(ValueError, match=f"the text has only {size}"):
            windows(tokens, step, batch=batch, length=length, seed=seed)
        return
    drawn = windows(tokens, step, batch=batch, length=length, seed=seed)
    assert drawn.shape == (batch, length + 1)
    assert drawn.dtype == torch.int64
    assert (drawn.diff(dim=1) == 1).all()
    assert drawn.min() >= 0
    assert drawn.max() < size
    assert torch.equal(drawn, windows(tokens, step, batch=batch, length=length, seed=seed))


@given(world=st.integers(1, 6), share=st.integers(1, 4), step=st.integers(0, 1000))
@settings(deadline=None)
def test_ranks_slice_the_batch_of_one_process(world: int, share: int, step: int) -> None:
    tokens = torch.randint(256, (1000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    batch = world * share
    whole = windows(tokens, step, batch=batch, length=16, seed=3)
    parts = [windows(tokens, step, batch=batch, length=16, seed=3, rank=r, world=world) for r in range(world)]
    assert all(len(part) == share for part in parts)
    assert torch.equal(torch.cat(parts), whole)


def test_every_stretch_is_drawn_and_equally_often() -> None:
    tokens = torch.arange(8, dtype=torch.uint8)
    first = torch.cat([windows(tokens, step, batch=8, length=3, seed=0)[:, 0] for step in range(1000)])
    counts = torch.bincount(first, minlength=8)
    assert counts[5:].sum() == 0
    assert ((counts[:5] - 1600).abs() < 6 * (1600 * 0.8) ** 0.5).all()


def test_steps_and_seeds_are_independent() -> None:
    tokens = torch.arange(100_000, dtype=torch.int32)
    starts = [
        tuple(windows(tokens, step, batch=4, length=1, seed=seed)[:, 0].tolist())
        for seed in range(20)
        for step in range(20)
    ]
    assert len(set(starts)) == len(starts)  # above all: (seed, step + 1) is not (seed + 1, step)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"batch": 6, "world": 4}, "multiple of the number of processes"),
        ({"batch": 0}, "at least 1"),
        ({"length": 0}, "at least 1"),
        ({"rank": 2, "world": 2}, "rank must be in"),
        ({"step": -1}, "at least 0"),
        ({"tokens": torch.zeros(4, 4)}, "one dimension"),
    ],
)
def test_windows_refuse_impossible_numbers(change: dict, reason: str) -> None:
    arguments = {"tokens": torch.zeros(100), "step": 0, "batch": 4, "length": 8, "seed": 0} | change
    with pytest.raises(ValueError, match=reason):
        windows(**arguments)
