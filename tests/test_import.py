"""What `import nestopt` loads and takes."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from nestopt.core.device import constant_in_graphs

LOADS = """
import sys, time
import torch
before, begin = set(sys.modules), time.process_time()
import nestopt
print(time.process_time() - begin)
print(*sorted(set(sys.modules) - before))
"""

ALLOWED = {"nestopt", "numpy", "pluggy", "pydantic", "torch"}
NEEDS_OF_THESE = {"annotated_types", "cython_runtime", "pydantic_core", "typing_extensions", "typing_inspection"}


def loads() -> tuple[float, list[str]]:
    """The CPU seconds that `import nestopt` takes after `import torch`, and the modules that it loads."""
    done = subprocess.run([sys.executable, "-c", LOADS], capture_output=True, text=True, check=True)
    seconds, modules = done.stdout.splitlines()
    return float(seconds), modules.split()


def test_import_nestopt_is_cheap_and_needs_little() -> None:
    found = [loads() for _ in range(3)]
    modules = found[0][1]
    own = (name.partition(".")[0] for name in modules)
    assert {name for name in own if name not in sys.stdlib_module_names and not name.startswith("_")} <= (
        ALLOWED | NEEDS_OF_THESE
    )
    late = ("nestopt.train", "nestopt.evidence", "nestopt.cli", "nestopt.doctor", "nestopt.config.io")
    assert [name for name in modules if name.startswith(late)] == []
    assert [name for name in modules if name.startswith(("torch._dynamo", "torch._inductor"))] == []
    assert min(seconds for seconds, _ in found) <= 1.0  # about 0.45 here, and 1.4 with torch's compiler


def test_a_constant_in_graphs_is_marked_as_torch_marks_one() -> None:
    """`torch.compiler.assume_constant_result` would load the compiler."""

    def ours() -> None: ...
    def theirs() -> None: ...

    assert constant_in_graphs(ours) is ours
    assert torch.compiler.assume_constant_result(theirs) is theirs
    assert vars(ours) == vars(theirs) != {}


def test_a_constant_in_graphs_is_not_traced() -> None:
    @constant_in_graphs
    def answer() -> int:
        return len(os.listdir(os.sep)[:1]) * 42  # which no compiler traces

    def times(x: torch.Tensor) -> torch.Tensor:
        return x * answer()

    x = torch.ones(2)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: object) -> torch.fx.GraphModule:
        graphs.append(graph.code)
        return graph

    assert torch.compile(times, backend=backend, fullgraph=True)(x).tolist() == [42.0, 42.0]
    assert "42" in graphs[0]
