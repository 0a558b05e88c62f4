"""Modules: memories of tokens, weights by kind, and both with an optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from nestopt.core.level import Level
from nestopt.core.tree import leaves
from nestopt.description import describe
from nestopt.levels import adam, adamw, attention, muon, titans
from nestopt.models.hope import HopeLM
from nestopt.nn import CMS, SequenceMemory
from nestopt.optim import optimizer as make_optimizer


class LanguageModel(nn.Module):
    def __init__(self, dim: int = 16, blocks: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, dim)
        block = nn.TransformerEncoderLayer(dim, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, blocks)
        self.head = nn.Linear(dim, 50, bias=False)
        self.head.weight = self.embed.weight


def layer(level: Level) -> SequenceMemory:
    return SequenceMemory(level, dim=8, heads=2)


def numel(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def test_a_transformer_with_adamw() -> None:
    model = LanguageModel()
    found = describe(model, torch.optim.AdamW(model.parameters()))
    assert [[memory.name for memory in level] for level in found.levels] == [
        ["weights: embedding", "weights: attention", "weights: linear", "weights: norm"],
        ["adamw.exp_avg", "adamw.exp_avg_sq"],
        [f"encoder.layers.{i}.self_attn" for i in range(3)],
    ]
    assert [level[0].frequency for level in found.levels] == ["every step", "every step", "every token"]
    assert found.weights == numel(model)
    assert found.weight_bytes == 4 * numel(model)
    assert found.state == 2 * 4 * numel(model)
    by_name = {memory.name: memory for memory in found.memories}
    # tied to the head, and counted once, where it is first met
    assert by_name["weights: embedding"].parameters == 50 * 16
    assert by_name["weights: attention"].parameters == 3 * numel(model.encoder.layers[0].self_attn)
    assert by_name["weights: norm"].needs == ("adamw.exp_avg", "adamw.exp_avg_sq")
    assert [row.memory.name + row.times for row in found.rows()[2]] == ["encoder.layers.*.self_attn × 3"]


def test_weights_without_an_optimizer_are_fixed_and_slowest() -> None:
    model = LanguageModel()
    found = describe(model)
    assert {memory.frequency for memory in found.levels[0]} == {"fixed"}
    assert found.weights == numel(model)
    assert found.levels[-1][0].frequency == "every token"


def test_weights_that_the_optimizer_does_not_have_stay_fixed() -> None:
    model = LanguageModel()
    found = describe(model, torch.optim.SGD(model.encoder.parameters(), momentum=0.9))
    assert [memory.name for memory in found.levels[0]] == ["weights: embedding"]
    assert found.levels[0][0].frequency == "fixed"
    assert found.weights == numel(model)


def test_one_kind_of_weights_in_two_stacks_is_two_memories() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD([{"params": model[0].parameters(), "momentum": 0.9}], lr=0.1)
    sizes = {m.name: m.parameters for m in describe(model, optimizer).memories}
    assert sizes == {"weights: linear (sgd)": 16, "weights: linear (not trained)": 10, "sgd": 16}


def test_parameters_of_the_optimizer_outside_the_module_are_listed() -> None:
    model, extra = nn.Linear(3, 4), nn.Parameter(torch.zeros(7))
    found = describe(model, torch.optim.SGD([*model.parameters(), extra]))
    assert {m.name: m.parameters for m in found.memories} == {"weights: linear": 16, "weights: outside the module": 7}


def test_layers_of_levels() -> None:
    model = nn.ModuleDict({"mixer": layer(titans(rule=adam())), "mlp": CMS(8)})
    found = describe(model)
    assert [[memory.name for memory in level] for level in found.levels] == [
        ["weights: titans layers", "weights: cms"],
        ["mixer"],
        ["mixer.rule.exp_avg", "mixer.rule.exp_avg_sq"],
    ]
    memory = found.levels[1][0]
    theta = 2 * 4 * 8
    assert (memory.context, memory.parameters, memory.state) == ("tokens", 2 * theta, 4 * 2 * theta)
    began = leaves(model["mixer"].init_state(1)["memory"]["level"])
    assert found.sequence_state == sum(leaf.numel() * leaf.element_size() for _, leaf in began)


def test_a_language_model_with_the_optimizer_made_for_it() -> None:
    model = HopeLM(vocab=50, dim=16, blocks=3, heads=2, mixer=titans())
    found = describe(model, make_optimizer(model, muon()))
    assert found.weights == numel(model)
    rows = [[row.memory.name + row.times for row in level] for level in found.rows()]
    assert rows[-2:] == [["blocks.*.mixer × 3"], ["blocks.*.mixer.rule × 3"]]
    owners = {need for memory in found.memories if memory.memory == "weights" for need in memory.needs}
    rest = adamw().label
    assert owners == {"muon", f"{rest}.exp_avg", f"{rest}.exp_avg_sq"}
    assert all(memory.period for memory in found.memories)


def test_a_level_on_a_slow_clock_of_tokens() -> None:
    memory = describe(nn.Sequential(layer(titans(period=16)))).memories[-1]
    assert memory.frequency == "every 16 tokens"


def test_a_layer_that_keeps_all_pairs_grows() -> None:
    memory = describe(nn.Sequential(layer(attention()))).levels[-1][0]
    assert memory.grows
    assert memory.state is None


def test_a_wrapper_that_passes_on_its_layers_level_is_not_counted_again() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = layer(titans())
            self.level = self.inner.level

    assert [m.name for m in describe(Block()).memories if m.context == "tokens"] == ["inner", "inner.rule"]


@pytest.mark.parametrize(
    ("module", "rule"),
    [
        (nn.LSTM(3, 5, num_layers=2, bidirectional=True), "lstm"),
        pytest.param(
            nn.LSTM(3, 5, proj_size=2),
            "lstm",
            marks=pytest.mark.filterwarnings("ignore:LSTM with projections"),
        ),
        (nn.GRU(3, 5), "gru"),
        (nn.RNN(3, 5, nonlinearity="relu"), "rnn_relu"),
    ],
)
def test_recurrent_states_have_the_size_torch_gives_them(module: nn.RNNBase, rule: str) -> None:
    memory = describe(module).memories[-1]
    _, state = module(torch.zeros(1, 1, 3))
    tensors: tuple[Tensor, ...] = state if isinstance(state, tuple) else (state,)
    assert (memory.rule, memory.parameters) == (rule, sum(t.numel() for t in tensors))
    assert memory.frequency == "every token"


def test_attention_of_others_is_known_by_name_and_said_to_be() -> None:
    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(4, 12)

    class BertAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.self = SelfAttention()
            self.dense = nn.Linear(4, 4)

    found = describe(nn.Sequential(BertAttention(), BertAttention()))
    assert [m.name for m in found.memories] == ["weights: attention", "0.self", "1.self"]
    assert len(found.notes) == 1
    assert found.notes[0].startswith("SelfAttention is taken for softmax attention")


def test_lazy_parameters_are_refused_with_what_to_do() -> None:
    with pytest.raises(ValueError, match="pass a batch through the module first"):
        describe(nn.LazyLinear(3))


def test_names_of_the_optimizer_and_the_module_do_not_meet() -> None:
    model = nn.ModuleDict({"sgd": nn.GRU(2, 2)})
    names = [m.name for m in describe(model, torch.optim.SGD(model.parameters(), momentum=0.9)).memories]
    assert sorted(names) == ["sgd", "sgd_2", "weights: recurrent"]


def test_products_that_are_not_float32_are_said() -> None:
    titan, keeper = layer(titans()), layer(attention())
    assert not any("Products" in note for note in describe(nn.Sequential(titan, keeper)).notes)
    titan.precision = "bfloat16"
    (note,) = (note for note in describe(nn.Sequential(titan, keeper)).notes if "Products" in note)
    assert note == "Products of 0 are made in bfloat16; their states and sums are float32."
    model = HopeLM(dim=8, heads=2, blocks=2, precision="tf32")
    assert "Products of all memories are made in tf32; their states and sums are float32." in describe(model).notes
    assert "made in tf32" in str(describe(model))
