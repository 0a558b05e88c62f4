"""`HopeForCausalLM` in the tools that people use with Hugging Face models."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from nestopt.models.hf import HopeConfig, HopeForCausalLM, HopeModel, byte_tokenizer  # noqa: E402
from tests.models.test_hf import LEARNING, MODELS, make, some  # noqa: E402

EXAMPLES = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def of_bytes(folder: Path) -> HopeForCausalLM:
    """A model of bytes, in a folder with its tokenizer."""
    torch.manual_seed(0)
    model = HopeForCausalLM(HopeConfig({"dim": 16, "heads": 2, "blocks": 2, "mixer": "deltanet"})).eval()
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return model


def gradients(model: HopeForCausalLM, x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(x, labels=x).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_gives_the_same_gradients(name: str) -> None:
    model, x = make(name).double().train(), some(2, 23)
    wanted = gradients(model, x)
    model.gradient_checkpointing_enable({"segment": 6})
    assert model.is_gradient_checkpointing
    assert model.model.segment == 6
    torch.testing.assert_close(gradients(model, x), wanted, rtol=1e-9, atol=1e-11)
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing
    assert model.model.segment == 0


def test_gradient_checkpointing_keeps_less() -> None:
    model, x = make("deltanet").train(), some(1, 640)

    def kept() -> int:
        sizes: dict[int, int] = {}

        def pack(saved: Tensor) -> Tensor:
            sizes[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            model(x, labels=x)
        return sum(sizes.values())

    before = kept()
    model.gradient_checkpointing_enable()
    assert model.model.segment == 64
    assert kept() < before / 2


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"gradient_checkpointing_kwargs": {"segment": 0}},
        {"gradient_checkpointing_kwargs": {"segment": 2.5}},
        {"gradient_checkpointing_kwargs": {"preserve_rng_state": True}},
        {"every_n_layers": 2},
        {"offload": True},
    ],
)
def test_gradient_checkpointing_in_another_way_is_refused(options: dict[str, Any]) -> None:
    model = make("deltanet")
    with pytest.raises(ValueError, match=r"HopeForCausalLM: \w+=\S+ is not allowed; .*give"):
        model.gradient_checkpointing_enable(**options)
    assert not model.is_gradient_checkpointing
    model.gradient_checkpointing_enable({"use_reentrant": False})  # as it is


@pytest.mark.parametrize("name", MODELS)
def test_embeddings_in_the_place_of_tokens(name: str) -> None:
    model, x = make(name).double(), some(2, 11)
    wanted = gradients(model, x)
    given = model.get_input_embeddings()(x)
    given.retain_grad()
    out = model(inputs_embeds=given, labels=x)
    torch.testing.assert_close(out.logits, model(x).logits, rtol=0, atol=0)
    model.zero_grad()
    out.loss.backward()
    assert given.grad is not None
    assert given.grad[:, :-1].any(-1).all()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)
    mask = torch.ones_like(x)
    mask[1, :4] = 0
    padded = model(inputs_embeds=given * mask[..., None], attention_mask=mask)  # padding is no token's
    torch.testing.assert_close(padded.logits, model(x, attention_mask=mask).logits, rtol=0, atol=0)
    first = model(x[:, :3]).cache  # tokens, then embeddings in the middle of a segment
    second = model(inputs_embeds=given[:, 3:], cache=first)
    torch.testing.assert_close(second.logits, model(x).logits[:, 3:], rtol=1e-9, atol=1e-9)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    made = model.generate(inputs_embeds=given.detach(), attention_mask=mask, **options)
    assert made.equal(model.generate(x, attention_mask=mask, **options)[:, 11:])
    starts = torch.zeros_like(x, dtype=torch.bool)
    starts[0, 4] = True
    torch.testing.assert_close(model.model(given, starts=starts)[0], model.model(x, starts=starts)[0], rtol=0, atol=0)


def test_embeddings_that_can_not_be_read_are_refused() -> None:
    model, x = make("two"), some()
    given = model.get_input_embeddings()(x)
    with pytest.raises(
        ValueError, match="some are no token's, and mlps learn from next tokens; give those of tokens, or"
    ):
        model(inputs_embeds=given + 0.5)
    model(inputs_embeds=given + 0.5, learn="mixer")
    torch.testing.assert_close(model(inputs_embeds=given, learn="mixer").logits, model(x, learn="mixer").logits)
    for wrong in ({}, {"input_ids": x, "inputs_embeds": given}):
        with pytest.raises(ValueError, match="give either input_ids or inputs_embeds"):
            model(**wrong)
    with pytest.raises(ValueError, match=r"embeddings have the shape \[2, 7, 3\]; give \[batch, tokens, 16\]"):
        model(inputs_embeds=given[..., :3], learn="mixer")


def test_what_is_not_kept_is_refused() -> None:
    model, x = make("deltanet"), some()
    for name in ("output_hidden_states", "output_attentions"):
        with pytest.raises(ValueError, match=f"{name}=True is not allowed; what blocks give is not kept"):
            model(x, **{name: True})
        model(x, **{name: False})
    with pytest.raises(ValueError, match="output_hidden_states=True"):
        model.generate(x, max_new_tokens=2, output_hidden_states=True, return_dict_in_generate=True)
    model.config.output_hidden_states = True
    for given in ({}, {"output_hidden_states": None}):
        with pytest.raises(ValueError, match="output_hidden_states=True"):
            model(x, **given)
    with pytest.raises(TypeError, match="HopeForCausalLM: token_type_ids=1 is not an argument that it takes"):
        make("deltanet")(x, token_type_ids=1)


@pytest.mark.parametrize("name", ["window", "titans", "two"])
def test_documents_packed_as_the_flattening_collator_does(name: str) -> None:
    model, parts = make(name).double(), [some(1, 5), some(1, 9, seed=2), some(1, 3, seed=3)]
    collate = transformers.DataCollatorWithFlattening()
    batch = collate([{"input_ids": part[0].tolist()} for part in parts])
    found = model(**batch)
    alone = [model(part, labels=part) for part in parts]
    torch.testing.assert_close(found.logits, torch.cat([one.logits for one in alone], 1), rtol=1e-9, atol=1e-9)
    weights = torch.tensor([4, 8, 2])
    losses = torch.stack([one.loss for one in alone])
    torch.testing.assert_close(found.loss, (losses * weights).sum() / weights.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["window", "two"])
def test_beams_of_a_padded_batch_are_those_of_its_rows(name: str) -> None:
    model, x = make(name).double(), some(3, 7, seed=5)
    mask = torch.ones_like(x)
    mask[1, :3] = mask[2, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "num_beams": 4, "num_return_sequences": 2}
    found = model.generate(x * mask, attention_mask=mask, do_sample=False, **options)
    for row, first in enumerate((0, 3, 5)):
        alone = model.generate(x[row : row + 1, first:], do_sample=False, **options)
        assert found[2 * row : 2 * row + 2, 7:].equal(alone[:, 7 - first :])


def test_weights_in_several_places_are_refused(tmp_path: Path) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = make("two"), some()
    wanted = model(x).logits
    model.save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    for one in ("cpu", "auto", {"": "cpu"}):
        torch.testing.assert_close(load(tmp_path, device_map=one)(x).logits, wanted)
    parts = {"model.embedding": "cpu", "model.blocks": "cpu", "model.norm": "disk", "model.head": "disk"}
    sentence = "HopeForCausalLM: its weights are offloaded, or on several devices; .* give a device_map of one device"
    with pytest.raises(ValueError, match=sentence):
        load(tmp_path, device_map=parts, offload_folder=tmp_path / "offload")(x)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(ValueError, match=sentence):
        model(x)
    # a map that is made for several GPUs leaves it in one piece
    places = accelerate.infer_auto_device_map(
        make("two"), max_memory={0: 10**6, 1: 10**6}, no_split_module_classes=list(model._no_split_modules)
    )
    assert len(set(places.values())) == 1


def test_the_bare_model(tmp_path: Path) -> None:
    model, x = make("two"), some()
    model.save_pretrained(tmp_path)
    bare = transformers.AutoModel.from_pretrained(tmp_path)
    assert isinstance(bare, HopeModel)
    out = bare(x)
    torch.testing.assert_close(model.model.head(out.last_hidden_state), model(x).logits, rtol=0, atol=0)
    assert out.cache.get_seq_length() == 7


def test_the_tokenizer_of_bytes(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for one in (tokenizer, transformers.AutoTokenizer.from_pretrained(tmp_path)):
        for text in ("".join(map(chr, range(0x250))), " Ā \t a , b .\r\n\n<0x00> 木 🙂", "\0\0x"):
            assert one(text).input_ids == list(text.encode())
            assert one.decode(one(text).input_ids) == text
        assert len(one) == 256
        assert one(["abc", "d"], padding=True).input_ids == [[97, 98, 99], [0, 0, 100]]


PROGRAM = """
import sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModel, AutoModelForCausalLM, pipeline
import nestopt.models.hf
folder = sys.argv[1]
print(type(AutoModel.from_pretrained(folder)).__name__, type(AutoModelForCausalLM.from_pretrained(folder)).__name__)
write = pipeline("text-generation", model=folder)
texts, options = ["hello there", "hi"], {"max_new_tokens": 6, "do_sample": False, "return_full_text": False}
both = [one["generated_text"] for (one,) in write(texts, batch_size=2, **options)]
print(both == [write(text, **options)[0]["generated_text"] for text in texts], *(text.encode().hex() for text in both))
"""


def test_a_fresh_process_that_imports_the_module_finds_it(tmp_path: Path) -> None:
    model = of_bytes(tmp_path)
    out = subprocess.run([sys.executable, "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True, check=True)
    *_, names, written = out.stdout.strip().splitlines()
    assert names == "HopeModel HopeForCausalLM"
    same, *texts = written.split()
    assert same == "True"
    wanted, _ = model.model.generate(torch.tensor([list(b"hi")]), 6, lambda logits: logits.argmax(-1))
    assert texts[1] == bytes(wanted[0, 2:].tolist()).decode("utf-8", "replace").encode().hex()


@pytest.mark.parametrize("mlp", [{"level": "cms", "periods": [1, 4]}, LEARNING])
def test_peft_reaches_the_mlps(mlp: dict[str, Any], tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model, x = make("two", mlp=mlp), some(2, 9)
    before = model(x).logits
    names = [name for name, _ in model.named_parameters() if name.rsplit(".", 1)[1] in ("W1", "W2")]
    assert len(names) == 4 * len(mlp["periods"])
    settings = peft.LoraConfig(
        r=2, target_modules=["query", "out"], target_parameters=names, task_type="CAUSAL_LM", init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, settings)
    adapted(input_ids=x, labels=x).loss.backward()
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert sum(".mlp." in name for name in trained) == 2 * len(names)
    assert all("lora" in name and p.grad is not None and p.grad.any() for name, p in trained.items())
    after = adapted(input_ids=x).logits
    assert not torch.isclose(after, before).any()
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(input_ids=x).logits, before)
    adapted.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(make("two", mlp=mlp), tmp_path)
    torch.testing.assert_close(again(input_ids=x).logits, after)
    assert again.generate(input_ids=x, max_new_tokens=2).shape == (2, 11)
    torch.testing.assert_close(again.merge_and_unload()(x).logits, after, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_the_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    model, out = of_bytes(tmp_path / "hope"), tmp_path / "out"
    given = {"model": "hf", "model_args": f"pretrained={tmp_path / 'hope'}", "tasks": "recall,recall_generate"}
    given |= {"include_path": EXAMPLES / "harness", "device": "cpu", "batch_size": 3, "output_path": out, "limit": 7}
    words = [str(word) for name, value in given.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["harness.py", *words, "--log_samples"])
    runpy.run_path(str(EXAMPLES / "harness.py"), run_name="__main__")
    (results,) = out.rglob("results_*.json")
    found = json.loads(results.read_text())["results"]
    (samples,) = out.rglob("samples_recall_2*.jsonl")
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    right = 0
    for row in rows:
        scores = [float(score) for ((score, _),) in row["resps"]]
        choices = ["red", "green", "blue", "grey"]
        wanted = [_score(model, row["doc"]["question"], f" {one}") for one in choices]
        assert scores == pytest.approx(wanted, rel=1e-4)
        right += row["doc"]["answer"] == choices[scores.index(max(scores))]
    assert len(rows) == 7
    assert found["recall"]["acc,none"] == pytest.approx(right / 7)
    assert 0 <= found["recall_generate"]["exact_match,none"] <= 1


@torch.no_grad()
def _score(model: HopeForCausalLM, text: str, answer: str) -> float:
    tokens = torch.tensor([list((text + answer).encode())])
    likely = model(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])
    return float(likely[0, -len(answer.encode()) :].sum())
