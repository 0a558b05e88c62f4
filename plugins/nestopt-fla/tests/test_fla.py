"""The forms up to fla's kernels, whose places are taken by loops of fla's own equations; with a GPU, the kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import nestopt_fla
import pytest
import torch
from torch import Tensor

import nestopt
from nestopt.core import Gate, Refused, TokenForm
from nestopt.core.token_form import FormSetting
from nestopt.ops.run import run, run_form

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
ON_GPU = torch.cuda.is_available()

LEVELS = {
    "linear_attention": nestopt.levels.linear_attention(),
    "linear_attention-lr": nestopt.levels.linear_attention(lr=Gate(0.5), step_size=0.7),
    "linear_attention-elu": nestopt.levels.linear_attention(features=nestopt.parts.Elu()),
    "retnet": nestopt.levels.retnet(),
    "gated_linear": nestopt.levels.gated_linear(),
    "deltanet": nestopt.levels.deltanet(),
    "gated_deltanet": nestopt.levels.gated_deltanet(),
}


def form_of(level: nestopt.Level) -> type[TokenForm]:
    linear = isinstance(level, nestopt.levels.linear_attention)
    return nestopt_fla.FlaLinearAttention if linear else nestopt_fla.FlaDeltaRule


# -- fla's operations, as its documentation has them -------------------------------------------------------------------


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1} + k_t v_tᵀ, o_t = scale · S_tᵀ q_t."""
    assert not kwargs
    assert g_gamma is None
    return looped(q, k, v, g, None, scale, initial_state, output_final_state)


def chunk_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """S_t = S_{t-1} + β_t k_t (v_t - S_{t-1}ᵀ k_t)ᵀ, o_t = scale · S_tᵀ q_t."""
    assert not kwargs
    assert not use_qk_l2norm_in_kernel
    return looped(q, k, v, None, beta, scale, initial_state, output_final_state)


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """S_t = exp(g_t) S_{t-1}, and then the delta rule."""
    assert not kwargs
    assert not use_qk_l2norm_in_kernel
    return looped(q, k, v, g, beta, scale, initial_state, output_final_state)


def looped(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None,
    initial_state: Tensor | None,
    output_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    batch, length, heads, width = k.shape
    assert q.dtype == k.dtype == v.dtype == torch.bfloat16
    assert all(x.is_contiguous() for x in (q, k, v, initial_state, g, beta) if x is not None)
    for gate in (g, beta):
        assert gate is None or (gate.shape == (batch, length, heads) and gate.dtype == torch.float32)
    memory = q.new_zeros(batch, heads, width, v.shape[-1], dtype=torch.float32)
    if initial_state is not None:
        assert initial_state.shape == memory.shape
        assert initial_state.dtype == torch.float32
        memory = initial_state
    factor = width**-0.5 if scale is None else scale
    answers = []
    for t in range(length):
        key, value, query = (x[:, t].float() for x in (k, v, q))
        if g is not None:
            memory = memory * g[:, t].exp()[..., None, None]
        if beta is not None:
            value = beta[:, t, :, None] * (value - torch.einsum("bhk,bhkv->bhv", key, memory))
        memory = memory + torch.einsum("bhk,bhv->bhkv", key, value)
        answers.append(factor * torch.einsum("bhk,bhkv->bhv", query, memory))
    return torch.stack(answers, 1).to(q.dtype), memory if output_final_state else None


LOOPS = {loop.__name__: loop for loop in (chunk_simple_gla, chunk_delta_rule, chunk_gated_delta_rule)}


@pytest.fixture
def loops(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """fla's operations are the loops; gives the names of those that were called."""
    called: list[str] = []

    def kernel(path: str) -> Callable[..., Any]:
        called.append(path)
        return LOOPS[path.split(".")[1]]

    monkeypatch.setattr(nestopt_fla, "kernel", kernel)
    return called


# -- up to the call ----------------------------------------------------------------------------------------------------


def tokens(device: torch.device = CPU, length: int = 37, width: int = 16) -> tuple[Tensor, ...]:
    """Queries, keys and values that bfloat16 has exactly: what differs is not the rounding of what is given."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, length, 2, width, generator=generator) for _ in range(3))
    k = torch.nn.functional.normalize(k, dim=-1)
    return tuple(x.bfloat16().float().to(device).requires_grad_() for x in (q, k, v))


def gates_like(level: nestopt.Level, q: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    learned = [path for path, gate in nestopt.core.gates_of(level).items() if not isinstance(gate, nestopt.Heads)]
    made = {path: 0.2 + 0.7 * torch.rand(q.shape[:3], generator=generator) for path in learned}
    return {path: gate.to(q.device).requires_grad_() for path, gate in made.items()}


def both(level: nestopt.Level, device: torch.device, mask: Tensor | None = None) -> tuple[list[Any], list[Any]]:
    """What fla's form gives, and nestopt's reference machine in float32: answers, the state, and gradients."""
    mask = None if mask is None else mask.to(device)
    form = form_of(level)(level, FormSetting(device))

    def by_fla(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor]) -> tuple[Tensor, Any]:
        """In two parts, the second from the state of the first."""
        answers, state = [], form.init(2, 2, 16, 16, torch.empty(0, device=device), {})
        for part in (slice(0, 20), slice(20, None)):
            shown = {path: gate[:, part] for path, gate in gates.items()}
            there = None if mask is None else mask[:, part]
            given = q[:, part], k[:, part], v[:, part]
            y, state = run_form(form, *given, shown, state, mask=there, precision="bfloat16")
            answers.append(y)
        return torch.cat(answers, 1), state

    def by_reference(q: Tensor, k: Tensor, v: Tensor, gates: dict[str, Tensor]) -> tuple[Tensor, Any]:
        return run(level, q, k, v, gates=gates, mask=mask, form="reference")

    found = []
    for way in (by_fla, by_reference):
        q, k, v = tokens(device)
        gates = gates_like(level, q)
        y, state = way(q, k, v, gates)
        weights = torch.cos(torch.arange(y.numel(), dtype=torch.float32, device=device)).view_as(y)
        grads = torch.autograd.grad((y * weights).sum(), [q, k, v, *gates.values()])
        found.append([y.detach(), state["level"]["memory"]["m"].detach(), state["step"], *grads])
    return found[0], found[1]


def assert_close(ours: list[Any], theirs: list[Any], state: float) -> None:
    (y, memory, step, *grads), (y_too, memory_too, step_too, *grads_too) = ours, theirs
    assert torch.equal(step, step_too)
    assert relative(memory, memory_too) < state
    assert relative(y, y_too) < 1e-2  # fla's answers are bfloat16
    for grad, grad_too in zip(grads, grads_too, strict=True):
        assert relative(grad, grad_too) < 2e-2


def relative(x: Tensor, of: Tensor) -> float:
    return float((x - of).norm() / of.norm())


@pytest.mark.parametrize("name", LEVELS)
def test_it_is_the_reference_machine_up_to_rounding(name: str, loops: list[str]) -> None:
    level = LEVELS[name]
    # where values are weighed, they are rounded to bfloat16 after that
    assert_close(*both(level, CPU), state=5e-3 if name == "linear_attention-lr" or "elu" in name else 1e-5)
    wanted = {"linear_attention": "simple_gla.chunk_simple_gla", "deltanet": "delta_rule.chunk_delta_rule"}
    wanted |= {"gated_deltanet": "gated_delta_rule.chunk_gated_delta_rule"}
    assert set(loops) == {wanted.get(name, "simple_gla.chunk_simple_gla")}


@pytest.mark.parametrize("name", ["gated_linear", "gated_deltanet"])
def test_padding_changes_nothing(name: str, loops: list[str]) -> None:
    mask = torch.ones(2, 37, dtype=torch.bool)
    mask[0, 5:9] = mask[1, 30:] = False
    ours, theirs = both(LEVELS[name], CPU, mask)
    assert_close(ours, theirs, state=1e-5)
    assert loops


def test_a_decay_of_0_is_finite(loops: list[str]) -> None:
    level = nestopt.levels.gated_linear()
    form = nestopt_fla.FlaLinearAttention(level, FormSetting(CPU))
    q, k, v = tokens()
    gates = {"retention.keep": torch.zeros(2, 37, 2)}
    y, _ = run_form(form, q, k, v, gates, form.init(2, 2, 16, 16, torch.empty(0), {}), precision="bfloat16")
    torch.testing.assert_close(y, (q * k).sum(-1, keepdim=True) * v, rtol=1e-2, atol=1e-2)


def test_float32_is_not_rounded(loops: list[str]) -> None:
    level = nestopt.levels.deltanet()
    form = nestopt_fla.FlaDeltaRule(level, FormSetting(CPU))
    q, k, v = tokens()
    y, state = run_form(form, q, k, v, {}, form.init(2, 2, 16, 16, torch.empty(0), {}))
    want, state_too = run(level, q, k, v)
    assert torch.equal(y, want)
    assert torch.equal(state["level"]["memory"]["m"], state_too["level"]["memory"]["m"])
    assert not loops


def test_second_derivatives_are_refused(loops: list[str]) -> None:
    form = nestopt_fla.FlaDeltaRule(nestopt.levels.deltanet(), FormSetting(CPU))
    q, k, v = tokens()
    y, _ = run_form(form, q, k, v, {}, form.init(2, 2, 16, 16, torch.empty(0), {}), precision="bfloat16")
    with pytest.raises(RuntimeError, match=r"fla's kernels have no second derivatives; give form='delta_rule'"):
        torch.autograd.grad(y.sum(), k, create_graph=True)


def test_wide_keys_are_refused(loops: list[str]) -> None:
    level = nestopt.levels.linear_attention(features=nestopt.parts.Polynomial())
    form = nestopt_fla.FlaLinearAttention(level, FormSetting(CPU))
    q, k, v = tokens(width=20)
    with pytest.raises(
        ValueError, match=r"keys of 400 numbers \(with their features\) are not allowed .* 256 or fewer"
    ):
        run_form(form, q, k, v, {}, form.init(2, 2, 20, 20, torch.empty(0), {}), precision="bfloat16")


# -- where it runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("deltanet", {"read": "before"}, "read='before': fla's kernels read after the write"),
        ("deltanet", {"normalized": True}, "normalized=True: fla's kernels take the step as it is"),
        ("deltanet", {"rule": "momentum"}, "rule=momentum: fla's kernels have no momentum"),
        ("gated_deltanet", {"fade": "with"}, "fade='with': fla's kernel fades before the write"),
        ("gated_linear", {"read": "before"}, "read='before': fla's kernels read after the write"),
        ("gated_linear", {"chunk": 4}, "chunk=4: its gradients are of the memory that a chunk began with"),
    ],
)
def test_what_the_kernels_do_not_compute_is_refused(name: str, fields: dict[str, Any], words: str) -> None:
    level = nestopt.build("level", {"level": name, **fields})
    assert form_of(level).accepts(level, CUDA, torch.float32) == Refused(words)


def test_elsewhere_it_is_refused_and_the_layer_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    level, form = nestopt.levels.deltanet(), nestopt_fla.FlaDeltaRule
    words = "fla's kernels run on CUDA, not on 'cpu'"
    assert form.accepts(level, CPU, torch.float32) == Refused(words)
    layer = nestopt.layer(level, dim=16, heads=2, precision="bfloat16")
    layer(torch.randn(1, 5, 16))
    assert f"  not as fla_delta_rule: {words}" in layer.explain().splitlines()
    in_float64 = form.accepts(level, CUDA, torch.float64)
    assert in_float64 == Refused("the memories are float64, and fla's kernels have them in float32")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert form.accepts(level, CUDA, torch.float32) == Refused("torch finds no CUDA device")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nestopt_fla.importlib.util, "find_spec", lambda name: None)
    answer = form.accepts(level, CUDA, torch.float32)
    assert answer == Refused("flash-linear-attention is not installed; pip install 'nestopt-fla[cuda]'")


def test_it_is_no_business_of_other_memories() -> None:
    assert "fla" not in nestopt.layer("titans", dim=16, heads=2).explain()


def test_it_is_found_by_its_entry_point() -> None:
    (plugin,) = [plugin for plugin in nestopt.registry.plugins() if plugin.name == "fla"]
    assert plugin.error is None
    assert plugin.provides == (("token_form", "fla_linear_attention"), ("token_form", "fla_delta_rule"))


# -- fla itself --------------------------------------------------------------------------------------------------------


def installed(path: str) -> Callable[..., Any]:
    pytest.importorskip("fla", reason="flash-linear-attention is not installed")
    return nestopt_fla.kernel(path)


@pytest.mark.filterwarnings("ignore")  # fla's, where there is no GPU
@pytest.mark.parametrize(
    "path",
    ["simple_gla.chunk_simple_gla", "delta_rule.chunk_delta_rule", "gated_delta_rule.chunk_gated_delta_rule"],
)
def test_the_loops_have_the_arguments_of_fla(path: str) -> None:
    theirs, ours = (inspect.signature(f).parameters for f in (installed(path), LOOPS[path.split(".")[1]]))
    for name, parameter in ours.items():
        assert theirs[name].default == parameter.default or parameter.kind == parameter.VAR_KEYWORD, name


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
@pytest.mark.parametrize("name", LEVELS)
def test_on_a_gpu(name: str) -> None:
    installed("simple_gla.chunk_simple_gla")
    level = LEVELS[name]
    assert not isinstance(form_of(level).accepts(level, CUDA, torch.float32), Refused)
    assert_close(*both(level, CUDA), state=2e-2)


@pytest.mark.skipif(not ON_GPU, reason="there is no GPU")
def test_a_layer_on_a_gpu_takes_it() -> None:
    installed("simple_gla.chunk_simple_gla")
    x = torch.randn(2, 100, 64, device=CUDA)
    layer = nestopt.layer("gated_deltanet", dim=64, heads=2, precision="bfloat16").to(CUDA)
    assert "runs on tokens as fla_delta_rule: fla's chunk_gated_delta_rule" in layer.explain()
    y, state = layer(x)
    own = nestopt.layer("gated_deltanet", dim=64, heads=2, form="delta_rule").to(CUDA)
    own.load_state_dict(layer.state_dict())
    want, _ = own(x)
    assert relative(y, want) < 2e-2
    following, _ = layer(x[:, :1], state)
    assert following.isfinite().all()
