"""`HopeLM` as a Hugging Face model. Importing this registers it with the `Auto` classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from nestopt.config import ConfigError, ModelConfig, as_saved
from nestopt.core.token_state import index
from nestopt.core.tree import State
from nestopt.models.build import build_model
from nestopt.models.hope import HopeLM
from nestopt.nn.hope import Learn


class HopeConfig(PretrainedConfig):
    """What a `HopeForCausalLM` is made of.

    Args:
        model: the keys of the section `model` of a configuration, as plain data (`nestopt.config.ModelConfig`); what is
            not given has its default. `vocab_size` and `tie_word_embeddings` are taken from it.
        options: of any configuration, such as `bos_token_id`.

    Raises:
        ConfigError: for a section that is not valid, one of its keys among the options, or an option that says other
            than it, such as another `vocab_size`.
    """

    model_type = "nestopt_hope"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    def __init__(self, model: Mapping[str, Any] | None = None, **options: Any) -> None:
        section = ModelConfig(**(model or {}))
        own: dict[str, Any] = {"vocab_size": section.vocab, "tie_word_embeddings": section.tie}
        own |= {"hidden_size": section.dim, "num_hidden_layers": section.blocks, "num_attention_heads": section.heads}
        for key, value in options.items():
            if key in ModelConfig.model_fields or value != own.get(key, value):
                raise ConfigError.refuse(key, value, f"give it in model, such as {{'vocab': {section.vocab}}}")
        super().__init__(**{key: value for key, value in options.items() if key not in own})
        with as_saved():
            self.model = section.model_dump()
        for key, value in own.items():
            setattr(self, key, value)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        with as_saved():
            return super().from_dict(config_dict, **kwargs)

    def section(self) -> ModelConfig:
        """Return the section `model` of a configuration."""
        return ModelConfig(**self.model)


class HopeCache:
    """What a batch of sequences has taught the model: `generate`'s cache.

    Attributes:
        state: of the `HopeLM`.
        length: places of the sequences so far, with padding.
    """

    is_compileable = False

    def __init__(self, state: State, length: int) -> None:
        self.state, self.length = state, length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Places so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with these rows, some perhaps twice."""
        self.state = index(self.state, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Go on with each row so many times."""
        rows = next(iter(_tensors(self.state))).shape[0]
        self.reorder_cache(torch.arange(rows).repeat_interleave(repeats))

    def crop(self, max_length: int) -> None:
        """What was learned can't be taken back: raises NotImplementedError."""
        raise NotImplementedError("HopeCache: a memory can't be cropped to fewer tokens; keep a cache from before them")


def _tensors(tree: Mapping[str, Any]) -> list[Tensor]:
    return [leaf for x in tree.values() for leaf in (_tensors(x) if isinstance(x, Mapping) else [x])]


SEGMENT = 64
"""Tokens that are recomputed at once in the backward pass, if nothing else is said."""

_OF_THE_LOSS = {"num_items_in_batch", "ignore_index", "shift_labels"}
_NOT_KEPT = ("output_hidden_states", "output_attentions")


class HopePreTrainedModel(PreTrainedModel):
    """What the Hugging Face models of a `HopeLM` share.

    Args:
        config: what it is made of.

    Attributes:
        model: the `HopeLM`.
    """

    config_class = HopeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ("HopeLM",)  # memories are read outside the blocks' own forward
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012  # as transformers wants it
    _is_stateful = True

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.model: HopeLM = build_model(config.section())
        self.gradient_checkpointing = False
        for parameter in self.parameters():
            # a HopeLM has initialised itself, unless there is no data yet
            parameter._is_hf_initialized = not parameter.is_meta
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Of weights that a checkpoint does not have, or of a larger vocabulary."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()
        else:
            missing = [
                name
                for name, parameter in module.named_parameters(recurse=False)
                if not (getattr(parameter, "_is_hf_initialized", False) or parameter.is_meta)  # those lie on a disk
            ]
            if missing:
                raise ValueError(
                    f"{type(self).__name__}: the checkpoint has no {', '.join(missing)} of a {type(module).__name__}, "
                    "which are not made up; is it one of this model?"
                )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first pass makes a HopeCache

    def get_input_embeddings(self) -> nn.Module:
        """Return the embedding."""
        return self.model.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Put another embedding in its place."""
        assert isinstance(value, nn.Embedding)
        self.model.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.model.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Put another head in its place."""
        assert isinstance(new_embeddings, nn.Linear)
        self.model.head = new_embeddings

    def resize_token_embeddings(self, *args: Any, **options: Any) -> nn.Embedding:
        """As of any model; the configuration follows."""
        found = super().resize_token_embeddings(*args, **options)
        self.model.vocab = self.config.model["vocab"] = self.config.vocab_size = found.num_embeddings
        return found

    def activation_checkpointing_enable(
        self,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Recompute tokens in the backward pass, segment by segment (`HopeLM.segment`), not layer by layer.

        Args:
            activation_checkpointing_kwargs: `{"segment": n}` for segments of n tokens. Default: the configuration's, or
                64 if it has none. `use_reentrant=False` is allowed, as it is so.
            every_n_layers, offload: their defaults only.

        Raises:
            ValueError: for anything else.
        """
        given = {"segment": self.model.segment or SEGMENT, **(activation_checkpointing_kwargs or {})}
        allowed = {"segment": given["segment"], "use_reentrant": False, "every_n_layers": 1, "offload": False}
        for name, value in {**given, "every_n_layers": every_n_layers, "offload": offload}.items():
            if name not in allowed or value != allowed[name]:
                raise ValueError(
                    f"{type(self).__name__}: {name}={value!r} is not allowed; all layers are recomputed together, some "
                    'tokens at a time: give {"segment": 64}, or nothing'
                )
        if type(given["segment"]) is not int or given["segment"] < 1:
            raise ValueError(
                f"{type(self).__name__}: segment={given['segment']!r} is not allowed; give a whole number of tokens, 1 "
                "or more"
            )
        self.model.segment, self.gradient_checkpointing = given["segment"], True

    def activation_checkpointing_disable(self) -> None:
        """Keep activations again as the configuration says."""
        self.model.segment, self.gradient_checkpointing = self.config.section().segment, False

    def _read(
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        attention_mask: Tensor | None,
        cache: HopeCache | None,
        use_cache: bool | None,
        learn: Learn,
        options: Mapping[str, Any],
    ) -> tuple[Tensor, HopeCache | None]:
        """Return the stream after the last block, and the cache that goes with it."""
        owner = type(self).__name__
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"{owner}: give either input_ids or inputs_embeds")
        tokens = input_ids if inputs_embeds is None else inputs_embeds
        assert tokens is not None
        for name, value in options.items():
            if value is not None and name not in ("position_ids", *_NOT_KEPT):
                raise TypeError(f"{owner}: {name}={value!r} is not an argument that it takes")
        for name in _NOT_KEPT:
            asked = options.get(name)
            if getattr(self.config, name) if asked is None else asked:
                raise ValueError(
                    f"{owner}: {name}=True is not allowed; what blocks give is not kept. HopeModel gives the last "
                    "hidden state"
                )
        devices = set(getattr(self, "hf_device_map", {}).values())  # as accelerate notes them
        if (self.model.embedding.weight.is_meta and not tokens.is_meta) or len(devices) > 1:
            raise ValueError(
                f"{owner}: its weights are offloaded, or on several devices; memories are read across blocks, so give "
                'a device_map of one device, such as "cpu" or "cuda:0"'
            )
        batch, length = tokens.shape[:2]
        starts, mask = options.get("position_ids"), None
        if starts is not None:
            starts = (starts == 0).expand(batch, length)
        if attention_mask is not None:
            mask = attention_mask[:, -length:].bool()
            # on an accelerator nobody waits to see whether there is padding
            mask = None if mask.device.type == "cpu" and mask.all() else mask
        state = None if cache is None else cache.state
        hidden, state = self.model.hidden(tokens, state, mask=mask, starts=starts, learn=learn)
        if use_cache is False or (use_cache is None and self.training):
            return hidden, None
        if cache is None:
            return hidden, HopeCache(state, length)
        cache.state, cache.length = state, cache.length + length  # the caller's own goes on, as caches do
        return hidden, cache


class HopeModel(HopePreTrainedModel):
    """A `HopeLM` without its head's logits, as `AutoModel` gives it; its weights are a `HopeForCausalLM`'s."""

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HopeCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        learn: Learn = True,
        **options: Any,
    ) -> BaseModelOutputWithPast | tuple[Tensor, ...]:
        """The last hidden state `[B, T, dim]`, after the norm; arguments are `HopeForCausalLM.forward`'s."""
        hidden, cache = self._read(input_ids, inputs_embeds, attention_mask, cache, use_cache, learn, options)
        found = BaseModelOutputWithPast(last_hidden_state=self.model.norm(hidden), cache=cache)
        return found.to_tuple() if return_dict is False else found


class HopeForCausalLM(HopePreTrainedModel, GenerationMixin):
    """A `HopeLM` with the methods of a Hugging Face model."""

    @classmethod
    def from_hope(cls, model: HopeLM, section: ModelConfig) -> HopeForCausalLM:
        """Return a copy of `model`, which the section `model` of a configuration describes, such as one that was
        trained.

        With a run: `HopeForCausalLM.from_hope(run.load_model(), run.config().model)`.
        """
        found = cls(HopeConfig(section.model_dump()))
        found.model.load_state_dict(model.state_dict())
        return found.to(next(model.parameters()).dtype).eval()

    def prepare_inputs_for_generation(
        self, *args: Any, inputs_embeds: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As of any model; but for the tokens that it made itself, one by one, there is no mask: none is padding."""
        # transformers looks for `inputs_embeds` and `kwargs` by their names
        found = super().prepare_inputs_for_generation(*args, inputs_embeds=inputs_embeds, **kwargs)
        went_on = found.get("cache", found.get("past_key_values")) is not None
        if went_on and not kwargs.get("is_first_iteration") and found["input_ids"].shape[1] == 1:
            found["attention_mask"] = None
        return found

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cache: HopeCache | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        learn: Learn = True,
        **options: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Logits of the tokens after each of `input_ids` `[B, T]`, as those of any causal model.

        Args:
            input_ids: token numbers.
            attention_mask: `[B, T]`, or with what came before `[B, n + T]`: 0 for padding, on either side, which is
                neither read nor learned from.
            cache: of a former call, to go on. Its name before transformers 5.24, `past_key_values`, still works.
            labels: `[B, T]` token numbers, -100 where nothing is counted; shifted here.
            inputs_embeds: `[B, T, dim]` in place of `input_ids`; of tokens, where a continuum learns from next ones.
            use_cache: whether to give a `HopeCache`. Default: unless training.
            return_dict: False gives a tuple.
            logits_to_keep: logits of so many last places only, or of the places in a tensor; 0 is all.
            learn: what writes its memories (`HopeLM.forward`).
            options: `position_ids` `[B, T]`, 0 where a document begins: documents packed into a row, each of which is
                what it is alone; and those of the loss, `num_items_in_batch`, `ignore_index` and `shift_labels`.

        Raises:
            TypeError: for another option.
            ValueError: for `output_hidden_states` or `output_attentions`, weights that are not all on one device, or
                what `HopeLM.forward` does not take.
        """
        of_loss = {name: options.pop(name) for name in _OF_THE_LOSS & options.keys()}
        hidden, cache = self._read(input_ids, inputs_embeds, attention_mask, cache, use_cache, learn, options)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.model.head(self.model.norm(hidden[:, kept]))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **of_loss)
        found = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return found.to_tuple() if return_dict is False else found


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return the tokenizer of a model of bytes: a token is a byte of UTF-8. Byte 0 is padding and the end of a text."""
    # ByteLevel shows a byte as the letter of that number, if it has a shape, and else as one from 256 on
    shaped = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    names = {chr(byte if byte in shaped else next(others)): byte for byte in range(256)}
    del names["\u0100"]
    found = Tokenizer(BPE({"\0": 0, **names}, []))
    found.pre_tokenizer, found.decoder = ByteLevel(add_prefix_space=False, use_regex=False), ByteLevelDecoder()
    return PreTrainedTokenizerFast(
        tokenizer_object=found,
        pad_token="\0",
        eos_token="\0",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
AutoModel.register(HopeConfig, HopeModel, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
