"""Learning rates by layer: which layer a parameter is in, and what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nestopt.config import ConfigError
from nestopt.models import HopeLM
from nestopt.optim import Nested, optimizer
from nestopt.optim.routing.layers import layers


def rates(built: Nested) -> dict[str, float]:
    return {row.name: row.lr for row in built.explain()}


def by_prefix(model: nn.Module, expected: dict[str, int]) -> dict[str, int]:
    """The layer of each parameter, as the longest of these prefixes of its name says."""
    prefixes = sorted(expected, key=len, reverse=True)
    return {name: expected[next(p for p in prefixes if name.startswith(p))] for name in dict(model.named_parameters())}


# -- vision transformers, as BEiT has it -------------------------------------------------------------------------------


class Vit(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.pos_embed = nn.Parameter(torch.zeros(1, 5, 8))
        self.patch_embed = nn.Conv2d(1, 8, 2, 2)
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(depth)])
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)


def beit(name: str, num_max_layer: int) -> int:
    """`get_num_layer_for_vit` of BEiT's optim_factory.py, for names there are here."""
    if name in ("cls_token", "mask_token", "pos_embed") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    return num_max_layer - 1


@pytest.mark.parametrize("depth", [1, 3, 12])
def test_the_rates_are_those_of_beit(depth: int) -> None:
    model, decay, lr = Vit(depth), 0.75, 0.02
    built = optimizer(model, "muon", lr, layer_decay=decay, rest={"stack": "adamw", "lr": 0.001})
    for row in built.explain():
        scale = decay ** (depth + 2 - 1 - beit(row.name, depth + 2))
        assert row.lr == pytest.approx((lr if row.level == "muon" else 0.001) * scale, rel=1e-12)
    placed = [param for group in built.param_groups for param in group["params"]]
    assert len(placed) == len(list(model.parameters())) == len(set(placed))


def test_the_steps_are_as_long_as_the_rates() -> None:
    model = Vit()
    built = optimizer(model, "gd", 0.1, layer_decay=0.5)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    for param in model.parameters():
        param.grad = torch.ones_like(param)
    built.step()
    for name, param in model.named_parameters():
        expected = before[name] - 0.1 * 0.5 ** (4 - beit(name, 5))
        torch.testing.assert_close(param.detach(), expected, rtol=1e-6, atol=1e-7)


# -- other models ------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))


class Stages(nn.Module):
    """As a ResNet: blocks in several lists, with something between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.stage1 = nn.Sequential(Residual(), Residual())
        self.down = nn.Conv2d(4, 4, 2)
        self.stage2 = nn.Sequential(Residual(), nn.Dropout(), Residual())
        self.fc = nn.Linear(4, 2)


class Translator(nn.Module):
    """As T5: two stacks of blocks of one class, and an output layer that is defined first."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = nn.Linear(8, 11)
        self.encoder = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)])
        self.between = nn.LayerNorm(8)
        self.decoder = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 8) for _ in range(2)])
        self.late_table = nn.Embedding(11, 8)

    def get_output_embeddings(self) -> nn.Module:
        return self.readout


class TwoKinds(nn.Module):
    """As BART: an encoder and a decoder of different blocks; and lists too short to count."""

    def __init__(self, decoder: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 1))
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 4, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 8), decoder)
        self.heads = nn.ModuleList([nn.Linear(8, 2), nn.Linear(8, 3)])


class Pairs(nn.Module):
    """Each block is a list of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleList([nn.Linear(4, 4), nn.LayerNorm(4)]) for _ in range(3)])
        self.out = nn.Linear(4, 2)


class TiedHead(nn.Module):
    """As GPT-2: the output layer is the embedding, in the manner of Hugging Face's models."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.lm_head = nn.Linear(8, 11, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "stages": (
        Stages,
        {"conv": 0, "stage1.0": 1, "stage1.1": 2, "down": 2, "stage2.0": 3, "stage2.2": 4, "fc": 5},
    ),
    "translator": (
        Translator,
        {
            "readout": 5,
            "encoder.0": 1,
            "encoder.1": 2,
            "between": 2,
            "decoder.0": 3,
            "decoder.1": 4,
            "late_table": 0,
        },
    ),
    "two kinds": (
        lambda: TwoKinds(decoder=3),
        {
            "stem": 0,
            **{f"encoder.layers.{i}": i + 1 for i in range(4)},
            **{f"decoder.layers.{i}": i + 5 for i in range(3)},
            "heads": 8,
        },
    ),
    "a short second kind": (
        lambda: TwoKinds(decoder=2),
        {"stem": 0, **{f"encoder.layers.{i}": i + 1 for i in range(4)}, "decoder": 5, "heads": 5},
    ),
    "one module with blocks in a list": (
        lambda: nn.Sequential(
            nn.Embedding(5, 8),
            nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 8), 2, enable_nested_tensor=False),
            nn.Linear(8, 5),
        ),
        {"0": 0, "1.layers.0": 1, "1.layers.1": 2, "2": 3},
    ),
    "blocks of several linear layers": (
        lambda: nn.Sequential(
            nn.Linear(4, 4), *(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(3))
        ),
        {"0": 0, "1": 1, "2": 2, "3": 3},
    ),
    "pairs": (Pairs, {"layers.0": 1, "layers.1": 2, "layers.2": 3, "out": 4}),
    "lists in lists": (
        lambda: nn.Sequential(
            nn.Embedding(5, 4),
            nn.ModuleList(
                [nn.ModuleList([nn.LayerNorm(4), nn.ModuleList([nn.Linear(4, 4), nn.GELU()])]) for _ in range(3)]
            ),
            nn.Linear(4, 5),
        ),
        {"0": 0, "1.0": 1, "1.1": 2, "1.2": 3, "2": 4},
    ),
    "tied head": (TiedHead, {"embed": 0, "blocks.0": 1, "blocks.1": 2}),
    "sequential": (
        lambda: nn.Sequential(nn.Embedding(5, 4), Residual(), Residual(), nn.LayerNorm(4), nn.Linear(4, 5)),
        {"0": 0, "1": 1, "2": 2, "3": 3, "4": 3},
    ),
    "list in a list": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*(Residual() for _ in range(3))), nn.Linear(4, 2)),
        {"0": 0, "1.0": 1, "1.1": 2, "1.2": 3, "2": 4},
    ),
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 2)),
        {"0": 1, "1": 1, "3": 2, "4": 3},
    ),
    "hope": (
        lambda: HopeLM(vocab=11, dim=8, blocks=2, heads=2),
        {"embedding": 0, "blocks.0": 1, "blocks.1": 2, "norm": 3, "head": 3},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_layers_of(name: str) -> None:
    make, expected = MODELS[name]
    model = make()
    assert layers(model) == by_prefix(model, expected)
    wrapped = nn.DataParallel(model)
    assert layers(wrapped) == {f"module.{key}": layer for key, layer in layers(model).items()}


def test_a_tied_embedding_is_stepped_at_the_lowest_rate() -> None:
    built = optimizer(TiedHead(), "muon", 1.0, rest={"stack": "adamw", "lr": 1.0}, layer_decay=0.5)
    assert rates(built)["embed.weight"] == 0.25  # nothing is left after the blocks, whose last has the whole rate
    assert rates(built)["blocks.1.weight"] == 1.0
    assert "lm_head.weight" not in rates(built)


def test_freezing_changes_no_other_rate() -> None:
    model = Vit()
    before = rates(optimizer(model, "momentum", layer_decay=0.9))
    model.head.requires_grad_(False)
    after = rates(optimizer(model, "momentum", layer_decay=0.9))
    assert after == before


# -- what is given -----------------------------------------------------------------------------------------------------


def test_explain_says_the_layer() -> None:
    rows = {row.name: row for row in optimizer(Vit(), "muon", layer_decay=0.9).explain()}
    assert rows["blocks.1.linear1.weight"].why == "a hidden matrix; layer 2 of 0…4, lr × 0.81"
    assert rows["head.weight"].why == "the last linear layer, taken for the output"


def test_the_rate_of_a_group_is_as_given() -> None:
    groups = [{"match": "norm1", "lr": 0.5}, {"match": "norm2", "weight_decay": 0.0}]
    built = optimizer(Vit(), "momentum", 1.0, 0.1, layer_decay=0.5, groups=groups)
    found = rates(built)
    assert {found[f"blocks.{i}.norm1.weight"] for i in range(3)} == {0.5}
    assert [found[f"blocks.{i}.norm2.weight"] for i in range(3)] == [0.125, 0.25, 0.5]
    decays = {name: group["weight_decay"] for group in built.param_groups for name in group["param_names"]}
    assert {decays[f"blocks.{i}.norm2.weight"] for i in range(3)} == {0.0}
    assert decays["head.weight"] == 0.1


def test_a_rate_that_is_a_tensor() -> None:
    rate = torch.tensor(1.0)
    built = optimizer(Vit(1), "momentum", rate, layer_decay=0.5)
    assert [group["lr"].item() for group in built.param_groups] == [0.25, 0.5, 1.0]
    assert built.param_groups[-1]["lr"] is rate


def test_schedules_keep_the_proportions() -> None:
    built = optimizer(Vit(1), "momentum", 1.0, layer_decay=0.5)
    schedule = torch.optim.lr_scheduler.LambdaLR(built, lambda step: 1 / (1 + step))
    built.step()
    schedule.step()
    assert [group["lr"] for group in built.param_groups] == [0.125, 0.25, 0.5]


def test_layers_by_a_function() -> None:
    def layer_of(name: str) -> int:
        return 3 if name.startswith("head") else 1

    built = optimizer(Vit(), "momentum", 1.0, layer_decay=0.5, layer_of=layer_of)
    assert rates(built)["head.bias"] == 1.0
    assert {rate for name, rate in rates(built).items() if not name.startswith("head")} == {0.25}
    params: list[tuple[str, Tensor]] = [(name, torch.ones(2, requires_grad=True)) for name in ("a", "bb")]
    assert rates(optimizer(params, "momentum", 1.0, layer_decay=0.5, layer_of=len)) == {"a": 0.5, "bb": 1.0}


def test_what_can_not_be_told_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"can't tell the layers of Linear: no ModuleList or Sequential in it repeats.*give layer_of"
    ):
        optimizer(nn.Linear(2, 2), "momentum", layer_decay=0.9)
    with pytest.raises(ValueError, match="layer_decay needs a model, or layer_of"):
        optimizer([torch.ones(2, requires_grad=True)], "momentum", layer_decay=0.9)
    with pytest.raises(ValueError, match="layer_of is given without a layer_decay"):
        optimizer(Vit(), "momentum", layer_of=len)
    wrong: list[Any] = [-1, 0.5, None, True]
    for number in wrong:
        with pytest.raises(ValueError, match=r"layer_of\('cls_token'\) gave .*give a whole number, 0 or more"):
            optimizer(Vit(), "momentum", layer_decay=0.9, layer_of=lambda name, number=number: number)
    for decay in (0, 1.5, -1, float("nan")):
        with pytest.raises(ConfigError, match="layer_decay"):
            optimizer(Vit(), "momentum", layer_decay=decay)


def test_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("optimizer: {stack: momentum, lr: 1.0, layer_decay: 0.5, strict: false}", encoding="utf-8")
    assert rates(optimizer(Vit(), path))["cls_token"] == 0.5**4
    assert rates(optimizer(Vit(), path, layer_decay=1.0))["cls_token"] == 1.0
    assert len(optimizer(Vit(), path, layer_decay=1).param_groups) == 1
