"""The prepared GPU run: that a part which fails or hangs gives what it has, and that its checks can fail."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import nestopt
from benchmarks import gpu
from benchmarks.gpu_parts import (
    MARGIN_S,
    NO_TIME,
    PARTS,
    TOTAL_S,
    Part,
    capture,
    ops,
    optimizer_speed,
    optimizers,
    planned,
    runner,
    summary,
    values,
    waits,
)
from benchmarks.gpu_parts.clock import interleave
from benchmarks.gpu_parts.runner import Ended
from benchmarks.gpu_parts.setting import Row, Setting, attempts, error_of
from benchmarks.rows import Missing

BAD = "tests.benchmarks.gpu_bad_parts"
TINY = Setting(tiny=True)


# -- the command -------------------------------------------------------------------------------------------------------


def test_parts_are_modules_in_the_order_of_their_weight() -> None:
    names = [part.name for part in PARTS]
    assert names[:2] == ["rates", "optimizers"]
    assert len(set(names)) == len(names)
    for part in PARTS:
        assert callable(importlib.import_module(part.where).run)


def test_all_limits_fit_into_eight_minutes() -> None:
    assert TOTAL_S == 480
    assert sum(part.limit_s for part in PARTS) <= TOTAL_S - 5  # the command's own
    assert min(part.limit_s for part in PARTS) > MARGIN_S + 10  # a start of a process takes its time


def test_the_readme_has_the_limit_of_every_part() -> None:
    text = (Path(gpu.__file__).parent / "README.md").read_text(encoding="utf-8")
    table = [line.split("|")[1:3] for line in text[text.index("| part | s |") :].splitlines() if line.startswith("|")]
    found = {}
    for names, limits in table[2:]:
        found |= dict(zip(names.replace("`", "").split(","), map(float, limits.split(",")), strict=True))
    assert {name.strip(): limit for name, limit in found.items()} == {part.name: part.limit_s for part in PARTS}


def test_a_part_that_dies_gives_its_rows_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["rates", "dies", "after"]
    parts = [Part(name, f"it {name}", 60.0, BAD) for name in names]
    assert gpu.all_parts(_given(tmp_path), "cpu", parts, time.monotonic()) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())
    by_name = {part["part"]: part for part in found["parts"]}
    assert [by_name[name]["how"] for name in names] == ["done", "died", "done"]
    assert by_name["dies"]["words"].startswith("ended by SIGABRT")
    for part in found["parts"]:
        assert part["rows"][0]["name"] == "first"
        assert part["rows"][0]["values"] == {"ms": 1.0, "nan": "nan"}
    # what one has found is told to those after it, and is where a plan looks for it
    rates = {"per_launch_s": 1e-6, "flops_per_s": {"float32": 1.0}}
    assert found["rates"] == rates
    told, bad, good = by_name["after"]["rows"][1:]
    assert told["values"]["rates"] == str(rates)
    assert (bad["outcome"], bad["words"]) == ("failed", "ValueError: a row that fails")
    assert (good["outcome"], good["values"]) == ("passed", {"error": 1e-7, "bound": 1e-6})
    assert found["machine"]["nestopt"] == nestopt.__version__
    said = capsys.readouterr().out
    assert "[2/3] dies: it dies (at most 60 s)" in said
    assert said.rindex("| all ") < said.rindex("1 failed (after: bad); dies died.")
    assert "its last words" in (tmp_path / "gpu.log").read_text()


def test_a_part_that_hangs_is_ended_with_what_it_has_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "WORKER", "tests.benchmarks.gpu_light_worker")
    ended, told = Ended("x"), []
    begun = time.monotonic()
    runner.run(Part("x", "", 3.0), {}, 3.0, tmp_path / "log", ended, told.append)
    assert 3 <= time.monotonic() - begun < 10
    assert (ended.how, ended.words) == ("killed", "its 3 s were up; it was nowhere that it said")
    (row,) = ended.rows
    assert told == [{"row": row}]
    assert _is_gone(row["values"]["pid"])


@pytest.mark.slow
def test_where_a_part_hung_is_said_and_what_another_raised(tmp_path: Path) -> None:
    parts = [Part("hangs", "", 20.0, BAD), Part("raises", "", 60.0, BAD), Part("after", "", 60.0, BAD)]
    gpu.all_parts(_given(tmp_path), "cpu", parts, time.monotonic())
    hung, raised, after = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (hung["how"], raised["how"], after["how"]) == ("killed", "died", "done")
    assert raised["words"] == "exit status 1: RuntimeError: not one of its rows"
    assert "gpu_bad_parts.py, line " in hung["words"]
    assert "wait_for_ever" in hung["words"]
    assert [row["name"] for row in hung["rows"]] == ["first", "child"]
    assert _is_gone(hung["rows"][1]["values"]["pid"])


def _given(out: Path, *more: str) -> gpu.argparse.Namespace:
    return gpu.arguments(["--tiny", "--out", str(out), *more])


def _is_gone(pid: int) -> bool:
    """Whether a process that was killed ends soon; one that nobody waits for stays listed as a zombie."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


def test_a_budget_that_is_spent_ends_the_run_and_says_so(tmp_path: Path) -> None:
    parts = [Part("rates", "", 60.0, BAD)]
    assert gpu.all_parts(_given(tmp_path, "--budget", "1"), "cpu", parts, time.monotonic()) == 1
    (part,) = json.loads((tmp_path / "gpu.json").read_text())["parts"]
    assert (part["how"], part["words"]) == ("not run", "no time was left for it")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
def test_without_a_device_it_says_so_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "finds no CUDA device here" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_module"))
    assert gpu.main(["--tiny"]) == 2
    assert "not installed here: no_such_module" in capsys.readouterr().out


@pytest.mark.parametrize("budget", ["0", "-1", "nan", "inf"])
def test_a_budget_that_is_none_is_refused(budget: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.arguments(["--budget", budget])
    assert f"--budget {float(budget)} is not allowed" in capsys.readouterr().err


# -- the summary -------------------------------------------------------------------------------------------------------


def _rows(*rows: Row) -> list[dict[str, object]]:
    return [dataclasses.asdict(row) for row in rows]


def test_the_text_has_failures_first_and_the_table_last() -> None:
    checks = _rows(
        Row.of("one", 0.5, 1.0),
        Row.of("two", 0.9, 1.0),
        Row.of("three", math.nan, 1.0),
        *(Row(f"s{i}", "skipped", "no CUDA") for i in range(6)),
    )
    speeds = _rows(
        Row("a", "measured", values={"ms": 12.345, "n": 3, "× b": None}),
        Row("b", "measured", "settled", {"ms": 4e-5, "n": 4}),
        Row("c", "measured", values={"GB": 2.0}),
        Row("d", "skipped", NO_TIME),
    )
    parts = [Ended("checks", checks, 1.2, 9.0, "done"), Ended("speeds", speeds, 3.4, 9.0, "killed", "it was at x")]
    brief = summary.text({"card": "X"}, "go", parts, brief=True)
    assert "- card: X" in brief
    assert "- **failed** three · error nan; bound 1.00 · beyond its bound" in brief
    assert "- passed: 2; nearest to its bound: two, 0.900 of 1.00" in brief
    assert "- skipped (no CUDA): s0, s1, s2, … 6 in all" in brief
    assert "**killed**: it was at x" in brief
    assert [line.split("|")[1:-1] for line in brief.splitlines() if line.startswith("| a ")] == [
        [" a   ", " 12.3    ", " 3    "]
    ]
    assert "| b   | 4.0e-05 | 4    |" in brief
    assert "- b: settled" in brief
    assert "- c: GB 2.00" in brief
    last = brief.rstrip().splitlines()[-1]
    assert last == "1 failed (checks: three); speeds killed; there was no time left for 1."
    (total,) = [line.split("|")[1:-1] for line in brief.splitlines() if line.startswith("| all ")]
    assert [cell.strip() for cell in total] == ["all", "2", "1", "3", "7", "5", "18", ""]
    whole = summary.text({}, "go", parts)
    assert "| two" in whole
    assert "s5" in whole
    assert "\n\n\n" not in whole + brief
    assert not summary.well(parts, whole=False)
    assert json.loads(json.dumps(summary.data({}, "go", parts)))["rates"] == {}


def test_a_run_that_left_something_out_for_time_is_well_on_a_card_but_not_in_small() -> None:
    parts = [Ended("p", _rows(Row("x", "skipped", NO_TIME)), how="done")]
    assert summary.well(parts, whole=False)
    assert not summary.well(parts, whole=True)
    assert summary.verdict(parts) == "Nothing failed, and all parts came to their end; there was no time left for 1."


# -- rows --------------------------------------------------------------------------------------------------------------


def test_attempts_say_what_is_missing_what_fails_and_where(capsys: pytest.CaptureFixture[str]) -> None:
    def missing() -> Row:
        raise Missing("not installed: this")

    def wrong() -> Row:
        nestopt.layer("adamw", dim=8)(torch.zeros(1, 2, 8))
        raise AssertionError

    found = list(attempts(TINY, [("a", missing), ("b", wrong), ("c", lambda: Row("c", "passed"))]))
    assert [row.outcome for row in found] == ["skipped", "failed", "passed"]
    assert found[0].words == "not installed: this"
    assert found[1].words.startswith("ValueError: adamw: weight decay needs the parameter")
    assert "(at " in found[1].words
    assert "Traceback" in capsys.readouterr().err  # in the log
    (peer,) = attempts(TINY, [("b", wrong)], peers=True)
    assert peer.outcome == "skipped"
    late = Setting(until=time.monotonic() + 0.5)
    assert [row.words for row in attempts(late, [("a", missing)])] == [NO_TIME]


def test_an_error_is_relative_and_nan_is_beyond_every_bound() -> None:
    true = torch.tensor([3.0, 4.0])
    assert error_of(true * 1.01, true) == pytest.approx(0.01, rel=1e-4)
    assert error_of(torch.tensor([0.5]), torch.zeros(1)) == 0.5
    for broken in (math.nan, math.inf):
        assert Row.of("x", error_of(torch.tensor([broken, 4.0]), true), 1e9).outcome == "failed"


def test_times_are_in_turn_and_ratios_within_a_round() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name) or time.sleep(0.002)) for name in "abc"}
    found = interleave(TINY, calls, 3, math.inf, "a")
    assert "".join(order) == "abcbcacab"
    assert found["b"].rounds == 3
    assert found["a"].ratio == 1
    assert found["b"].ratio is not None
    order.clear()
    assert interleave(TINY, calls, 3, time.monotonic() - 1, "a")["c"].rounds == 1


# -- checks that can fail ----------------------------------------------------------------------------------------------


def _compared(case: optimizers.Case, *, capturable: bool = False, dtype: torch.dtype = torch.float32) -> Row:
    return optimizers._compared(TINY, "x", case, capturable, dtype)


def test_an_optimizer_that_is_a_little_wrong_fails() -> None:
    case = optimizers.CASES["AdamW"]
    assert _compared(case).outcome == "passed"
    wrong = dataclasses.replace(case, ours=optimizers._named("AdamW", weight_decay=0.1, eps=1e-6))
    assert _compared(wrong).outcome == "failed"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_that_makes_nan_fails(dtype: torch.dtype) -> None:
    class Broken:
        """As AdamW was on CUDA: both bias corrections 0."""

        def __init__(self, model: nn.Module, capturable: bool) -> None:
            self.params: list[Tensor] = list(model.parameters())

        @torch.no_grad()
        def step(self) -> None:
            for param in self.params:
                param.div_(0 * param)

    row = _compared(dataclasses.replace(optimizers.CASES["AdamW"], ours=Broken), dtype=dtype)
    assert row.outcome == "failed"
    assert math.isnan(row.values["error"])


def test_muon_is_compared_with_torch_on_what_it_is_given() -> None:
    model = optimizers.Small()
    ours = nestopt.optimizer(model, "muon")
    (hidden,) = [group["param_names"] for group in ours.param_groups if "muon" in ours.level(group).label]
    assert sorted(hidden) == sorted(optimizers.HIDDEN)


def test_every_operation_has_a_case() -> None:
    cases = {case.op for case in values.CASES.values()}
    assert cases - {"layer"} == set(nestopt.ops.__all__) - {"fast_form"}


def test_every_level_is_run_as_what_it_can_be() -> None:
    levels = set(nestopt.levels.list())
    assert levels <= set(waits.LAYERS) | waits.NOT_LAYERS | waits.WAIT
    assert levels <= set(waits.STACKS) | waits.NOT_STACKS
    assert levels <= set(capture.STACKS) | waits.NOT_STACKS
    for name in waits.NOT_LAYERS - waits.COMPOSITES:
        with pytest.raises(ValueError, match=name):
            nestopt.layer(name, dim=8)(torch.zeros(1, 2, 8))


def test_values_come_back_from_their_file_and_are_small(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "values.safetensors"
    made = values.make()
    values.write(path, made, {"plans": {"hope-340m": {"memory": 1}}})
    assert path.stat().st_size < 12e6
    assert values.meta(path)["plans"]["hope-340m"] == {"memory": 1}
    back = values.read(path)
    assert back.keys() == made.keys()
    assert all(torch.equal(back[key], value) for key, value in made.items())
    assert values.meta(tmp_path / "none") == {}
    # a value that is wrong is seen, and inputs that are others are refused
    name = "delta_rule, decay"
    assert ops._compared(TINY, name, "float32", back).outcome == "passed"
    off = {**back, f"{name}/grad.lr": back[f"{name}/grad.lr"] * 1.001}
    row = ops._compared(TINY, name, "float32", off)
    assert (row.outcome, row.values["worst"]) == ("failed", "grad.lr")
    values.write(path, {**back, f"{name}/in.q": back[f"{name}/in.q"] + 1}, {})
    with pytest.raises(ValueError, match="is of other inputs for 'delta_rule, decay'"):
        values.read(path)


def test_every_input_and_every_state_of_a_case_is_compared() -> None:
    found = values.evaluate("deep_memory, by chunks, all gates", "cpu", torch.float64)
    grads = {"q", "k", "v", "lr", "decay", "momentum", "W1", "W2"}
    assert {key for key in found if key.startswith("grad.")} == {f"grad.{name}" for name in grads}
    assert len([key for key in found if key.startswith("out.")]) == 5  # the answer, two weights and their momenta


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_the_transformer_whose_parameters_are_stepped_has_370m() -> None:
    shapes = optimizer_speed.shapes(tiny=False)
    assert len(shapes) == 147
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == pytest.approx(370e6, rel=0.01)


@pytest.mark.parametrize("name", planned.MODELS)
def test_what_is_trained_is_the_published_run_in_one_small_step(name: str) -> None:
    config, given = planned.config(name), nestopt.load(planned.SETTINGS, [f"model={name}"])
    assert config.model == given.model
    assert config.optimizer == given.optimizer
    assert (config.data.batch, config.data.window, config.train.accumulate) == (2, 4096, 1)
    assert (config.train.engine, config.train.dtype, config.train.learn) == ("single", "bfloat16", "mixer")
    tiny = planned.config(name, tiny=True)
    assert tiny.model.dim == 32
    assert type(tiny.model.mixer) is type(config.model.mixer)
    assert tiny.model.mlp.learn == config.model.mlp.learn


def test_a_plan_is_told_at_the_rates_that_were_measured() -> None:
    counted = planned.count("transformer-340m", tiny=True)
    assert counted["memory"] > 0
    assert all(flops > 0 for flops in counted["products"].values())
    plan = {"launches": 1000, "bytes": 4e9, "products": {"float32": 6e12, "bfloat16": 8e12}}
    rates = {"per_launch_s": 5e-6, "bytes_per_s": 2e12, "flops_per_s": {"float32": 5e13, "bfloat16": 5e14}}
    assert planned.seconds(plan, rates) == pytest.approx({"launches": 0.005, "bytes": 0.002, "products": 0.136})
    assert planned.seconds(plan, {}) == {}


# -- parts -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_parts_run_in_small_from_the_command(tmp_path: Path) -> None:
    only = ["rates", "layers", "optimizer_speed", "training", "fsdp2"]
    assert gpu.main(["--tiny", "--device", "cpu", "--out", str(tmp_path), "--budget", "2000", "--only", *only]) == 0
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert set(found["rates"]) == {"per_launch_s", "bytes_per_s", "flops_per_s"}
    assert set(found["rates"]["flops_per_s"]) == {"float32", "tf32", "bfloat16"}
    parts = {part["part"]: {row["name"]: row for row in part["rows"]} for part in found["parts"]}
    assert list(parts) == only
    for name in planned.MODELS:
        row = parts["training"][name]["values"]
        assert row["tokens/s"] == pytest.approx(128 / row["step, s"])
        assert row["plan, GB"] > 0
        assert row["binds"]
    for row in parts["layers"].values():
        if row["outcome"] == "measured":
            assert row["values"]["training, ms"] > 0
    assert parts["layers"]["attention block"]["values"]["forward, × attention"] == 1
    assert all(row["outcome"] == "measured" for row in parts["optimizer_speed"].values())
    assert all(row["outcome"] == "passed" for row in parts["fsdp2"].values())
