"""What the command line settles before torch is there, and that a program of the user's is left alone."""

import os
import subprocess
import sys

ASK = "import os, nestopt; print(os.environ.get('OMP_WAIT_POLICY'))"


def ask(command, **environment):
    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, check=False)
    return done.stdout.strip().splitlines()[-1]


def test_a_program_that_imports_nestopt_keeps_its_threads():
    assert ask([sys.executable, "-c", ASK]) == "None"


def test_a_package_of_the_users_that_runs_as_a_module_is_left_alone(tmp_path):
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").write_text("import nestopt")
    (package / "__main__.py").write_text(ASK)
    assert ask([sys.executable, "-m", "mine"], PYTHONPATH=str(tmp_path)) == "None"


def test_python_m_nestopt_lets_waiting_threads_sleep(tmp_path):
    # a plugin is loaded in the command's own process, and can say what it finds there
    (tmp_path / "witness.py").write_text("import os; raise ImportError(os.environ.get('OMP_WAIT_POLICY'))")
    info = tmp_path / "witness-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: witness\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[nestopt]\nwitness = witness\n")
    listed = [sys.executable, "-m", "nestopt", "plugins"]
    assert ask(listed, PYTHONPATH=str(tmp_path)).endswith("ImportError: PASSIVE")


def test_the_command_line_lets_waiting_threads_sleep(tmp_path):
    script = tmp_path / "nestopt"  # what pip installs as the command has this name
    script.write_text(ASK)
    assert ask([sys.executable, str(script)]) == "PASSIVE"
    assert ask([sys.executable, str(script)], OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
