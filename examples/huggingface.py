"""nestopt in a Hugging Face `Trainer`: three ways, and which to take. Needs transformers and accelerate."""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import nestopt


def language_model() -> LlamaForCausalLM:
    """A tiny Llama over bytes, whose output layer is its embedding."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        )
    )


def text(length: int = 64) -> list[dict[str, torch.Tensor]]:
    """A file that is on every machine, in pieces."""
    tokens = torch.tensor(list(Path(argparse.__file__).read_bytes()))
    return [{"input_ids": piece, "labels": piece} for piece in tokens.unfold(0, length, length)]


def trainer(model: LlamaForCausalLM, folder: str, steps: int = 60, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=8,
        lr_scheduler_type="linear",
        weight_decay=0.1,  # for the Trainer's own groups; all other ways are told theirs
        save_steps=steps // 2,
        eval_strategy="steps",
        eval_steps=steps // 2,
        logging_steps=steps // 4,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    *train, _, _, _, _ = pieces = text()
    return Trainer(model, arguments, train_dataset=train, eval_dataset=pieces[-4:], **options)


def by_factory(model: LlamaForCausalLM, folder: str, **options: Any) -> Trainer:
    """Routed: hidden matrices to the stack, the rest to AdamW. The Trainer builds it, after placing the model."""
    rest = {"stack": "adamw", "lr": 3e-3}
    settings = {"spec": "muon", "lr": 0.02, "weight_decay": 0.1, "rest": rest}
    return trainer(model, folder, optimizer_cls_and_kwargs=(lambda: nestopt.optimizer, settings), **options)


def by_hand(model: LlamaForCausalLM, folder: str, **options: Any) -> Trainer:
    """The same, where transformers is too old for factories: put the model on its device before."""
    rest = {"stack": "adamw", "lr": 3e-3}
    optimizer = nestopt.optimizer(model, "muon", lr=0.02, weight_decay=0.1, rest=rest)
    return trainer(model, folder, optimizers=(optimizer, None), **options)


def by_class(model: LlamaForCausalLM, folder: str, **options: Any) -> Trainer:
    """The Trainer's own parameter groups (weight decay or none): right for stacks that take any parameter."""
    settings = {"stack": ["momentum", "adam"], "lr": 3e-3}
    return trainer(model, folder, optimizer_cls_and_kwargs=(nestopt.optim.Nested, settings), **options)


def main() -> None:
    for way in (by_factory, by_hand, by_class):
        with tempfile.TemporaryDirectory() as folder:
            made = way(language_model(), folder)
            made.train()
            losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
            held_out = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
        print(f"{way.__name__}: loss {losses[0]:.3f}, then {losses[-1]:.3f}; held out {held_out[-1]:.3f}")


if __name__ == "__main__":
    main()
