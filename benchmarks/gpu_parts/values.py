"""Values of every operation with its gradients, made on the CPU in float64 from numbers that bfloat16 can hold.

So the same inputs serve every dtype, and an error is of the operation alone. The file is made by `--prepare`; a part
that finds none makes the values itself.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import nestopt
from benchmarks.gpu_parts.setting import generator
from nestopt.core.memories import Mlp
from nestopt.core.objectives import Lp
from nestopt.core.tree import leaves

BATCH, TOKENS, HEADS, DIM = 2, 160, 2, 32
FEW = 12
"""Tokens for the reference machine, which goes from one to the next."""

Inputs = dict[str, Tensor]
Gates = Mapping[str, tuple[float, float]]
"""By name, between which numbers."""
Values = dict[str, Tensor]
"""Answers and states by `"out.N"`, gradients by `"grad.NAME"`."""


@dataclasses.dataclass(frozen=True)
class Case:
    """An operation with its settings.

    Attributes:
        op: its name in `nestopt.ops`, or what else is run.
        run: from inputs by name to the answer and the state.
        inputs: with numbers from a generator, to each of which a gradient is taken.
        bounds: of the error in float32 and in bfloat16, relative, of root mean squares.
    """

    op: str
    run: Callable[[Inputs], tuple[Tensor, Any]]
    inputs: Callable[[torch.Generator], Inputs]
    bounds: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"float32": 5e-5, "bfloat16": 1e-2})


def _tokens(random: torch.Generator, gates: Gates | None = None, count: int = TOKENS) -> Inputs:
    """Queries, keys and values, the keys and values of length 1, and gates between two numbers."""
    q, k, v = (torch.randn(BATCH, count, HEADS, DIM, generator=random) for _ in range(3))
    made = {"q": q, "k": F.normalize(k, dim=-1), "v": F.normalize(v, dim=-1)}
    for name, (low, high) in (gates or {}).items():
        made[name] = low + (high - low) * torch.rand(BATCH, count, HEADS, generator=random)
    return made


def _weights(random: torch.Generator, names: Sequence[str]) -> Inputs:
    return {name: torch.randn(HEADS, DIM, DIM, generator=random) / DIM**0.5 for name in names}


def _plain(op: str, gates: Gates | None = None, **options: Any) -> Case:
    """A case whose inputs are all tokens and gates."""
    function = getattr(nestopt.ops, op)
    return Case(op, lambda x: function(**x, **options), lambda random: _tokens(random, gates))


def _by_channel(op: str, gates: Gates | None = None, keys: Sequence[str] = ()) -> Case:
    """A case whose decay is one for each channel of the keys; `keys` are further arguments like k."""
    function = getattr(nestopt.ops, op)

    def inputs(random: torch.Generator) -> Inputs:
        made = _tokens(random, gates)
        for key in keys:
            made[key] = 0.7 * F.normalize(torch.randn(BATCH, TOKENS, HEADS, DIM, generator=random), dim=-1)
        return made | {"decay": 0.8 + 0.2 * torch.rand(BATCH, TOKENS, HEADS, DIM, generator=random)}

    return Case(op, lambda x: function(**x), inputs)


def _deep(gates: Gates, **options: Any) -> Case:
    def run(x: Inputs) -> tuple[Tensor, Any]:
        rest: dict[str, Any] = {name: value for name, value in x.items() if name not in ("W1", "W2")}
        return nestopt.ops.deep_memory(**rest, weights=[x["W1"], x["W2"]], **options)

    return Case("deep_memory", run, lambda random: _tokens(random, gates) | _weights(random, ("W1", "W2")))


_MADE = ("k", "v", "q", "eta", "alpha")


def _self_modifying(**options: Any) -> Case:
    names = [f"{memory}.{i}" for memory in (*_MADE, "memory") for i in (1, 2)]

    def inputs(random: torch.Generator) -> Inputs:
        made = _tokens(random) | _weights(random, names)
        for gate, bias in (("eta", -1.0), ("alpha", 4.0)):
            made[f"w.{gate}"] = torch.randn(HEADS, DIM, generator=random) / DIM**0.5
            made[f"b.{gate}"] = torch.full((HEADS,), bias)
        return made

    def run(x: Inputs) -> tuple[Tensor, Any]:
        starts = {memory: [x[f"{memory}.{i}"] for i in (1, 2)] for memory in (*_MADE, "memory")}
        readout = {gate: (x[f"w.{gate}"], x[f"b.{gate}"]) for gate in ("eta", "alpha")}
        return nestopt.ops.self_modifying(x["q"], x["k"], x["v"], starts=starts, readout=readout, **options)

    return Case("self_modifying", run, inputs)


def _run(level: nestopt.Level, *, learn: bool = True) -> Case:
    """A level by `nestopt.ops.run`: without a closed form, or reading only what the first half has written."""

    def inputs(random: torch.Generator) -> Inputs:
        starts = [level.learned_start(DIM, DIM) for _ in range(HEADS)]
        learned = {name: torch.randn(HEADS, *start.shape, generator=random) for name, start in starts[0].items()}
        return _tokens(random, count=FEW) | {f"start.{name}": start / DIM**0.5 for name, start in learned.items()}

    def run(x: Inputs) -> tuple[Tensor, Any]:
        tokens = [x[name] for name in ("q", "k", "v")]
        learned = {name.removeprefix("start."): value for name, value in x.items() if name.startswith("start.")}
        if learn:
            return nestopt.ops.run(level, *tokens, learned=learned)
        _, state = nestopt.ops.run(level, *(part[:, : FEW // 2] for part in tokens), learned=learned)
        return nestopt.ops.run(level, *tokens, state=state, learn=False)[0], {}

    return Case("run", run, inputs)


def _layer(spec: Any, **options: Any) -> Case:
    """A layer with its parameters, for what is no operation of its own: the continuum."""

    def made() -> torch.nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return nestopt.layer(spec, dim=DIM, **options)

    def inputs(random: torch.Generator) -> Inputs:
        found = {"x": torch.randn(BATCH, TOKENS, DIM, generator=random)}
        return found | {f"param.{name}": param.detach().clone() for name, param in made().named_parameters()}

    def run(x: Inputs) -> tuple[Tensor, Any]:
        params = {name.removeprefix("param."): value for name, value in x.items() if name != "x"}
        layer = made().to(x["x"].device, x["x"].dtype)
        return torch.func.functional_call(layer, params, (x["x"],))

    return Case("layer", run, inputs)


_LR, _DECAY, _THETA = {"lr": (0.1, 0.7)}, {"decay": (0.8, 1.0)}, {"momentum": (0.1, 0.6)}
_CMS = {"level": "cms", "periods": [32, 64], "learn": "context", "memory": {"memory": "mlp", "hidden": 2 * DIM}}

CASES: dict[str, Case] = {
    "attention": _plain("attention"),
    "attention, window": _plain("attention", window=48),
    "linear_attention": _plain("linear_attention"),
    "linear_attention, decay": _plain("linear_attention", gates=_DECAY),
    "delta_rule": _plain("delta_rule", gates=_LR),
    "delta_rule, decay": _plain("delta_rule", gates=_LR | _DECAY),
    "delta_rule, decay, momentum": _plain("delta_rule", gates=_LR | _DECAY | _THETA, decay_first=False),
    "oja": _plain("oja", gates=_LR | _DECAY),
    "omega": _plain("omega", gates={"lr": (0.05, 0.2)} | _DECAY, window=4),
    "deep_memory": _deep(_LR),
    "deep_memory, by chunks, all gates": _deep(_LR | _DECAY | _THETA, read="chunk"),
    "deep_memory, delta, recomputed": _deep(_LR | _DECAY, delta=1.0, chunk=32, checkpoint=2),
    "self_modifying": _self_modifying(),
    "self_modifying, momentum": _self_modifying(momentum=0.5, chunk=32, projection_chunk=32),
    "run, the reference machine": _run(
        nestopt.levels.associative_memory(memory=Mlp(hidden=DIM), objective=Lp(3.0), lr=0.1)
    ),
    "run, reading only": _run(nestopt.levels.titans(memory=Mlp(hidden=DIM)), learn=False),
    "layer, a continuum in context": _layer(_CMS),
    "linear_attention, by channel": _by_channel("linear_attention"),
    "delta_rule, by channel": _by_channel("delta_rule", gates=_LR),
    "rank_one, by channel": _by_channel("rank_one", keys=("ask", "along")),
}


@functools.cache
def inputs_of(name: str) -> Inputs:
    """The same numbers on every machine, all of them such as bfloat16 can hold."""
    made = CASES[name].inputs(generator(list(CASES).index(name)))
    return {key: value.bfloat16() for key, value in made.items()}


def evaluate(name: str, device: str, dtype: torch.dtype) -> Values:
    """What the case gives in a dtype: its answer, its state, and the gradients of their sum under fixed weights."""
    given = {key: value.to(device, dtype, copy=True).requires_grad_() for key, value in inputs_of(name).items()}
    y, state = CASES[name].run(given)
    # what is pending are inputs
    kept = [leaf for path, leaf in leaves({"state": state}) if leaf.requires_grad and "pending" not in path]
    outs = [y, *kept]
    random = generator(1000 + list(CASES).index(name))
    weights = [torch.randn(out.shape, generator=random).bfloat16().to(out.device, out.dtype) for out in outs]
    grads = torch.autograd.grad(outs, list(given.values()), weights, allow_unused=True)
    found = {f"out.{i}": out.detach() for i, out in enumerate(outs)}
    return found | {f"grad.{key}": grad for key, grad in zip(given, grads, strict=True) if grad is not None}


def make() -> Values:
    """Of all cases, in float64, each by `"CASE/KEY"`, with the inputs by `"CASE/in.KEY"`."""
    found: Values = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the sizes are small
    try:
        for name in CASES:
            true = evaluate(name, "cpu", torch.float64)
            found |= {f"{name}/{key}": value.float().contiguous() for key, value in true.items()}
            found |= {f"{name}/in.{key}": value.contiguous() for key, value in inputs_of(name).items()}
    finally:
        torch.set_num_threads(threads)
    return found


def write(path: Path, values: Values, meta: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(values, path, {"meta": json.dumps(dict(meta))})


def read(path: Path) -> Values:
    """The values of a file.

    Raises:
        ValueError: it is of other inputs, or of other cases, than this code has.
    """
    with safe_open(path, "pt") as file:
        found = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # it is no mapping
    for name in CASES:
        for key, value in inputs_of(name).items():
            stored = found.get(f"{name}/in.{key}")
            if stored is None or not torch.equal(stored, value):
                raise ValueError(
                    f"{path} is of other inputs for {name!r} than this code makes; make it anew: --prepare"
                )
    return found


def meta(path: Path) -> dict[str, Any]:
    """What else is in a file; nothing where there is none."""
    if not path.exists():
        return {}
    with safe_open(path, "pt") as file:
        return json.loads((file.metadata() or {}).get("meta", "{}"))
