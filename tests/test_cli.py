"""The command line, as a person types it."""

import pytest

from nestopt.cli import main
from nestopt.config import Config


@pytest.fixture
def run(capsys):
    """Run a command; gives (status, stdout, stderr)."""

    def go(*args):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as stop:
            status = stop.code
        out = capsys.readouterr()
        return status, out.out, out.err

    return go


SMALL = [
    "model.dim=16",
    "model.blocks=1",
    "model.heads=2",
    "data.window=32",
    "data.batch=4",
    "train.steps=6",
    "train.final_bytes=300",
    "train.sample_bytes=10",
    "train.device=cpu",
]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "own text.txt"
    path.write_text("the level remembers; the clock forgets. " * 500)
    return path


def test_train_generate_describe_resume(run, text, tmp_path):
    status, out, err = run("train", "--data", text, "--out", tmp_path / "runs", *SMALL)
    assert status == 0, err
    assert "this model" in out
    folder = tmp_path / "runs" / "001"

    status, out, _ = run("generate", folder, "--length", 12, "--temperature", 0, "--prompt", "the ")
    assert status == 0
    assert out.startswith("the ")
    assert run("generate", folder, "--length", 12, "--temperature", 0, "--prompt", "the ")[1] == out

    status, out, _ = run("describe", folder)
    assert status == 0
    for word in ("window", "muon", "every token", "every 32 tokens", "every step"):
        assert word in out
    assert run("describe", folder, "--format", "mermaid")[1].startswith("flowchart")
    assert run("describe", folder, "--format", "svg")[1].startswith("<svg")

    metrics = (folder / "metrics.jsonl").read_bytes()
    status, out, err = run("train", "--resume", folder)  # it has ended, before a checkpoint was due
    assert status == 0, err
    assert "ended at step 6" in out
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    status, _, err = run("train", "--resume", folder, "-q", "train.steps=9")
    assert status == 0, err
    assert (folder / "metrics.jsonl").read_bytes().startswith(metrics)


def test_generate_takes_another_precision_than_the_run_had(run, text, tmp_path):
    status, _, err = run("train", "--data", text, "--out", tmp_path / "runs", "model.precision=bfloat16", *SMALL)
    assert status == 0, err
    folder = tmp_path / "runs" / "001"
    status, out, _ = run("generate", folder, "--length", 5, "--precision", "float32")
    assert status == 0
    assert out.startswith("def ")
    status, _, err = run("generate", folder, "--length", 5, "--precision", "tf32")
    assert status == 2
    assert "model.precision: 'tf32' is not allowed; the device is 'cpu'" in err
    assert "made in bfloat16" in run("describe", folder)[1]


def test_a_config_file_with_overrides(run, text, tmp_path):
    config = tmp_path / "small.yaml"
    config.write_text("model: {mixer: linear_attention}\noptimizer: {stack: [momentum, adam], lr: 0.001}\n")
    status, _, err = run(
        "train", config, "-q", "--data", text, "--out", tmp_path / "runs", *SMALL, "optimizer.stack[0].beta=0.5"
    )
    assert status == 0, err
    saved = Config.from_data(__import__("yaml").safe_load((tmp_path / "runs/001/config.yaml").read_text()))
    assert saved.optimizer.stack.levels["momentum"].beta == 0.5
    assert saved.model.mixer.label == "linear_attention"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["train", "optimizer.lrr=1"], ["optimizer.lrr", "Did you mean 'lr'"]),
        (["train", "optimizer.stack.beta=2.0"], ["optimizer.stack.beta", "2.0", "[0, 1]"]),
        (["train", "model.mixer=titan"], ["model.mixer", "Did you mean 'titans'"]),
        (["train", "model.heads=3"], ["model.heads", "3", "dim=128"]),
        (["train", "no_such.yaml"], ["no_such.yaml"]),
        (["train", "--data", "no_such.txt"], ["no_such.txt", "does not exist"]),
        (["train", "--resume", "no_such_run"], ["no_such_run", "no config.yaml"]),
        (["train", "model.mlp=adam"], ["model.mlp", "cms"]),
        (["train", "train.engine=fsdp"], ["train.engine", "fsdp2"]),
        (["train", "train.zero_stage=1"], ["train.zero_stage", "engine=deepspeed"]),
        (["train", "train.device=quantum"], ["train.device", "quantum"]),
        (["train", "train.device=meta"], ["train.device", "meta", "no numbers"]),
        (["train", "train.device=mps:0"], ["train.device", "mps:0", "no such device"]),
        (["generate", "no_such_run"], ["no_such_run"]),
        (["describe", "no_such.yaml"], ["no_such.yaml"]),
        (["-p", "lion", "levels"], ["-p lion", "no:NAME"]),
    ],
)
def test_mistakes_are_explained_without_a_traceback(run, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*args)
    assert status == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err


def test_the_default_run_is_within_its_time():
    """`nestopt train` alone: the file that says what it does is read, and its limit leaves room in four minutes."""
    from nestopt.cli import _config

    config = _config([])
    assert config.train.seconds == 180
    assert config.data.dataset.label == "stdlib"
    assert _config(["train.seconds=null"]).train.seconds is None


def test_lists(run):
    status, out, _ = run("levels")
    assert status == 0
    for word in ("momentum", "titans", "newton_schulz", "stdlib", "mlp"):
        assert word in out
    status, out, _ = run("plugins")
    assert status == 0
    assert "level momentum" in out


def test_doctor(run):
    status, out, _ = run("doctor")
    assert status == 0, out
    for word in ("torch", "deepspeed", "devices: cpu", "all well"):
        assert word in out


def test_describe_a_stack(run, tmp_path):
    path = tmp_path / "stack.yaml"
    path.write_text("level: parallel\nlevels: [muon, {level: muon, period: 16}]\n")
    status, out, _ = run("describe", path)
    assert status == 0
    assert "every 16 steps" in out
