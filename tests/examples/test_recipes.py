"""The recipes for other libraries' trainers, where these libraries are installed."""

from __future__ import annotations

import importlib
import re
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import nestopt

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore")  # they are of those libraries


def recipe(name: str, *needs: str) -> SimpleNamespace:
    """What the script defines, or a skip where a library that it needs is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for library in needs:
            pytest.importorskip(library)
        return SimpleNamespace(**runpy.run_path(str(EXAMPLES / name), run_name=name))


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


# -- Hugging Face ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hf() -> SimpleNamespace:
    return recipe("huggingface.py", "transformers", "accelerate")


WAYS = ["by_factory", "by_hand", "by_class"]


def has_factories() -> bool:
    return hasattr(importlib.import_module("transformers.trainer"), "is_optimizer_factory")


def way(hf: SimpleNamespace, name: str) -> Callable[..., Any]:
    if name == "by_factory" and not has_factories():
        pytest.skip("this transformers has no factories of optimizers")
    return getattr(hf, name)


def test_main_of_huggingface(
    hf: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    way(hf, "by_factory")
    monkeypatch.chdir(tmp_path)
    hf.main()
    found = re.findall(r"(by_\w+): loss (\d\.\d+), then (\d\.\d+); held out (\d\.\d+)", capsys.readouterr().out)
    assert [name for name, *_ in found] == WAYS
    for _, first, last, held_out in found:
        assert float(last) < 0.75 * float(first)
        assert float(held_out) < 0.8 * float(first)
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("name", ["by_factory", "by_hand"])
def test_routed_in_the_trainer(hf: SimpleNamespace, name: str, tmp_path: Path) -> None:
    model = hf.language_model()
    made = way(hf, name)(model, str(tmp_path), steps=4)
    built = made.create_optimizer()
    assert isinstance(built, nestopt.optim.Nested)
    found = {row.name: row.level for row in built.explain()}
    assert len(found) == len(list(model.parameters()))  # the tied output layer is there once
    assert found["model.embed_tokens.weight"] == "adamw"
    matrices = {name for name, level in found.items() if level == "muon"}
    assert matrices == {name for name in found if re.search(r"layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight", name)}


def test_the_groups_of_the_trainer(hf: SimpleNamespace, tmp_path: Path) -> None:
    model = hf.language_model()
    built = hf.by_class(model, str(tmp_path), steps=4).create_optimizer()
    assert [group["weight_decay"] for group in built.param_groups] == [0.1, 0.0]
    assert {param.ndim for param in built.param_groups[1]["params"]} == {1}


def test_a_run_is_that_of_torch(hf: SimpleNamespace, tmp_path: Path) -> None:
    """torch's AdamW and ours, each built by the Trainer."""
    found = []
    for cls in (torch.optim.AdamW, nestopt.optim.AdamW):
        model = hf.language_model()
        options = {"optimizer_cls_and_kwargs": (cls, {"lr": 3e-3})}
        hf.trainer(model, str(tmp_path / cls.__module__), steps=8, **options).train()
        found.append(weights(model))
    start = weights(hf.language_model())
    for name, weight in found[0].items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(found[1][name], weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", WAYS)
def test_a_run_goes_on_from_a_checkpoint(hf: SimpleNamespace, name: str, tmp_path: Path) -> None:
    make, folder = way(hf, name), str(tmp_path)
    whole = hf.language_model()
    make(whole, folder, steps=8).train()
    resumed = hf.language_model()
    made = make(resumed, folder, steps=8)
    made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert made.state.global_step == 8
    assert_equal(weights(whole), weights(resumed))


def test_evaluations_change_nothing(hf: SimpleNamespace, tmp_path: Path) -> None:
    found = []
    for often in ("steps", "no"):
        model = hf.language_model()
        made = hf.by_hand(model, str(tmp_path), steps=8)
        made.args.eval_strategy = made.args.eval_strategy.__class__(often)
        made.train()
        found.append((weights(model), [entry for entry in made.state.log_history if "eval_loss" in entry]))
    (some, twice), (others, never) = found
    assert (len(twice), len(never)) == (2, 0)
    assert_equal(some, others)


def test_averages_of_weights_are_what_is_evaluated(hf: SimpleNamespace, tmp_path: Path) -> None:
    """The Trainer puts the optimizer into `eval`, and back: what is trained is not what is evaluated."""
    model = hf.language_model()
    stack = nestopt.levels.weight_average(nestopt.levels.adam(), decay=0.9)
    optimizer = nestopt.optim.Nested(model.parameters(), stack, lr=3e-3)
    made = hf.trainer(model, str(tmp_path), steps=8, optimizers=(optimizer, None))
    made.train()
    logged = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    batch = torch.stack([piece["input_ids"] for piece in hf.text()[-4:]])
    optimizer.train()
    trained = weights(model)
    losses = []
    for mode in (optimizer.train, optimizer.eval):
        mode()
        with torch.no_grad():
            losses.append(float(model.eval()(input_ids=batch, labels=batch).loss))
    assert losses[1] == pytest.approx(logged[-1], rel=1e-4)
    assert losses[0] != pytest.approx(logged[-1], rel=1e-3)
    optimizer.train()
    assert_equal(weights(model), trained)


def test_layers_are_watched_in_the_trainer(hf: SimpleNamespace, tmp_path: Path, caplog: Any) -> None:
    found = []
    for spec in ("dgd", {"level": "dgd", "delta": 0}):
        model = hf.language_model()
        made = nestopt.optimizer(model, spec, lr=0.1)
        with caplog.at_level("WARNING", "nestopt"):
            hf.trainer(model, str(tmp_path), steps=4, optimizers=(made, None)).train()
        found.append(weights(model))
    assert not [record for record in caplog.records if record.name == "nestopt"]
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(found[0][name], found[1][name])


def test_layers_of_their_models(hf: SimpleNamespace) -> None:
    """As many layers as the configuration says, an encoder's before a decoder's."""
    library, layers = importlib.import_module("transformers"), nestopt.optim.routing.layers.layers
    gpt2 = layers(library.GPT2LMHeadModel(library.GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=9)))
    sizes = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 9}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_layers": 3, "decoder_layers": 2}
    bart = layers(library.BartForConditionalGeneration(library.BartConfig(**sizes)))
    for found, lists in ((gpt2, {r"\.h": 1}), (bart, {r"encoder\.layers": 1, r"decoder\.layers": 4})):
        for name, layer in found.items():
            for path, first in lists.items():
                if match := re.search(rf"{path}\.(\d+)", name):
                    assert layer == first + int(match[1]), name
    assert gpt2["transformer.wpe.weight"] == bart["model.shared.weight"] == 0
    assert gpt2["transformer.ln_f.weight"] == 4


# -- Lightning ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lightning() -> SimpleNamespace:
    return recipe("lightning_module.py", "lightning")


def test_main_of_lightning(
    lightning: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    lightning.main()
    ((first, last),) = re.findall(r"loss (\d\.\d+), then (\d\.\d+)", capsys.readouterr().out)
    assert float(last) < 0.1 < 2 < float(first)


def test_a_fit_is_a_loop_by_hand(lightning: SimpleNamespace, tmp_path: Path) -> None:
    model, twin = lightning.Classifier(steps=12), lightning.Classifier(steps=12)
    twin.load_state_dict(model.state_dict())
    lightning.trainer(12, enable_checkpointing=False, default_root_dir=tmp_path).fit(model, lightning.digits())
    made = twin.configure_optimizers()
    optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
    found = {row.name: row.level for row in optimizer.explain()}
    assert {name for name, level in found.items() if level == "muon"} == {"net.0.weight", "net.2.weight"}
    batches = list(lightning.digits()) * 2
    for pictures, labels in batches[:12]:
        optimizer.zero_grad()
        nn.functional.cross_entropy(twin.net(pictures), labels).backward()
        optimizer.step()
        schedule.step()
    assert_equal(weights(model), weights(twin))


def test_a_fit_goes_on_from_a_checkpoint(lightning: SimpleNamespace, tmp_path: Path) -> None:
    """At the end of an epoch: within one, Lightning itself begins the data anew, whatever the optimizer."""
    saving = importlib.import_module("lightning.pytorch.callbacks").ModelCheckpoint
    whole, half = lightning.Classifier(steps=16), lightning.Classifier(steps=16)
    half.load_state_dict(whole.state_dict())
    lightning.trainer(16, enable_checkpointing=False).fit(whole, lightning.digits())
    saver = saving(dirpath=tmp_path, every_n_train_steps=8)
    lightning.trainer(8, callbacks=[saver]).fit(half, lightning.digits())
    assert len(half.losses) == 8
    resumed = lightning.Classifier(steps=16)
    again = lightning.trainer(16, enable_checkpointing=False)
    again.fit(resumed, lightning.digits(), ckpt_path=saver.best_model_path)
    assert half.losses + resumed.losses == whole.losses
    assert_equal(weights(whole), weights(resumed))


# -- accelerate --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def accelerate() -> SimpleNamespace:
    return recipe("accelerate_loop.py", "accelerate")


def test_main_of_accelerate(accelerate: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    accelerate.main()
    ((first, last, same),) = re.findall(r"loss (\d\.\d+), then (\d\.\d+); .* losses: (\w+)", capsys.readouterr().out)
    assert float(last) < 0.25 * float(first)
    assert same == "True"


def test_its_loop_is_a_loop_by_hand(accelerate: SimpleNamespace) -> None:
    loop, twin = accelerate.Loop(), accelerate.network()
    start = weights(twin)
    loop.epoch()
    optimizer = nestopt.optimizer(twin, "muon", lr=0.02, rest={"stack": "adamw", "lr": 3e-3})
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, 64)
    for i, (pictures, labels) in enumerate(accelerate.digits()):
        (nn.functional.cross_entropy(twin(pictures), labels) / 2).backward()
        if i % 2:
            torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    found = weights(loop.model)
    for name, weight in weights(twin).items():
        assert not torch.equal(weight, start[name])
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-6)
