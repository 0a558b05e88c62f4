"""`HopeLM` as a Hugging Face model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from nestopt.config import ConfigError  # noqa: E402  # not before it is known that transformers is there
from nestopt.levels import titans  # noqa: E402
from nestopt.models.hf import HopeCache, HopeConfig, HopeForCausalLM  # noqa: E402
from nestopt.nn import detach  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

SMALL: dict[str, Any] = {"dim": 16, "heads": 2, "blocks": 2, "vocab": 40}
LEARNING = {"level": "cms", "periods": [4], "learn": "context", "teach": "loss"}
MODELS: dict[str, dict[str, Any]] = {
    "attention": {"mixer": "attention"},
    "window": {"mixer": {"level": "window_attention", "memory": {"memory": "window", "size": 5}}},
    "deltanet": {"mixer": "deltanet", "tie": True},
    "titans": {"mixer": {"level": "titans", "chunk": 4, "read": "chunk"}},
    "hope": {"mixer": {"level": "self_modifying", "chunk": 4, "projection_chunk": 8}, "mlp": LEARNING},
    "the last learns": {"mixer": "deltanet", "mlps": [{"level": "cms"}, LEARNING]},
    "two": {"mixers": ["deltanet", "attention"], "mlp": LEARNING},
}


def make(name: str, **more: Any) -> HopeForCausalLM:
    torch.manual_seed(0)
    return HopeForCausalLM(HopeConfig({**SMALL, **MODELS[name], **more}, pad_token_id=0)).eval()


def some(batch: int = 2, length: int = 7, seed: int = 1) -> Tensor:
    return torch.randint(1, 40, (batch, length), generator=torch.Generator().manual_seed(seed))


def greedy(logits: Tensor) -> Tensor:
    return logits.argmax(-1)


@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_with_other_manners(name: str) -> None:
    model, x = make(name), some()
    out = model(x, labels=x)
    logits, _ = model.model(x)
    torch.testing.assert_close(out.logits, logits)
    torch.testing.assert_close(out.loss, model.model.loss(x)[0])
    torch.testing.assert_close(model(x, logits_to_keep=1).logits, logits[:, -1:])
    assert model(x, return_dict=False)[0].equal(out.logits)
    assert model(x, use_cache=False).cache is None
    labels = x.clone()
    labels[0, 3:] = -100
    torch.testing.assert_close(model.train()(x, labels=labels).loss, _counted(logits, labels))


def _counted(logits: Tensor, labels: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, x = make(name), some()
    model.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {path.name for path in tmp_path.iterdir()}
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, HopeConfig)
    assert config.section() == model.config.section()
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(again, HopeForCausalLM)
    for (key, mine), (other, theirs) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        assert key == other
        assert mine.equal(theirs), key
    assert again(x).logits.equal(model(x).logits)
    tied = model.config.tie_word_embeddings
    assert (again.model.head.weight is again.model.embedding.weight) == tied
    half = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.model.head.weight.dtype == torch.bfloat16
    assert half(x).logits.isfinite().all()


@pytest.mark.parametrize("name", MODELS)
def test_it_generates_as_the_model_does(name: str) -> None:
    model, x = make(name), some()
    wanted, _ = model.model.generate(x, 6, greedy)
    assert model.generate(x, max_new_tokens=6, do_sample=False).equal(wanted)
    torch.manual_seed(0)
    many = model.generate(x, max_new_tokens=4, do_sample=True, num_return_sequences=3)
    assert many.shape == (6, 11)


@pytest.mark.parametrize("name", ["two", "hope"])
def test_beams_take_their_memories_along(name: str) -> None:
    model, x = make(name), some(1, 5)
    found = model.generate(x, max_new_tokens=3, num_beams=40, num_return_sequences=1, do_sample=False)
    best, score = None, -float("inf")
    with torch.no_grad():
        # 40 beams of 40 tokens: the best three tokens among all that begin with the beams kept
        first = model(x).logits[0, -1].log_softmax(-1)
        rows = torch.cat([x.expand(40, -1), torch.arange(40)[:, None]], 1)
        second = first[:, None] + model(rows).logits[:, -1].log_softmax(-1)
        top = second.flatten().topk(40)
        rows = torch.cat([rows[top.indices // 40], top.indices[:, None] % 40], 1)
        third = top.values[:, None] + model(rows).logits[:, -1].log_softmax(-1)
        score, place = third.flatten().max(0)
        best = torch.cat([rows[place // 40], place[None] % 40])
    assert score > -float("inf")
    assert found[0].equal(best)


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_either_side(name: str) -> None:
    model, x = make(name), some()
    left, right = torch.ones_like(x), torch.ones_like(x)
    left[1, :3] = right[1, 4:] = 0
    alone = model(x[1:, 3:]).logits
    torch.testing.assert_close(model(x, attention_mask=left).logits[1:, 3:], alone, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model(x, attention_mask=right).logits[1:, :4], model(x[1:, :4]).logits, rtol=1e-4, atol=1e-5
    )
    padded = x.clone()
    padded[1, :3] = 0
    for use_cache in (True, False):
        made = model.generate(
            padded, attention_mask=left, max_new_tokens=11, min_new_tokens=11, do_sample=False, use_cache=use_cache
        )
        for row, first in ((0, 0), (1, 3)):
            options = {"max_new_tokens": 11, "min_new_tokens": 11, "do_sample": False}
            assert made[row, 7:].equal(model.generate(x[row : row + 1, first:], **options)[0, 7 - first :])


@pytest.mark.parametrize("name", ["deltanet", "titans", "hope"])
def test_a_single_token_may_be_padding_too(name: str) -> None:
    model, x = make(name), some(2, 9)
    with torch.no_grad():
        cache, mask = model(x[:, :6]).cache, torch.ones(2, 7, dtype=torch.int64)
        mask[1, 6] = 0
        model(x[:, 6:7], attention_mask=mask, cache=cache)
        found = model(x[:, 7:], cache=cache).logits
        torch.testing.assert_close(found[:1], model(x[:1]).logits[:, 7:], rtol=1e-4, atol=1e-5)
        alone = model(x[1:, [0, 1, 2, 3, 4, 5, 7, 8]]).logits[:, 6:]
    torch.testing.assert_close(found[1:], alone, rtol=1e-4, atol=1e-5)


def test_they_are_found_where_models_are() -> None:
    import nestopt.models

    assert nestopt.models.HopeForCausalLM is HopeForCausalLM
    assert nestopt.models.HopeConfig is HopeConfig
    with pytest.raises(AttributeError, match="HopeConf'"):
        nestopt.models.HopeConf  # noqa: B018


def test_a_cache_goes_on() -> None:
    model, x = make("two"), some(2, 12)
    whole = model(x).logits
    first = model(x[:, :5])
    cache = first.cache
    assert isinstance(cache, HopeCache)
    assert cache.get_seq_length() == 5
    second = model(x[:, 5:], cache=cache, attention_mask=torch.ones_like(x))
    assert second.cache is cache
    assert cache.get_seq_length() == 12
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=1e-4, atol=1e-5)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    chosen = HopeCache(detach(model(x).cache.state), 12)  # rows 0 and 1, once more
    again, other = (model(x, cache=c).logits for c in (cache, chosen))
    torch.testing.assert_close(again, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="can't be cropped"):
        cache.crop(3)


def test_reading_without_learning() -> None:
    model, x = make("two"), some()
    still = model(x, learn="mixer").cache.state["block_0"]["mlp"]["levels"]["every_4"]["weights"]["W1"]
    moved = model(x).cache.state["block_0"]["mlp"]["levels"]["every_4"]["weights"]["W1"]
    start = model.model.blocks[0].mlp.levels["every_4"].W1
    torch.testing.assert_close(still[0], start)
    assert not torch.isclose(moved[0], start).all()


def test_from_a_trained_model() -> None:
    trained = make("hope").model
    section = make("hope").config.section()
    found = HopeForCausalLM.from_hope(trained, section)
    assert found(some()).logits.equal(trained(some())[0])


def test_a_larger_vocabulary() -> None:
    model, x = make("deltanet"), some()
    before = model(x).logits
    model.resize_token_embeddings(44, mean_resizing=False)
    torch.testing.assert_close(model(x).logits[..., :40], before)
    assert model.config.vocab_size == model.model.vocab == model.config.section().vocab == 44
    assert model.model.head.weight is model.model.embedding.weight
    assert model(torch.tensor([[43]])).logits.shape == (1, 1, 44)


def test_what_a_checkpoint_lacks_is_not_made_up(tmp_path: Path) -> None:
    make("hope").save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    (gone,) = [key for key in tensors if key.endswith("blocks.0.mlp.levels.every_4.W1")]
    save_file({key: value for key, value in tensors.items() if key != gone}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="the checkpoint has no W1 of a Block"):
        HopeForCausalLM.from_pretrained(tmp_path)


def test_a_config_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mixerz"):
        HopeConfig({"mixerz": "attention"})
    for wrong in ({"dim": 8}, {"vocab_size": 32}, {"mixers": ["deltanet"]}):
        with pytest.raises(ConfigError, match=r"is not allowed; give it in model, such as {'vocab': 256}"):
            HopeConfig(**wrong)
    assert HopeConfig(SMALL, vocab_size=40).vocab_size == 40
    HopeConfig({**SMALL, **MODELS["hope"]}).save_pretrained(tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    assert data["model"]["mixer"]["level"] == "self_modifying"
    assert data["model_type"] == "nestopt_hope"


def test_it_learns_in_a_trainer(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    data = [{"input_ids": row, "labels": row} for row in torch.arange(16).repeat(8, 2) + 1]
    arguments = transformers.TrainingArguments(
        str(tmp_path),
        max_steps=30,
        learning_rate=0.02,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        logging_steps=5,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"segment": 16},
    )
    model = make("two", mlp={"level": "cms", "periods": [1]})
    trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert model.model.segment == 16
    assert trainer.evaluate()["eval_loss"] < 0.5 * before
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.5 * losses[0]


def test_the_precision_of_products_is_kept(tmp_path: Path) -> None:
    model = make("hope", precision="bfloat16")
    model.save_pretrained(tmp_path)
    again = HopeForCausalLM.from_pretrained(tmp_path)
    assert again.model.precision == again.model.blocks[0].mixer.precision == "bfloat16"
    torch.testing.assert_close(again(some()).logits, model(some()).logits, rtol=0, atol=0)
    with pytest.raises(ConfigError, match="precision: 'half' is not allowed; give"):
        make("hope", precision="half")


def test_a_config_saved_under_other_defaults_keeps_them(tmp_path):
    config = HopeConfig({**SMALL, "mixer": "titans"})
    config.save_pretrained(tmp_path)
    again = HopeConfig.from_pretrained(tmp_path)
    assert again.section().mixer == config.section().mixer == titans()
    file = tmp_path / "config.json"
    kept = json.loads(file.read_text(encoding="utf-8"))
    kept["model"]["mixer"] = "titans"  # as it was written before
    file.write_text(json.dumps(kept), encoding="utf-8")
    mixer = HopeConfig.from_pretrained(tmp_path).section().mixer
    assert (mixer.normalized, mixer.forget, mixer.memory.residual, mixer.chunk) == (True, "all", True, 16)
