"""`precision` of layers and models: how far from float64, by which products, from which state, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import nestopt
from nestopt.config import ModelConfig
from nestopt.core.precision import Precision, current, tf32_is_on
from nestopt.core.tree import leaves
from nestopt.levels import cms
from nestopt.models import HopeLM
from nestopt.models.cost import CostCounter
from nestopt.nn import CMS, HopeAttentionBlock, HopeBlock, MemoryAttention, MemoryBlock, SequenceMemory
from nestopt.ops import fast_form, run
from tests.core.products import Products
from tests.nn.tools import LEVELS, in_steps, level_of

CLOSED = [name for name in LEVELS if fast_form(level_of(name))]
OF_MATRICES = [name for name in CLOSED if not level_of(name).appends and name != "mesa"]

ROUGH = {"atlas", "memora"}
"""Levels whose answers are differences of numbers that are nearly alike, or are of an iteration in bfloat16."""

COMPILED = ["titans", "gated_linear", "self_modifying"]

BOUND = 0.01
"""Of the relative error of all numbers of a kind in bfloat16; what was measured is within half of it."""


def far(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.detach().double().flatten() for x in tensors])


def numbers(state: Mapping[str, Any]) -> Tensor:
    return flat(x for _, x in leaves(state) if x.is_floating_point())


def with_gradients(module: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Any], Tensor]:
    """The answers, the state, and all gradients of a loss of both."""
    x = x.clone().requires_grad_()
    y, state = module(x)
    probe = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    kept = sum(leaf.square().sum() for _, leaf in leaves(state) if leaf.requires_grad)
    found = torch.autograd.grad((y * probe).sum() + 0.1 * kept, [x, *module.parameters()])
    return y, state, flat(found)


def layer(name: str, precision: Precision = "bfloat16", dim: int = 32, **options: Any) -> SequenceMemory:
    torch.manual_seed(1)
    return SequenceMemory(level_of(name), dim, 2, precision=precision, **options)


@pytest.mark.parametrize("name", CLOSED)
def test_bfloat16_is_near_float64_with_states_in_float32(name: str) -> None:
    module, x = layer(name), torch.randn(2, 50, 32)
    y, state, gradients = with_gradients(module, x)
    twin = copy.deepcopy(module).double()
    twin.precision = "float32"
    true, true_state, true_gradients = with_gradients(twin, x.double())
    assert {leaf.dtype for _, leaf in leaves(state) if leaf.is_floating_point()} == {torch.float32}
    assert y.dtype == torch.float32
    bound = 4 * BOUND if name in ROUGH else BOUND
    assert 1e-5 < far(y, true) < bound
    assert far(numbers(state), numbers(true_state)) < bound
    assert far(gradients, true_gradients) < bound


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
@pytest.mark.parametrize("name", sorted({*OF_MATRICES} - {"atlas"}))  # whose iteration has a dtype of its own
def test_the_products_of_a_memory_are_made_so(name: str, precision: Precision) -> None:
    """All but those of gates alone, which are numbers a token: forward, and backward outside of any block."""
    with torch.device("meta"):
        module = SequenceMemory(level_of(name), 128, 2)
        q, k, v = (torch.randn(2, 32, 2, 64, requires_grad=True) for _ in range(3))
    learned = {path: module.start[key] for key, path in module._start_names.items()}
    with CostCounter() as counter:
        y, _ = run(level_of(name), q, k, v, learned=learned, precision=precision)
        y.sum().backward()
        assert not tf32_is_on()
        assert current() == "float32"
    products = counter.cost.products
    assert set(products) <= {"float32", precision}
    assert products[precision] > 0.95 * counter.cost.flops
    assert q.grad is not None
    assert q.grad.dtype == torch.float32


@pytest.mark.parametrize("name", ["attention", "window_attention", "forgetting_attention"])
def test_attention_is_torchs_kernel_in_bfloat16(name: str) -> None:
    seen = []

    class Kernels(Products):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if "attention" in func.overloadpacket.__name__:
                seen.append(args[0].dtype)
            return super().__torch_dispatch__(func, types, args, kwargs)

    q, k, v = (torch.randn(2, 20, 2, 8, requires_grad=True) for _ in range(3))
    with Kernels():
        y, state = run(level_of(name), q, k, v, precision="bfloat16")
        y.sum().backward()
        run(level_of(name), q, k, v, state=state, learn=False, precision="bfloat16")
    assert len(seen) > 2
    assert set(seen) == {torch.bfloat16}
    assert state["level"]["memory"]["keys"].dtype == torch.float32


@pytest.mark.parametrize("name", ["adam", "ttt, a write a chunk", "titans with adam", "deltanet of 2", "deep_momentum"])
def test_the_generic_machine_has_it_too(name: str) -> None:
    module, x = layer(name, dim=16), torch.randn(2, 9, 16)
    with Products() as products:
        y, state, _ = with_gradients(module, x)
    assert products.seen.count("bfloat16") > products.seen.count("float32")
    true, _ = copy.deepcopy(module).double().requires_grad_(False), None
    true.precision = "float32"
    assert 1e-5 < far(y, true(x.double())[0]) < 2 * BOUND
    assert {leaf.dtype for _, leaf in leaves(state) if leaf.is_floating_point()} == {torch.float32}


@pytest.mark.parametrize("name", OF_MATRICES)
def test_a_stream_is_the_whole(name: str) -> None:
    module, x = layer(name), torch.randn(2, 40, 32)
    whole, end = module(x)
    parts, state = [], None
    for piece in x.split([3, 17, 1, 19], dim=1):
        y, state = module(piece, state)
        parts.append(y)
    # where a write takes off half of its error or more, a rounding of what is answered is in the next answer; hgrn2
    # answers with means of values, which are small beside them
    bound = 2 * BOUND if name.startswith(("ttt", "hgrn2")) else BOUND
    assert far(torch.cat(parts, 1), whole) < bound
    assert far(numbers(state or {}), numbers(end)) < bound
    with Products() as products:
        stepped, _ = in_steps(module, x[:, :4])
    assert "bfloat16" in products.seen
    assert far(stepped, whole[:, :4]) < bound
    one = torch.tensor([0, 40, 60])
    packed, _ = module(torch.cat([x[:1], x[1:, :20]], 1), cu_seqlens=one)
    assert far(packed[0, :40], whole[0]) < BOUND
    masked, _ = module(x, mask=torch.ones(2, 40, dtype=torch.bool))
    assert far(masked, whole) < BOUND


@pytest.mark.parametrize("kind", ["constant", "random", "huge"])
@pytest.mark.parametrize("name", ["titans", "self_modifying", "deltanet"])
def test_a_long_stream_stays_where_it_does_in_float32(name: str, kind: str) -> None:
    x = torch.randn(1, 1500, 16) * (1e4 if kind == "huge" else 1)
    x = x[:, :1].expand_as(x) if kind == "constant" else x
    ends = []
    for precision in ("bfloat16", "float32"):
        with torch.no_grad():
            y, state = layer(name, precision, dim=16)(x)
        assert y.isfinite().all()
        ends.append(numbers(state["memory"]["level"]))
    # values far larger than weights bring out what is not linear; of one pair the layerwise step soon
    # has but roundings to write
    limits = {("huge", name): 0.2, ("constant", "titans"): 0.1}
    assert far(*ends) < limits.get((kind, name), 2 * BOUND)


@pytest.mark.parametrize("name", ["titans", "titans in chunks", "self_modifying", "gated_deltanet", "attention"])
def test_recomputed_it_gives_the_same_gradients(name: str) -> None:
    module, x = layer(name, dim=16), torch.randn(1, 150, 16, requires_grad=True)
    inputs = [x, *module.parameters()]
    true = torch.autograd.grad(module(x)[0].sin().sum(), inputs)
    again = torch.autograd.grad(checkpoint(module, x, use_reentrant=False)[0].sin().sum(), inputs)
    torch.testing.assert_close(again, true, rtol=0, atol=0)
    module.checkpoint = 32
    y, _ = module(x)
    with Products() as products:
        own = torch.autograd.grad(y.sin().sum(), inputs)
    torch.testing.assert_close(own, true, rtol=1e-6, atol=1e-6)
    assert name == "attention" or products.seen.count("bfloat16") > products.seen.count("float32")


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, as it traces
@pytest.mark.parametrize(
    "name", ["deltanet", "attention", *(pytest.param(name, marks=pytest.mark.slow) for name in COMPILED)]
)
def test_one_graph_holds_all_of_it(name: str) -> None:
    torch._dynamo.reset()
    module, x = layer(name, dim=8), torch.randn(2, 18, 8, requires_grad=True)
    inputs = [x, *module.parameters()]
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=False)
    (y, _), (fast, _) = module(x), compiled(x)
    torch.testing.assert_close(fast, y, rtol=1e-6, atol=1e-6)
    wanted, found = (torch.autograd.grad(out.sin().sum(), inputs) for out in (y, fast))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["deltanet", "titans in chunks"])
def test_second_derivatives_and_many_at_once(name: str) -> None:
    level = level_of(name)
    tokens = [torch.randn(3, 1, 6, 1, 4) for _ in range(3)]
    learned = {key: weight[None] for key, weight in level.learned_start(4, 4).items()}

    def loss(precision: Precision, learned: Mapping[str, Tensor], *tokens: Tensor) -> Tensor:
        y, _ = run(level, *tokens, learned=learned, precision=precision)  # type: ignore[misc]
        return y.square().sum()

    def steepness(precision: Precision, learned: Mapping[str, Tensor], *tokens: Tensor) -> Tensor:
        found = torch.func.grad(loss, argnums=(2, 3, 4))(precision, learned, *tokens)
        return sum(g.square().sum() for g in found)  # type: ignore[return-value]

    def second(precision: Precision, learned: Mapping[str, Tensor], tokens: list[Tensor]) -> Tensor:
        one = torch.func.grad(lambda *x: steepness(precision, learned, *x), argnums=(0, 1, 2))
        return torch.stack(torch.func.vmap(one)(*tokens))

    true = second("float32", {key: w.double() for key, w in learned.items()}, [x.double() for x in tokens])
    with Products() as products:
        found = second("bfloat16", learned, tokens)
    assert products.seen.count("bfloat16") > products.seen.count("float32")
    assert 1e-5 < far(found, true) < 0.05


# -- continua, blocks and models ---------------------------------------------------------------------------------------


def continuum(precision: Precision = "float32", **options: Any) -> CMS:
    torch.manual_seed(0)
    return CMS(16, cms(periods=(4, 16), **options), precision=precision)


@pytest.mark.parametrize(
    "options", [{"learn": "static"}, {"learn": "context"}, {"learn": "context", "variant": "nested"}]
)
def test_a_continuum_is_near_float64(options: dict[str, Any]) -> None:
    module, x = continuum("bfloat16", **options), torch.randn(2, 50, 16)
    with Products() as products:
        y, state, gradients = with_gradients(module, x)
    # how far a write moves an MLP is a norm, and so in float32
    assert products.seen.count("bfloat16") > (5 * products.seen.count("float32") if state else 0)
    true, true_state, true_gradients = with_gradients(continuum(**options).double(), x.double())
    assert 1e-5 < far(y, true) < BOUND
    assert far(gradients, true_gradients) < BOUND
    if state:
        assert far(numbers(state), numbers(true_state)) < BOUND
        assert {leaf.dtype for _, leaf in leaves(state) if leaf.is_floating_point()} == {torch.float32}


def test_a_continuum_that_learns_keeps_its_precision_under_autocast() -> None:
    module, x = continuum(learn="context"), torch.randn(2, 20, 16)
    y, _ = module(x)
    with torch.autocast("cpu", dtype=torch.bfloat16), Products() as products:
        same, _ = module(x)
    assert set(products.seen) == {"float32"}
    torch.testing.assert_close(same, y, rtol=0, atol=0)


def lm(**options: Any) -> HopeLM:
    torch.manual_seed(0)
    mlp = cms(periods=(8,), learn="context", teach="loss")
    mixers = [level_of("titans"), level_of("attention")]
    return HopeLM(vocab=32, dim=16, blocks=2, heads=2, mixers=mixers, mlp=mlp, **options)


def test_a_model_has_one_for_all_its_memories_and_their_signal() -> None:
    model, tokens = lm(precision="bfloat16"), torch.randint(32, (2, 40))
    twin = lm().double()
    logits, state = model(tokens)
    true, _ = twin(tokens)
    assert 1e-5 < far(logits, true) < BOUND
    assert {leaf.dtype for _, leaf in leaves(state) if leaf.is_floating_point()} == {torch.float32}
    with Products() as products:
        model(tokens, state)
    wide = products.seen.count("float32")
    model.precision = "float32"
    assert {block.mlp.precision for block in model.blocks} == {"float32"}
    with Products() as products:
        model(tokens, state)  # the same state: it does not depend on it
    assert set(products.seen) == {"float32"}
    assert wide < len(products.seen) / 3  # projections, the head, and norms


def test_a_model_that_recomputes_its_segments_has_it_there_too() -> None:
    tokens, found = torch.randint(32, (2, 41)), []
    for segment in (0, 16):
        model = lm(precision="bfloat16", segment=segment)
        model.loss(tokens)[0].backward()
        found.append([p.grad for p in model.parameters()])
    assert far(flat(found[1]), flat(found[0])) < 2 * BOUND


def test_blocks_hand_it_on() -> None:
    level = level_of("deltanet")
    hope = HopeBlock(8, 2, level, precision="bfloat16")
    assert (hope.mixer.precision, hope.mlp.precision) == ("bfloat16", "bfloat16")
    attending = HopeAttentionBlock(8, 2, precision="bfloat16")
    assert (attending.mixer.precision, attending.mlp.precision) == ("bfloat16", "bfloat16")
    assert MemoryBlock(level, 8, 2, precision="bfloat16").memory.precision == "bfloat16"
    assert MemoryAttention(8, 2, level=level, precision="bfloat16").memory.precision == "bfloat16"
    assert nestopt.layer("cms", 8, precision="bfloat16").precision == "bfloat16"
    assert nestopt.nn.SelfModifyingTitans(8, 2, precision="bfloat16").precision == "bfloat16"
    model = nestopt.model({"dim": 16, "heads": 2, "precision": "bfloat16"})
    assert model.precision == model.blocks[0].mixer.precision == model.blocks[0].mlp.precision == "bfloat16"
    assert "precision=bfloat16" in repr(hope.mixer)
    assert "precision=bfloat16" in repr(hope.mlp)
    assert "precision" not in repr(HopeBlock(8, 2, level))


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SequenceMemory(level_of("titans"), 8, 2, precision=p),
        lambda p: CMS(8, precision=p),
        lambda p: HopeBlock(8, 2, precision=p),
        lambda p: lm(precision=p),
        lambda p: nestopt.layer("cms", 8, precision=p),
        lambda p: run(level_of("titans"), *torch.randn(3, 1, 2, 2, 4), precision=p),
        lambda p: nestopt.ops.delta_rule(*torch.randn(3, 1, 2, 2, 4), lr=0.1, precision=p),
        lambda p: nestopt.ops.attention(*torch.randn(3, 1, 2, 2, 4), precision=p),
    ],
)
def test_another_name_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match=r"precision='bf16' is not allowed; give one of .* Did you mean 'bfloat16'\?"):
        make("bf16")


@pytest.mark.parametrize(
    ("precision", "dtype", "why"),
    [("tf32", torch.float32, "the device is 'cpu'"), ("bfloat16", torch.float64, "the memories are float64")],
)
def test_what_the_device_or_dtype_lacks_is_refused_before_anything_is_made(
    precision: Precision, dtype: torch.dtype, why: str
) -> None:
    memory = SequenceMemory(level_of("titans"), 16, 2, precision=precision).to(dtype)
    x = torch.randn(1, 5, 16, dtype=dtype)
    model = lm(precision=precision).to(dtype)
    static, learning = (continuum(precision, learn=how).to(dtype) for how in ("static", "context"))
    calls = {
        "SequenceMemory": lambda: memory(x),
        "SequenceMemory, a step": lambda: memory.step(x[:, 0]),
        "CMS": lambda: static(x),
        "CMS, in context": lambda: learning(x),
        "HopeLM": lambda: model(torch.zeros(1, 3, dtype=torch.long)),
        "": lambda: run(level_of("deltanet"), *torch.randn(3, 1, 2, 2, 4, dtype=dtype), precision=precision),
    }
    with Products() as products:
        for name, call in calls.items():
            with pytest.raises(ValueError, match=rf"^{name.partition(',')[0]}.*precision='{precision}'.*{why}"):
                call()
    assert not products.seen


def test_a_section_of_a_configuration_keeps_it() -> None:
    section = ModelConfig(precision="tf32", dim=16)
    assert ModelConfig(**section.model_dump()).precision == "tf32"
    with pytest.raises(nestopt.ConfigError, match=r"precision: 'tf23' is not allowed; give .*Did you mean 'tf32'\?"):
        ModelConfig(precision="tf23")
