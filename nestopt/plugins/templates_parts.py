"""Templates of levels, of parts of memories, and of forms on tokens."""

from __future__ import annotations

_PART_TESTS = """
def test_it_keeps_the_contract():
    check_part({module}.{cls}())


def test_it_is_known_by_its_name():
    level = nestopt.build("level", {{"level": "associative_memory", "{kind}": "{name}"}})
    assert level.{kind} == {module}.{cls}()
"""


def _part(kind: str, hook: str, base: str, code: str) -> tuple[str, str, str, str, str]:
    """Return hook, code, imports of the tests, the tests, and a use."""
    tests = _PART_TESTS.format(module="$module", cls="$cls", kind=kind, name="$name")
    imports = "import nestopt\nimport pytest\nfrom nestopt.testing import check_part\n"
    imports_of = MEMORY_IMPORTS if kind == "memory" else f"from nestopt.core import {base}\n"
    code = f"import nestopt\nimport torch\n{imports_of}from torch import Tensor\n\n\n{code}"
    if "torch." not in code.replace("from torch", "").replace("import torch", ""):
        code = code.replace("import torch\n", "", 1)
    use = f'```python\nlevel = nestopt.build("level", {{"level": "associative_memory", "{kind}": "$name"}})\n```'
    return hook, code, imports, tests, use


LEVEL = '''\
import nestopt
import torch
from nestopt.core import State
from torch import Tensor


class $cls(nestopt.Level):
    """The sign of a running mean of gradients: replace it by your own `init` and `step`.

    Args:
        beta: decay of the mean. Default 0.9.
    """

    beta: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("beta", 0.0, 1.0)

    def init(self, param: Tensor) -> State:
        return {"mean": torch.zeros_like(param)}

    def step(self, grad: Tensor, state: State, signal: nestopt.Signal) -> tuple[Tensor, State]:
        mean = self.beta * state["mean"] + (1 - self.beta) * grad
        return mean.sign(), {"mean": mean}
'''

LEVEL_TESTS = """
def test_it_keeps_the_contract():
    check_level($module.$cls())


def test_it_is_the_equation():
    weight = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = nestopt.optimizer([weight], "$name", lr=0.1)
    wanted, mean = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for grads in ([1.0, -2.0, 0.5], [-3.0, 1.0, 0.5], [0.1, 4.0, -9.0]):
        weight.grad = torch.tensor(grads, dtype=torch.float64)
        optimizer.step()
        mean = [0.9 * m + 0.1 * g for m, g in zip(mean, grads)]
        wanted = [w - 0.1 * ((m > 0) - (m < 0)) for w, m in zip(wanted, mean)]
    assert weight.tolist() == pytest.approx(wanted, abs=1e-12)


def test_a_value_out_of_range_is_refused_by_name():
    with pytest.raises(nestopt.ConfigError, match="beta: 1.5 is not allowed"):
        nestopt.build("level", {"level": "$name", "beta": 1.5})
"""

LEVEL_USE = """\
```python
optimizer = nestopt.optimizer(model, "$name", lr=1e-3)  # on gradients
layer = nestopt.layer("$name", dim=64, heads=4)  # on tokens
layer = nestopt.layer({"level": "titans", "rule": "$name", "step_size": 0.01}, dim=64, heads=4)  # as a memory's rule
```"""

MEMORY_IMPORTS = """\
from nestopt.core import Memory
from nestopt.core.memories import rows
from nestopt.core.outputs import Output
"""

MEMORY = '''\
class $cls(Memory):
    """A matrix with a learned offset, M k + b: replace it by a memory of your own."""

    linear = False
    requires = frozenset({"shape"})

    def start(self, dim_k: int, dim_v: int, like: Tensor) -> dict[str, Tensor]:
        return {"m": like.new_zeros(dim_v, dim_k), "b": like.new_zeros(dim_v)}

    def start_on(self, param: Tensor) -> dict[str, Tensor]:
        return {"m": torch.zeros_like(rows(param)), "b": torch.zeros_like(rows(param)[:, 0])}

    def read(self, theta: dict[str, Tensor], k: Tensor) -> Tensor:
        return k @ theta["m"].mT + theta["b"]

    def pairs(self, grad: Tensor) -> tuple[Tensor, Tensor]:
        found = rows(grad)  # row i of a gradient is a key, and its value is e_i
        return found, torch.eye(len(found), dtype=grad.dtype, device=grad.device)

    def direction(self, theta: dict[str, Tensor], grad: Tensor, output: Output) -> Tensor:
        return output(theta["m"]).reshape(grad.shape)
'''

OBJECTIVE = '''\
class $cls(Objective):
    """Regression that a far value can't dominate: quadratic near 0, a logarithm far beyond `scale`.

    Args:
        scale: where it turns from one to the other. Default 1.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("scale", 0.0, closed="(]")

    def __call__(self, y: Tensor, v: Tensor) -> Tensor:
        return 0.5 * self.scale**2 * torch.log1p(((y - v) / self.scale) ** 2).sum()

    def error(self, y: Tensor, v: Tensor) -> Tensor:
        """The gradient, with which it is learned a chunk at a time."""
        return (y - v) / (1 + ((y - v) / self.scale) ** 2)
'''

RETENTION = '''\
class $cls(Retention):
    """What is small is forgotten: every entry comes `by` nearer to 0.

    Args:
        by: how much, a step. Default 0.001.
    """

    by: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check("by", 0.0)

    def __call__(self, theta: Tensor) -> Tensor:
        return torch.nn.functional.softshrink(theta, self.by)
'''

FEATURES = '''\
class $cls(Features):
    """The positive and the negative part of each number, side by side."""

    def __call__(self, k: Tensor) -> Tensor:
        return torch.cat([k.relu(), (-k).relu()], dim=-1)

    def dim(self, dim_k: int) -> int:
        return 2 * dim_k
'''

OUTPUT = '''\
class $cls(Output):
    """A read that can't be large: tanh of every entry."""

    def __call__(self, read: Tensor) -> Tensor:
        return read.tanh()
'''

FORM = '''\
import nestopt
import torch
from nestopt.core import Accepted, Refused, State, TokenForm
from torch import Tensor


class $cls(TokenForm):
    """`linear_attention` as one product of matrices, on the CPU: replace it by a kernel of your own."""

    levels = (nestopt.levels.linear_attention,)
    priority = 1  # above nestopt's own, which has 0

    @classmethod
    def accepts(cls, level: nestopt.Level, device: torch.device, dtype: torch.dtype) -> Accepted | Refused:
        if device.type != "cpu":
            return Refused(f"it is for the CPU, not {device.type}")
        if level != nestopt.levels.linear_attention():
            return Refused("it is for linear_attention as it is by default")
        return Accepted("one product of matrices")

    def forward(self, tokens, gates, state: State) -> tuple[Tensor, State]:
        features, start = self.level.features, state["level"]["memory"]["m"]
        q, k = features(tokens.q), features(tokens.k) * tokens.active[..., None]
        y = (q @ k.mT).tril() @ tokens.v + q @ start.mT
        end = {"memory": {"m": start + tokens.v.mT @ k}}
        return y, {"step": state["step"] + tokens.count, "level": {**state["level"], **end}}
'''

FORM_TESTS = """
def test_it_gives_what_the_reference_gives():
    check_form($module.$cls, nestopt.levels.linear_attention())


def test_it_is_chosen_and_says_so():
    layer = nestopt.layer("linear_attention", dim=16, heads=2)
    assert "runs on tokens as $name: one product of matrices" in layer.explain()


def test_what_it_refuses_it_refuses_in_words():
    level = nestopt.levels.linear_attention(lr=0.5)
    answer = $module.$cls.accepts(level, torch.device("cpu"), torch.float32)
    assert answer == Refused("it is for linear_attention as it is by default")
"""

FORM_USE = """\
```python
print(nestopt.layer("linear_attention", dim=64, heads=4).explain())
```"""

HOOKS: dict[str, tuple[str, str, str, str, str]] = {
    "level": (
        "nestopt_register_levels",
        LEVEL,
        "import nestopt\nimport pytest\nimport torch\nfrom nestopt.testing import check_level\n",
        LEVEL_TESTS,
        LEVEL_USE,
    ),
    "memory": _part("memory", "nestopt_register_memories", "Memory", MEMORY),
    "objective": _part("objective", "nestopt_register_objectives", "Objective", OBJECTIVE),
    "retention": _part("retention", "nestopt_register_retentions", "Retention", RETENTION),
    "features": _part("features", "nestopt_register_features", "Features", FEATURES),
    "output": _part("output", "nestopt_register_outputs", "Output", OUTPUT),
    "token_form": (
        "nestopt_register_token_forms",
        FORM,
        "import nestopt\nimport pytest\nimport torch\n"
        "from nestopt.core import Refused\nfrom nestopt.testing import check_form\n",
        FORM_TESTS,
        FORM_USE,
    ),
}
