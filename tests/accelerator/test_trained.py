"""Stacked models and the Hugging Face class, by the rules of an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

import nestopt  # noqa: E402  # not before it is known that transformers is there
from nestopt.models.hf import HopeConfig, HopeForCausalLM  # noqa: E402
from tests.accelerator.held import held  # noqa: E402
from tests.accelerator.test_models import IN_CONTEXT, tokens  # noqa: E402


@pytest.mark.parametrize("mlp", ["static", "context"])
def test_the_hugging_face_class(mlp: str) -> None:
    cms = {"level": "cms", "periods": [1]} if mlp == "static" else {"level": "cms", **IN_CONTEXT, "periods": [2, 4]}
    config = HopeConfig({"vocab": 32, "dim": 8, "heads": 2, "blocks": 1, "mixers": ["deltanet"], "mlp": cms})
    with torch.device("meta"):
        model = HopeForCausalLM(config)
    mask = torch.empty(2, 9, dtype=torch.int64, device="meta")

    def trained() -> None:
        found = model(tokens(), attention_mask=mask, labels=tokens())
        found.loss.backward()

    held(trained)
    model.activation_checkpointing_enable({"segment": 4})
    held(trained)
    if mlp == "static":  # one that learns looks up whose embeddings they are
        held(lambda: model(inputs_embeds=torch.empty(2, 9, 8, device="meta"), attention_mask=mask, labels=tokens()))

    def decoded() -> None:
        with torch.no_grad():
            found = model(tokens(3), use_cache=True)
            for _ in range(3):
                found = model(tokens(1), cache=found.cache, use_cache=True)

    held(decoded)


@pytest.mark.parametrize(
    ("kind", "teach"),
    [("gpt2", "loss"), ("gpt2", "local"), ("llama", "loss"), ("llama", "local"), ("bert", "local")],
)
def test_a_stacked_model(kind: str, teach: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "vocab_size": 32}
    sizes["num_attention_heads"] = 2
    makes: dict[str, Callable[[], Any]] = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=32, n_embd=8, n_layer=2, n_head=2, n_positions=64)
        ),
        "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        "bert": lambda: transformers.BertModel(transformers.BertConfig(**sizes)),
    }
    with torch.device("meta"):
        model = nestopt.models.stack(makes[kind]().eval(), levels={-1: 4}, teach=teach)

    def read() -> None:
        with torch.no_grad():
            _, state = model(tokens(11))
            model(tokens(5), state)

    held(read)  # without a mask, at which transformers looks
    if kind != "bert":
        held(lambda: model.generate(tokens(3), 2))
