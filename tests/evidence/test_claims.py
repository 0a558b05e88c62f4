"""Claims that are measured and decided: the rules, what is kept on the way, and what each quick one prints."""

from __future__ import annotations

import json
import math
import re
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch

from nestopt.cli import main
from nestopt.config import Config, ConfigError, build
from nestopt.config.load import load, load_saved
from nestopt.core.level import Level
from nestopt.evidence import networks, trials
from nestopt.evidence.claims import CLAIMS
from nestopt.evidence.store import Store
from nestopt.evidence.toys import TOYS, steps_of
from nestopt.evidence.trials import OnTask, Plan
from nestopt.evidence.verdict import above, not_below, seeds_of
from nestopt.models import HopeLM
from nestopt.models.build import build_model
from nestopt.train.compare import SECONDS, TOKENS, like, parameters
from nestopt.train.errors import CheckpointError
from nestopt.train.loop import train

# -- rules -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differences", "is_above", "is_not_below"),
    [
        ([0.2, 0.21, 0.19], "yes", "yes"),
        ([0.2, 0.5, 0.01], "undecided", "yes"),  # all agree, but 0.24 is within 2 · 0.14
        ([0.9] * 40 + [-0.01], "undecided", "yes"),  # far beyond, but one seed does not agree
        ([-0.2, -0.21, -0.19], "no", "no"),
        ([-0.2, 0.1, -0.05], "undecided", "yes"),
        ([0.0, 0.0, 0.0], "undecided", "yes"),
        ([-0.1, -0.1, -0.1], "no", "no"),
        ([0.3, 0.3], "undecided", "undecided"),
    ],
)
def test_two_standard_errors_and_all_seeds(differences: list[float], is_above: str, is_not_below: str) -> None:
    assert above(differences) == is_above
    assert not_below(differences) == is_not_below


def rows(scores: dict[str, list[float]], task: str = "a", limit: str = SECONDS, part: str = "train") -> list[Any]:
    return [
        {"task": task, "limit": limit, "model": model, "seed": seed, "scores": {part: score}}
        for model, found in scores.items()
        for seed, score in enumerate(found)
    ]


def judged(name: str, found: list[Any]) -> Any:
    models = list(dict.fromkeys(row["model"] for row in found))
    return CLAIMS[name].judge(CLAIMS[name], found, models)


def test_each_claim_has_its_rule() -> None:
    good, bad = [0.9, 0.91, 0.92], [0.5, 0.52, 0.51]
    found = rows({"hope": good, "retnet": [0.1] * 3, "deltanet": bad, "transformer": [1.0, 1.0, 1.0]})
    recall = judged("recall", found)
    assert (recall.answer, recall.seeds) == ("yes", 3)
    assert "hope - transformer = -0.090" in recall.rule
    assert "hope - deltanet = +0.400" in recall.rule
    assert judged("mad", found).answer == "no"  # the Transformer is above it
    worse = judged("recall", found + rows({"hope": bad, "deltanet": good, "retnet": bad}, task="b"))
    assert worse.answer == "no"
    assert "b, equal seconds: hope - deltanet" in worse.rule
    assert judged("mad", rows({"hope": good, "titans": bad})).answer == "yes"
    assert judged("mad", rows({"hope": good[:2], "titans": bad[:2]})).answer == "undecided"
    assert str(judged("mad", rows({"hope": good[:2], "titans": bad[:2]}))).endswith("2 seeds, and 3 are needed)")

    right, once = [1.0, 1.0, 0.99], [0.99, 1.0, 0.99]
    solved = rows({"hope": right, "deltanet": once}, part="41-100")
    answer = judged("languages", solved)
    assert answer.answer == "yes"
    assert "hope 1 of 1, deltanet 0 of 1" in answer.rule
    assert judged("languages", solved + rows({"hope": once, "deltanet": right}, "b", part="41-100")).answer == "no"
    assert judged("languages", rows({"hope": [1.0], "deltanet": [1.0]}, part="41-100")).answer == "undecided"

    without = rows({"hope": good, "no-k": bad, "no-v": [1.0, 1.0, 1.0], "no-q": [0.9, 0.8, 1.0]}, part="bits")
    signs = judged("ablation", without)
    assert signs.answer == "no"
    assert re.search(r"no-k = \S+ ± \S+ helps; .*no-v = \S+ ± \S+ harms; .*no-q = \S+ ± \S+ undecided$", signs.rule)
    less = rows({"levels": good, "replay": bad}, part="kept")
    news = {0: [0.9] * 3, 1: [0.8] * 3}
    for new, answer in ((news[0], "yes"), (news[1], "no")):
        others = {"levels": new, "replay": [0.9] * 3}
        both = [{**row, "scores": {**row["scores"], "new": others[row["model"]][row["seed"]]}} for row in less]
        assert judged("continual", both).answer == answer

    kept = [{**row, "scores": {"kept": row["scores"]["train"], "bits": 0.0}} for row in rows({"1": bad, "2": good})]
    assert judged("levels", kept).answer == "yes"
    assert judged("levels", kept[::-1]).answer == "no"
    assert seeds_of(found + rows({"hope": [1.0]}, task="b")) == 1


# -- training ----------------------------------------------------------------------------------------------------------


def plan(folder: Path, **options: Any) -> Plan:
    given = {"models": ["deltanet"], "seeds": 2, "rates": (0.001, 0.01), "seconds": None, "steps": 2}
    given |= {"examples": 4, "quick": True, "store": Store(folder / "evidence.json"), "say": lambda text: None}
    return Plan(**{**given, **options})


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    subject = OnTask(build("task", "mod_3"))  # type: ignore[arg-type]
    said: list[str] = []
    first = trials.run({"mod_3": subject}, plan(tmp_path, say=said.append))
    assert len(said) == len(set(said)) == 3  # two rates, and one more seed
    assert len(first) == 2
    kept = json.loads((tmp_path / "evidence.json").read_text())
    for row in first:
        assert row in kept["rows"]
        assert (row["limit"], row["steps"]) == (TOKENS, 2)
        config = load_saved(tmp_path / row["run"] / "config.yaml")
        assert (config.optimizer.lr, config.train.seed) == (row["rate"], row["seed"])
        rest = {one["rate"] for one in first if one["model"] == row["model"]}
        assert rest == {row["rate"]}  # all seeds have the best rate of the first
        tried = [one for one in kept["rows"] if (one["model"], one["seed"]) == (row["model"], 0)]
        best = max(tried, key=lambda one: (one["scores"]["valid"], -one["bits"]))
        assert best["rate"] == row["rate"]
    kept["rows"] = kept["rows"][:2]
    (tmp_path / "evidence.json").write_text(json.dumps(kept))
    again: list[str] = []
    second = trials.run({"mod_3": subject}, plan(tmp_path, say=again.append))
    assert again == said[2:]
    without = [{k: v for k, v in row.items() if k not in ("seconds", "run")} for row in (*first, *second)]
    assert without[:2] == without[2:]  # the same again, to the last digit
    (tmp_path / "evidence.json").write_text('{"rows": 3}')
    with pytest.raises(CheckpointError, match="is damaged"):
        plan(tmp_path)


@pytest.mark.slow
def test_equal_seconds_and_then_equal_tokens(tmp_path: Path) -> None:
    subject = OnTask(build("task", "mod_3"))  # type: ignore[arg-type]
    models = ["deltanet", "transformer"]
    found = trials.run({"mod_3": subject}, plan(tmp_path, models=models, seconds=0.5, rates=(0.003,)))
    sizes = {row["parameters"] for row in found}
    assert max(sizes) <= 1.02 * min(sizes)
    timed, counted = ([row for row in found if row["limit"] == limit] for limit in (SECONDS, TOKENS))
    assert len(timed) == len(counted) == 4
    assert all(0.5 <= row["seconds"] < 1 for row in timed)
    assert {row["steps"] for row in counted} == {min(row["steps"] for row in timed if row["seed"] == 0)}


def test_the_example_is_the_model_that_tracks_a_state(tmp_path: Path) -> None:
    shown = load("examples/hope_counts.yaml").model
    subject = OnTask(build("task", "a_n_b_n"))  # type: ignore[arg-type]
    counts, tracks, transformer = (
        subject.config(model, plan(tmp_path)).model for model in ("hope-counts", "hope-tracks", "transformer")
    )
    assert shown.mixers == counts.mixers
    assert counts.mixers[0] == tracks.mixer
    assert (shown.out_norm, counts.out_norm, tracks.out_norm) == (False, False, None)
    assert abs(parameters(counts) - parameters(transformer)) <= 0.02 * parameters(transformer)
    assert [block.mixer.norm for block in build_model(counts).blocks] == [None, None]
    assert build_model(tracks).blocks[0].mixer.norm is not None


@pytest.mark.slow
@pytest.mark.parametrize("task", ["parity", "a_n_b_n"])
def test_hope_that_tracks_and_counts_reads_further_than_it_was_trained(task: str, tmp_path: Path) -> None:
    """300 steps, strings up to 40 long."""
    config = load("examples/hope_counts.yaml", [f"train.out={tmp_path}", f"data.task={task}"])
    result = train(config, quiet=True)
    subject = OnTask(build("task", task))  # type: ignore[arg-type]
    assert subject.score(result.run.load_model(), "41-100", 64) > 0.9


def test_a_model_that_is_measured_is_told_no_answers() -> None:
    task = build("task", "parity")
    mlp = {"level": "cms", "periods": [4], "learn": "context", "teach": "loss", "rate": 0.5}
    torch.manual_seed(0)
    model = HopeLM(4, 16, 1, 2, mlp=build("level", mlp))  # type: ignore[arg-type]
    examples = task.draw(8, torch.Generator().manual_seed(0))  # type: ignore[attr-defined]
    told, still, by_tokens = (
        model(examples.tokens, mask=examples.mask, **how)[0][examples.mask]
        for how in ({"targets": examples.targets}, {"learn": "mixer"}, {})
    )
    assert not torch.allclose(told, still)
    assert not torch.allclose(told, by_tokens)

    subject = OnTask(task)  # type: ignore[arg-type]
    with torch.no_grad():
        for level in model.blocks[0].mlp.levels.values():
            level.rate.fill_(math.nan)  # a model that learned would now say nothing
    assert subject.score(model, "train", 8) >= 0
    assert still.isfinite().all()


# -- toys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rate", [0.5, 1.0])
def test_steps_of_gradient_descent_are_those_of_the_equation(seed: int, rate: float) -> None:
    angle = 2 * math.pi * torch.rand((), generator=torch.Generator().manual_seed(seed)).item()
    x, y, t = 2 * math.cos(angle), 2 * math.sin(angle), 0
    first = 0.005 * x**2 + 0.5 * y**2
    while 0.005 * x**2 + 0.5 * y**2 > 1e-3 * first:
        x, y, t = x * (1 - 0.01 * rate), y * (1 - rate), t + 1
    level = build("level", "gd")
    assert isinstance(level, Level)
    assert steps_of(level, TOYS["times 100"], rate, seed, 5000) == t
    assert steps_of(level, TOYS["times 100"], 5.0, seed, 50) == 50  # which diverges


# -- small networks ----------------------------------------------------------------------------------------------------


def test_windows_of_parts_share_no_code() -> None:
    code = (Path(sysconfig.get_paths()["stdlib"]) / f"{networks.MODULES[0]}.py").read_bytes()
    seen: list[set[int]] = []
    for part, count in networks.COUNTS.items():
        begins = networks.starts(networks.MODULES[0], len(code), part)
        x, y = networks.windows(part)
        assert y.bincount().tolist() == [count] * 10
        counts = torch.zeros(512)
        for i in range(begins[3], begins[3] + 126):
            counts[(961 * code[i] + 31 * code[i + 1] + code[i + 2]) % 512] += 1
        torch.testing.assert_close(x[3], 8 * (counts / counts.sum()).sqrt())
        seen.append({byte for begin in begins for byte in range(begin, begin + 128)})
    assert sum(map(len, seen)) == len(set().union(*seen))
    assert max(map(max, seen)) < len(code)


def test_a_level_of_the_network_has_its_clock_and_replay_its_windows(tmp_path: Path) -> None:
    """Three residual blocks, of which the first steps once in 64 steps; and no window is of a class that is to come."""
    model = networks.network(0)
    clocks = [group.get("period", 1) for group in networks.groups(model, "levels")]
    assert clocks == [64, 8, 1, 1]
    assert {group.get("period", 1) for group in networks.groups(model, "replay")} == {1}
    every = sum(p.numel() for group in networks.groups(model, "levels") for p in group["params"])
    assert every == sum(p.numel() for p in model.parameters())
    few = networks.few([3, 5], torch.Generator().manual_seed(0))
    assert few is not None
    assert few.y.tolist() == [3] * 10 + [5] * 10
    found = networks.continual(plan(tmp_path, models=["finetuning", "replay"], seeds=1))
    kept = {row["model"]: row["scores"]["kept"] for row in found}
    assert kept["finetuning"] < kept["replay"] - 0.1


# -- the command -------------------------------------------------------------------------------------------------------


def test_what_there_is_and_what_can_not_be(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["evidence", "list"]) == 0
    said = capsys.readouterr().out
    assert all(re.search(rf"^{name} ", said, re.MULTILINE) for name in (*CLAIMS, "parity", "mqar", "needle"))
    for given, error in {
        "languges": "no claim or task is called 'languges'. Did you mean 'languages'?",
        "parity --models hope": "--models: 'hope' is not allowed; give two or more, each once",
        "parity --models hope detanet": "--models: 'detanet' is not allowed; no level is called 'detanet'",
        "languages --tasks parity parety": "--tasks: 'parety' is not allowed; give some of parity, aa_star",
        "toys --tasks valley": "--tasks: 'valley' is not allowed; the claim has no tasks to choose from",
        "continual --models levels rehearsal": "--models: 'rehearsal' is not allowed; give some of levels, finetuning",
        "ablation --models hope no-w": "--models: 'no-w' is not allowed; give some of hope, no-dgd",
        "levels --models 1 5": "--models: '5' is not allowed; give 1, 2, 3 or 4",
        f"parity --out {tmp_path / 'file'}": "can't be made, a file is in its way",
    }.items():
        (tmp_path / "file").touch()
        out = [] if "--out" in given else ["--out", str(tmp_path / "out")]
        assert main(["evidence", *given.split(), *out]) == 2
        assert error in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evidence", "parity", "--budget", "10"])
    assert "'10' is not allowed; give a time above 0, such as 90s, 10m or 2h" in capsys.readouterr().err


QUICK = {
    "languages": ("41-100", ["parity", "a_n_b_n"]),
    "recall": ("train", ["mqar 8 pairs", "facts, 1 hops"]),
    "mad": ("train", ["selective_copy", "memorise"]),
    "levels": ("kept", ["text"]),
    "toys": ("steps", [*TOYS]),
    "ablation": ("bits", ["text"]),
    "continual": ("kept", ["code, two modules a turn"]),
    "optimizers": ("test", ["origin of code, one pass"]),
    "language": ("learning", ["text"]),
    "needle": ("start", ["needle"]),
}


def columns(text: str) -> list[list[str]]:
    """A printed table without the time that it took, cell by cell."""
    head, *lines = [re.split(r" {2,}", line) for line in text.splitlines() if not line.startswith(("claim ", "in "))]
    return [[cell for name, cell in zip(head, line, strict=True) if name != "CPU s"] for line in lines]


@pytest.mark.slow
def test_what_the_page_shows_is_what_is_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown = columns((Path(__file__).parents[2] / "docs" / "evidence" / "mad-quick.txt").read_text())
    assert main(["evidence", "mad", "--quick", "-q", "--out", str(tmp_path)]) == 0
    printed = columns(capsys.readouterr().out)
    assert [line[:5] for line in printed] == [line[:5] for line in shown]
    for one, other in zip(printed, shown, strict=True):
        assert float(one[-2]) == pytest.approx(float(other[-2]), abs=0.02)


def test_rules_of_their_own_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    learns = {"level": "cms", "learn": "context", "teach": "loss"}
    for mlps in (
        [{**learns, "periods": [32]}, {**learns, "periods": [16, 64]}],
        [{"level": "cms", "periods": [1]}, {"level": "cms", "periods": [1, 8]}],
    ):
        config = Config.from_data({"model": {"mixer": "deltanet", "dim": 16, "heads": 2, "mlps": mlps}})
        with pytest.raises(ConfigError, match=r"model.mlps: .* another rule than the MLPs before it"):
            like(config, "transformer")


@pytest.mark.slow
@pytest.mark.parametrize("name", QUICK)
def test_a_quick_one_prints_a_table_and_a_verdict(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["evidence", name, "--quick", "-q", "--out", str(tmp_path)]
    assert main(given) == 0
    said = capsys.readouterr().out
    part, tasks = QUICK[name]
    models = CLAIMS["recall" if name == "needle" else name].models
    head, *lines = said.splitlines()
    assert head.split()[:3] == ["task", "limit", "model"]
    assert part in head
    for task in tasks:
        for model in models:
            assert any(line.startswith(f"{task} ") and f" {model} " in line for line in lines), (task, model)
    (verdict,) = [line for line in lines if line.startswith("claim ")]
    assert re.search(rf"^claim {name}: .*verdict: undecided \(.*; 1 seed, and 3 are needed\)$", verdict)
    kept = json.loads((tmp_path / "evidence.json").read_text())
    assert kept["command"] == f"nestopt evidence {name} --quick --out {tmp_path}"
    assert kept["verdict"]["answer"] == "undecided"
    assert {(row["task"], row["model"]) for row in kept["measured"]} == {(t, m) for t in tasks for m in models}
    for row in kept["measured"]:
        assert {"seed", "rate", "steps", "scores"} <= row.keys()
        assert name == "toys" or {"parameters", "seconds"} <= row.keys()
        assert math.isfinite(row["scores"][part])
    assert (tmp_path / "evidence.png").stat().st_size > 5000
    assert main(given) == 0  # and nothing is measured again
    assert capsys.readouterr().out == said
