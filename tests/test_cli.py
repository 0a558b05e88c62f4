"""The command line, as a person types it."""

import contextlib
import os
import struct
import subprocess
import sys

import pytest

import nestopt
from nestopt.cli import main
from nestopt.config import Config

fcntl, pty, termios = (pytest.importorskip(name) for name in ("fcntl", "pty", "termios"))
COMMAND = [sys.executable, "-m", "nestopt"]


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
        (["train", "model.heads=3"], ["model.heads", "3", "dim=160"]),
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
        (["levels", "-p", "lion"], ["-p lion", "no:NAME"]),
        (["train", "train.seed=1", "-p", "lion", "train.steps=3"], ["-p lion", "no:NAME"]),
        (["train", "optimizer.stack=AdamW"], ["on the command line: optimizer.stack", "Did you mean 'adamw'"]),
        (["train", "data.dataset=STDLIB"], ["data.dataset", "Did you mean 'stdlib'"]),
        (["train", "train.steps=null"], ["on the command line: train.steps: null is not allowed"]),
        (["train", "model.tie=null"], ["model.tie: null is not allowed; give true or false"]),
        (["train", "optimizer.lr=[1"], ["on the command line: 'optimizer.lr=[1' is not allowed"]),
        (["describe", "AdamW"], ["no file, run or level is called 'AdamW'", "Did you mean 'adamw'"]),
        (["describe", "adamw", "epss=1"], ["on the command line: epss: 1", "Did you mean 'eps'"]),
        (["levels", "Titans"], ["'Titans'", "Did you mean 'titans'"]),
        (["plan", "--gpus", "0"], ["--gpus: 0 is not allowed; give a whole number, 1 or more"]),
        (["plan", "--zero", "0"], ["--zero: 0 is not allowed; it is about a run on many GPUs"]),
        (["plan", "--tokens", "0"], ["--tokens: 0 is not allowed"]),
        (["plan", "--launch", "0"], ["--launch: 0.0 is not allowed"]),
        *(
            (["plan", "--gpus", "2", "--engine", "ddp", f"--{flag}", "0"], [f"--{flag}: 0", "is not allowed; give"])
            for flag in ("memory", "share", "bandwidth", "launch", "tokens")
        ),
        (["generate", "r", "--length", "-1"], ["--length: '-1' is not allowed; give a whole number, 0 or more"]),
        (["generate", "r", "--top-k", "0"], ["--top-k: '0' is not allowed; give a whole number, 1 or more"]),
        (["generate", "r", "--top-p", "0"], ["--top-p: '0' is not allowed; give a number above 0, 1 at the most"]),
        (["generate", "r", "--temperature", "nan"], ["--temperature: 'nan' is not allowed; give a number 0 or more"]),
        (["eval", "forgetting", "r", "--bytes", "0"], ["--bytes: '0' is not allowed"]),
        (["eval", "forgetting", "r", "--documents", "0"], ["--documents: '0' is not allowed"]),
        (["train", "--resume", ""], ["no config.yaml"]),
        (["train", "--data", ""], ["data.path"]),
        (["train", "--deepspeed", ""], ["--deepspeed"]),
    ],
)
def test_mistakes_are_explained_without_a_traceback(run, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*args)
    assert status == 2
    for word in words:
        assert word in err
    assert "Traceback" not in err
    assert not out


def test_what_is_wrong_in_a_file_and_on_the_command_line_is_told_apart(run, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {lrr: 1}\n")
    _, _, err = run("train", path, "train.stepss=3")
    assert f"{path}: optimizer.lrr: 1 is not allowed" in err
    assert "on the command line: train.stepss: 3 is not allowed" in err
    _, _, err = run("train", path)
    assert err.startswith(f"nestopt: {path}: optimizer.lrr: 1 is not allowed")
    _, _, err = run("train", path, "optimizer={lrr: 2}")
    assert err.startswith("nestopt: on the command line: optimizer.lrr: 2 is not allowed")
    path.write_text("optimizer: [1\n")
    assert run("train", path, "train.steps=3")[2].startswith(f"nestopt: {path}:2: ")


def test_suggestions_are_near(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("runs/001", "runs/opt"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "runs/001/config.yaml").touch()
    (tmp_path / "stack.yaml").touch()
    assert "Did you mean '001'?" in run("generate", "runs/01")[2]
    assert "Did you mean 'stack.yaml'?" in run("describe", "Stak.yaml")[2]
    for silly in (("generate", "runs/nope"), ("generate", "/nope"), ("describe", "a.yaml"), ("describe", "nope")):
        assert "Did you mean" not in run(*silly)[2], silly


def test_alone_it_is_help_which_has_examples(run):
    status, out, _ = run()
    assert status == 0
    assert out.startswith("usage: nestopt")
    assert run("--version") == (0, f"nestopt {nestopt.__version__}\n", "")
    commands = [
        "train",
        "generate",
        "eval",
        "eval forgetting",
        "runs",
        "sweep",
        "describe",
        "plan",
        "levels",
        "plugins",
    ]
    commands += ["plugins new", "plugins check", "doctor"]
    for command in commands:
        status, out, _ = run(*command.split(), "--help")
        assert status == 0
        assert f"examples:\n  nestopt {command}" in out


@pytest.mark.parametrize("args", [("-p", "no:lion", "plugins"), ("plugins", "-p", "no:lion"), ("plugins", "-pno:lion")])
def test_plugins_are_switched_off_anywhere(run, args, monkeypatch):
    blocked = []
    monkeypatch.setattr(nestopt.registry, "block", blocked.append)
    assert run(*args)[0] == 0
    assert blocked == ["lion"]


def test_describe_a_level_by_its_name(run):
    assert "adamw.exp_avg_sq" in run("describe", "adamw")[1]
    assert "every 3 steps" in run("describe", "adamw", "period=3")[1]


def test_lists_are_as_wide_as_the_terminal():
    """In a pseudo-terminal of 80 columns; no line is longer, and no word is cut."""
    words = set(subprocess.run([*COMMAND, "levels"], capture_output=True, text=True, check=True).stdout.split())
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    env = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES")} | {"TERM": "xterm"}
    shown = b""
    with subprocess.Popen([*COMMAND, "levels"], stdout=theirs, env=env) as process:
        os.close(theirs)
        with contextlib.suppress(OSError):  # Linux says so at the end
            while piece := os.read(ours, 65536):
                shown += piece
    os.close(ours)
    assert process.returncode == 0
    lines = shown.decode().replace("\r", "").splitlines()
    assert max(map(len, lines)) == 80
    assert {word for line in lines for word in line.split()} == words


def test_a_shell_completes(tmp_path):
    answer = tmp_path / "answer"
    for line, wanted in (("nestopt describe ada", ["adam", "adamw"]), ("nestopt train model.mi", ["model.mixer="])):
        asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(answer), "COMP_LINE": line}
        env = {**os.environ, **asked, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
        subprocess.run(COMMAND, env=env, check=False)
        assert set(wanted) <= {word.strip() for word in answer.read_text().splitlines()}


def test_state_has_a_folder_to_go_to(run, text, tmp_path):
    run("train", "-q", "--data", text, "--out", tmp_path / "runs", *SMALL)
    status, out, err = run("generate", tmp_path / "runs/001", "--state", tmp_path / "nowhere" / "x")
    assert (status, out) == (2, "")
    assert "--state: " in err


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
