"""A run stops, or leaves a step out, where something is not finite; what processes are told of one another."""

import json
import math
import re
import signal

import pytest
import torch

from nestopt.cli import main
from nestopt.core.device import WaitError, no_exceptions
from nestopt.optim.sharded.optimizer import Sharded
from nestopt.train.checkpoints import file as checkpoint
from nestopt.train.checkpoints.index import read_index
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.engines import peers
from nestopt.train.engines.alike import facts
from nestopt.train.engines.finite import Finite
from nestopt.train.engines.peers import differences
from nestopt.train.errors import TrainingError
from nestopt.train.folder import INDEX
from nestopt.train.loop import train
from nestopt.train.objective import Objective
from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from nestopt.train.training import Training
from tests.train.test_loop import config, rows


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("levels remember gradients and tokens alike. " * 400)
    return path


def poisoned(monkeypatch, *, loss=(), gradient=()):
    """Let the losses of some steps, or one gradient, be NaN."""
    forward, count = Objective.forward, 0

    def wrong(self, *args):
        nonlocal count
        count += 1
        found = forward(self, *args)
        if count in loss:
            return found * math.nan
        return found + 0.0 * (self.lm.norm.weight.sum() * 0.0).sqrt() if count in gradient else found

    monkeypatch.setattr(Objective, "forward", wrong)


@pytest.mark.parametrize("save_every", [0, 4, 6])
@pytest.mark.parametrize(("kind", "what"), [("loss", "the loss"), ("gradient", "the gradient of norm.weight")])
def test_a_step_that_is_not_finite_stops_the_run_before_it_is_in_a_weight(
    text, tmp_path, monkeypatch, kind, what, save_every
):
    poisoned(monkeypatch, **{kind: (7,)})
    with pytest.raises(TrainingError, match=rf"^step 7: {what} is not finite in process 0;"):
        train(config(text, tmp_path, train__save_every=save_every), quiet=True)
    run = Run.open(tmp_path / "001")
    assert not run.model_file.exists()
    assert (run.path / "checkpoint.json").exists() == bool(save_every)
    if save_every:
        with ShardReader(run.path) as parts:
            assert parts.meta["step"] == save_every
            assert all(parts.whole(key).isfinite().all() for key in parts.keys() if key.startswith("model."))  # noqa: SIM118
        monkeypatch.undo()
        assert train(resume=run.path, quiet=True).finished


def test_the_command_says_so_and_does_not_exit_with_0(text, tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, loss=(3,))
    path = tmp_path / "config.yaml"
    path.write_text(config(text, tmp_path).to_yaml())
    assert main(["train", str(path), "-q"]) == 1
    assert capsys.readouterr().err.startswith("nestopt: step 3: the loss is not finite in process 0;")


@pytest.mark.parametrize("stack", ["muon", {"level": "momentum", "period": 3}, "dgd"])
def test_a_skipped_step_is_none_to_weights_and_clocks(text, tmp_path, monkeypatch, stack):
    """Interrupted after it or not, the run is the one whose optimizer was not called."""
    given = {"optimizer__stack": stack, "train__log_every": 1, "train__steps": 12}
    poisoned(monkeypatch, loss=(5,), gradient=(8,))
    skipping = config(text, tmp_path / "skip", train__on_nonfinite="skip", train__save_every=6, **given)
    run = train(skipping, quiet=True).run
    records = [line for line in read(run.metrics_file) if "train/skipped" in line]
    assert [line["train/skipped"] for line in records] == [0] * 4 + [1] * 3 + [2] * 5
    monkeypatch.undo()

    update, calls = Sharded.step, 0

    def without(self, closure=None):
        nonlocal calls
        calls += 1
        return self.forget_inputs() if calls in (5, 8) else update(self, closure)

    monkeypatch.setattr(Sharded, "step", without)
    other = train(config(text, tmp_path / "without", **given), quiet=True).run
    monkeypatch.undo()
    ours, theirs = (checkpoint.load(one.model_file)[0] for one in (run, other))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())

    poisoned(monkeypatch, loss=(5,))

    def interrupting(self):
        if self.step == 6:
            signal.raise_signal(signal.SIGINT)
        return go_on(self)

    go_on = Training._update
    monkeypatch.setattr(Training, "_update", interrupting)
    part = train(skipping, quiet=True)
    monkeypatch.undo()
    assert part.step == 7
    with ShardReader(part.run.path) as parts:
        assert parts.meta["skipped"] == [1, 0]
    poisoned(monkeypatch, gradient=(1,))  # step 8
    again = train(resume=part.run.path, quiet=True).run
    assert rows(again) == rows(run)
    assert all(torch.equal(checkpoint.load(again.model_file)[0][name], value) for name, value in ours.items())


def test_a_run_that_skips_too_many_in_a_row_stops(text, tmp_path, monkeypatch):
    poisoned(monkeypatch, loss=range(3, 100))
    with pytest.raises(TrainingError, match=r"^step 13: the loss is not finite in process 0, and so were the 10 steps"):
        train(config(text, tmp_path, train__on_nonfinite="skip"), quiet=True)


KEYS = ["model.embedding.weight", "model.head.weight", "optimizer.embedding.weight|exp_avg"]


@pytest.mark.parametrize("key", KEYS)
def test_what_is_not_finite_is_not_saved(text, tmp_path, monkeypatch, key):
    """Also where the optimizer's own step has made it so: at the next evaluation or save, and at the end."""
    update = Training._update

    def wrong(self):
        found = update(self)
        if self.step == 9:
            items = dict((*self.engine.checkpoints.weights(), *self.optimizer.states()))
            items[key].values.view(-1)[3] = math.inf if key.startswith("model") else math.nan
        return found

    monkeypatch.setattr(Training, "_update", wrong)
    said = rf"^step 10: {re.escape(key)} is not finite in process 0; it is not saved"
    for settings in ({}, {"train__save_every": 0}, {"train__eval_every": 0, "train__steps": 10}):
        with pytest.raises(TrainingError, match=said):
            train(config(text, tmp_path, **settings), quiet=True)
    assert not list(tmp_path.rglob("model.safetensors"))
    assert not list(tmp_path.rglob("checkpoint.json"))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("key", KEYS)
def test_what_is_not_finite_is_not_gone_on_with(text, tmp_path, key, value):
    run = train(config(text, tmp_path), quiet=True).run
    part = run.path / read_index(run.path / INDEX).files[0]
    tensors, meta = checkpoint.load(part)
    tensors[key].view(-1)[-1] = value
    checkpoint.save(part, tensors, meta)
    with pytest.raises(checkpoint.CheckpointError, match=rf"checkpoint.json: {re.escape(key)} is not finite"):
        train(resume=run.path, quiet=True)


def test_steps_are_noted_without_a_wait_for_an_accelerator():
    """On a meta tensor nothing can be asked for; the first step and tensor are told from all that were noted since."""
    notes = Finite()
    with no_exceptions():
        for notes.step in range(3):
            notes.note("a", torch.ones(3, 3, device="meta"))
            notes.note("b", torch.ones((), device="meta"))
            notes.end_step()
        assert notes.noted
        with pytest.raises(WaitError):
            notes.take()
    for notes.step in range(1, 6):
        notes.note("loss", torch.tensor(1.0))
        notes.note("x", torch.tensor([1.0, 3.4e38, math.nan if notes.step == 3 else 0.0]))
        notes.note("y", torch.tensor([-math.inf if notes.step >= 3 else 0.0, 1.0], dtype=torch.bfloat16))
        notes.note("empty", torch.empty(0))
        notes.end_step()
    assert notes.take() == (3, "x")
    assert not notes.noted


# -- several processes -------------------------------------------------------------------------------------------------


def test_what_differs_is_named_with_who_has_it():
    facts = [
        {"a": 1, "b": [1, 2], "c": 0},
        {"a": 1, "b": [1, 3], "c": 0},
        {"a": 1, "b": [1, 2]},
        {"a": 1.5, "b": [1, 2], "c": 0},
    ]
    assert [f"{key}: {said}" for key, said in differences(facts)] == [
        "a: processes 0, 1, 2 have 1, process 3 has 1.5; start all processes with the same",
        "b: processes 0, 2, 3 have [1, 2], process 1 has [1, 3]; start all processes with the same",
        "c: processes 0, 1, 3 have 0, process 2 has nothing; start all processes with the same",
    ]
    assert differences(facts[:1] * 3) == []
    assert differences([{"a": True}, {"a": 1}])
    assert differences([{"a": "x" * 500 + "y"}, {"a": "x" * 500 + "z"}])  # also where a message cuts them short


def test_a_run_s_facts_are_its_configuration_versions_and_plugins(text, tmp_path):
    one = facts(config(text, tmp_path), torch.device("cpu"), None)
    assert json.loads(json.dumps(one)) == one
    assert {"train.seed", "optimizer.lr", "data.batch", "model.mixer", "torch", "python", "nestopt"} <= one.keys()
    other = facts(config(text, tmp_path, train__threads=3, train__seed=5), torch.device("cpu"), "runs/001")
    assert [key for key in one if one[key] != other[key]] == ["train.seed", "--resume"]


def test_one_process_is_nobody_s_peer():
    with peers.watching() as watch:
        watch.join(1.0)
        watch.compare({"a": 1})
        with peers.watching() as inner:
            assert inner is watch
    with pytest.raises(ZeroDivisionError), peers.watching():
        raise ZeroDivisionError
    assert peers.present() is not watch
