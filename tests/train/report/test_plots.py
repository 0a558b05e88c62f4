import itertools
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure

from nestopt.train.report.plots import loss_plot


def run_of(steps: int) -> list[dict]:
    noise = np.random.default_rng(0).normal(0, 0.1, steps)
    records: list[dict] = [
        {"step": step, "train/bits_per_byte": 1.9 + 6 * math.exp(-step / 20) + noise[step]} for step in range(steps)
    ]
    return records + [{"step": step, "eval/bits_per_byte": 2.0} for step in range(0, steps, 100)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures as they are saved, to be looked into."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(figure: Figure, *args: object, **kwargs: object) -> None:
        save(figure, *args, **kwargs)
        figures.append(figure)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_draws_curve_points_references_and_title(tmp_path: Path, drawn: list[Figure]) -> None:
    loss_plot(run_of(1000), tmp_path / "loss.png", {"gzip -9": 1.91, "trigram": 2.57}, title="a run")
    assert matplotlib.image.imread(tmp_path / "loss.png").shape[:2] == (675, 1200)
    axes = drawn[0].axes[0]
    raw, smooth, held_out, *references = axes.get_lines()
    assert raw.get_xydata().shape == smooth.get_xydata().shape == (1000, 2)
    assert held_out.get_linestyle() == "None"
    assert len(held_out.get_xdata()) == 10
    assert sorted(line.get_ydata()[0] for line in references) == [1.91, 2.57]
    assert {text.get_text() for text in axes.texts} == {"gzip -9  1.91", "trigram  2.57"}
    assert axes.get_title("left") == "a run"
    low, high = axes.get_ylim()
    assert low < 1.8
    assert 2.57 < high < 4.5


def test_the_strong_curve_is_the_centred_mean(tmp_path: Path, drawn: list[Figure]) -> None:
    values = np.random.default_rng(1).normal(2, 0.3, 250)
    values[[60, 61]] = np.nan
    records = [{"step": step, "loss": value} for step, value in enumerate(values)]
    loss_plot(records, tmp_path / "a.png", {}, train_key="loss")
    smooth = drawn[0].axes[0].get_lines()[1].get_ydata()
    for place in range(250):  # 4 % of 250 points: five before, and five from the point on
        window = values[max(0, place - 5) : place + 5]
        expected = np.nan if np.isnan(values[place]) else np.nanmean(window)
        assert smooth[place] == pytest.approx(expected, nan_ok=True)


def test_near_references_have_labels_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    names = {"a": 2.0, "b": 2.001, "c": 2.002, "d": 2.5}
    loss_plot(run_of(300), tmp_path / "a.png", names)
    boxes = sorted((text.get_window_extent() for text in drawn[0].axes[0].texts), key=lambda box: box.y0)
    assert all(lower.y1 <= upper.y0 + 1 for lower, upper in itertools.pairwise(boxes))
    assert all(box.x1 <= drawn[0].bbox.x1 for box in boxes)


def test_a_diverged_run_shows_where(tmp_path: Path, drawn: list[Figure]) -> None:
    records = run_of(400)
    for record in records:
        if record["step"] >= 250:
            record.update({key: math.nan for key in record if key != "step"})
    loss_plot(records, tmp_path / "a.png", {})
    legend = drawn[0].axes[0].get_legend()
    assert legend is not None
    assert "not finite from step 250" in [text.get_text() for text in legend.get_texts()]


@pytest.mark.parametrize("suffix", ["svg", "pdf"])
def test_other_kinds_of_picture(tmp_path: Path, suffix: str) -> None:
    loss_plot(run_of(3), tmp_path / f"loss.{suffix}", {"gzip -9": 1.91})
    start = (tmp_path / f"loss.{suffix}").read_bytes()[:5]
    assert start == {"svg": b"<?xml", "pdf": b"%PDF-"}[suffix]


@pytest.mark.parametrize("value", [2.0, math.nan])
def test_one_point_is_enough(tmp_path: Path, value: float) -> None:
    loss_plot([{"step": 0, "eval/bits_per_byte": value}], tmp_path / "loss.png", {})
    assert (tmp_path / "loss.png").stat().st_size > 0


def test_nothing_to_draw_is_an_error_and_leaves_the_old_picture(tmp_path: Path) -> None:
    (tmp_path / "loss.png").write_bytes(b"old")
    with pytest.raises(ValueError, match="nothing to draw"):
        loss_plot([{"step": 1, "other": 2.0}], tmp_path / "loss.png", {})
    assert (tmp_path / "loss.png").read_bytes() == b"old"


def test_the_users_matplotlib_is_left_alone(tmp_path: Path) -> None:
    code = (
        "import sys\nfrom nestopt.train.report.plots import loss_plot\n"
        "loss_plot([{'step': 1, 'eval/bits_per_byte': 2.0}], sys.argv[1], {})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "loss.png")], check=True)
