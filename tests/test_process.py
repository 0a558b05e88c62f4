"""What the command line settles before torch is there, and that a program of the user's is left alone."""

import subprocess
import sys

ASK = "import os, nestopt; print(os.environ.get('OMP_WAIT_POLICY'))"


def ask(command, **environment):
    import os

    clean = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    done = subprocess.run(command, capture_output=True, text=True, env={**clean, **environment}, check=True)
    return done.stdout.strip().splitlines()[-1]


def test_a_program_that_imports_nestopt_keeps_its_threads():
    assert ask([sys.executable, "-c", ASK]) == "None"


def test_the_command_line_lets_waiting_threads_sleep(tmp_path):
    script = tmp_path / "nestopt"  # what pip installs as the command has this name
    script.write_text(ASK)
    assert ask([sys.executable, str(script)]) == "PASSIVE"
    assert ask([sys.executable, str(script)], OMP_WAIT_POLICY="ACTIVE") == "ACTIVE"
