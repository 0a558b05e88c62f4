"""What is learned while reading, and what is left of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestopt.cli import main
from nestopt.core.memories import Window
from nestopt.evidence import ForgettingReport, documents_in, forgetting, read, score
from nestopt.levels import attention, cms, window_attention
from nestopt.models import HopeLM

SIZE = 64


def make(keep: float = 1.0, **options: object) -> HopeLM:
    torch.manual_seed(0)
    mlp = cms(periods=(8,), learn="context", teach="loss", rate=0.5, keep=keep)
    given = {"vocab": 20, "dim": 16, "blocks": 1, "heads": 2, "mixer": window_attention(memory=Window(4)), "mlp": mlp}
    return HopeLM(**{**given, **options})  # type: ignore[arg-type]


def texts(count: int = 4) -> tuple[Tensor, Tensor]:
    """Documents of which each says the successors of tokens in an order of its own, and new text without an order."""
    g = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(count):
        follows = torch.randperm(20, generator=g)
        row = [int(torch.randint(20, (1,), generator=g))]
        while len(row) < SIZE:
            row.append(int(follows[row[-1]]))
        rows.append(row)
    return torch.tensor(rows), torch.randint(20, (40 * SIZE,), generator=g)


def report(keep: float = 1.0) -> ForgettingReport:
    documents, new = texts()
    return forgetting(make(keep), documents, new, times=(0, 1, 40), piece=16, bins=4)


def test_what_was_read_is_known_and_then_forgotten() -> None:
    kept, faded = report(), report(keep=0.8)
    for found in (kept, faded):
        line = found.learning
        assert line.first.whole.mean - line.second.whole.mean == pytest.approx(line.again.mean, abs=1e-6)
        assert line.again.mean > 0.3  # a second look finds what the first one taught
        assert line.gain[0].mean > 5 * line.gain[0].error > 0
        assert line.gain[0].mean > line.gain[-1].mean
        assert abs(found.mixer.gain[-1].mean) < 0.01  # four tokens of attention keep nothing
    assert abs(faded.learning.gain[-1].mean) < 0.05
    assert [point.mean for point in kept.learning.first.curve] == sorted(
        (point.mean for point in kept.learning.first.curve), reverse=True
    )  # the further it has read, the more it knows


def test_the_numbers_are_those_of_reading_one_document_after_another() -> None:
    documents, new = texts(2)
    model = make()
    found = forgetting(model, documents, new, times=(0, 2), piece=16, bins=4)
    bits = []
    for document in documents:
        with torch.no_grad():
            _, state = model(document[None])
            _, later = model(new[None, : 2 * SIZE], state)
            bits.append([float(score(model, d[None], later, learn="mixer")[0].mean()) for d in documents])
    seen, unseen = (bits[0][0], bits[1][1]), (bits[1][0], bits[0][1])
    assert found.learning.seen[1].mean == pytest.approx(sum(seen) / 2, rel=1e-4)
    assert found.learning.unseen[1].mean == pytest.approx(sum(unseen) / 2, rel=1e-4)
    assert found.learning.gain[1].mean == pytest.approx((sum(unseen) - sum(seen)) / 2, rel=1e-3)


def test_pieces_change_nothing() -> None:
    documents, _ = texts(2)
    model = make()
    whole, state = score(model, documents, piece=1000)
    parts, _ = score(model, documents, piece=5)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    after = read(model, documents.split(7, dim=1))
    assert after is not None
    torch.testing.assert_close(
        score(model, documents, after)[0], score(model, documents, state)[0], rtol=1e-4, atol=1e-4
    )
    assert read(model, [], state) == state


def test_documents_and_new_text_do_not_overlap() -> None:
    documents, new = documents_in(torch.arange(5000), 10, 4, times=100)
    assert documents.shape == (4, 10)
    assert len(new) == 1000
    assert not set(documents.flatten().tolist()) & set(new.tolist())
    with pytest.raises(ValueError, match="take 1,040 bytes; the text has 1,039"):
        documents_in(torch.arange(1039), 10, 4, times=100)
    with pytest.raises(ValueError, match="1 or more each"):
        documents_in(torch.arange(5000), 0)


def test_a_report_is_kept_and_drawn(tmp_path: Path) -> None:
    found = report()
    assert ForgettingReport.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    for name in ("a.png", "b.svg"):
        found.plot(tmp_path / name)
        assert (tmp_path / name).stat().st_size > 5000
    text = found.table()
    for word in ("first look", "second look", "40 x", "learning", "mixers only"):
        assert word in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mlp": cms(periods=(1,))}, "no continuum of this model learns.*learn: context"),
        ({"mixer": attention()}, "the mixer of block 0.*keeps every token.*window_attention"),
    ],
)
def test_models_that_can_not_be_measured(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        forgetting(make(**options), *texts())


def test_texts_that_can_not_be_read() -> None:
    documents, new = texts()
    with pytest.raises(ValueError, match=r"documents have the shape \[64\]"):
        forgetting(make(), documents[0], new)
    with pytest.raises(ValueError, match="6,400 or more"):
        forgetting(make(), documents, new)
    for wrong in ((), (2, 1), (-1, 3), (0,)):
        with pytest.raises(ValueError, match="rising whole numbers"):
            forgetting(make(), documents, new, times=wrong)
    with pytest.raises(ValueError, match="bins=0"):
        forgetting(make(), documents, new, times=(1,), bins=0)


def test_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} squared is {i * i}. " for i in range(4000)))
    model = "model.dim=16 model.blocks=1 model.heads=2 model.mixers=[deltanet] data.window=32 data.batch=2"
    settings = "train.steps=2 train.final_bytes=64 train.eval_bytes=64 train.sample_bytes=0 train.eval_every=0"
    given = [*model.split(), *settings.split(), f"train.out={tmp_path / 'runs'}", "-q"]
    assert main(["train", *given, "--data", str(text)]) == 0
    capsys.readouterr()
    run = tmp_path / "runs" / "001"
    assert main(["eval", "forgetting", str(run), "--bytes", "20", "--documents", "2", "-q"]) == 0
    assert "second look" in capsys.readouterr().out
    assert {"forgetting.png", "forgetting.json"} <= {path.name for path in run.iterdir()}
    assert main(["eval", "forgetting", str(run), "--bytes", "20000", "-q"]) == 2
    assert "bytes; the text has" in capsys.readouterr().err
