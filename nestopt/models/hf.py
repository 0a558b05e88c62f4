"""`HopeLM` as a Hugging Face model. Importing this registers it with `AutoConfig` and `AutoModelForCausalLM`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils.deprecation import deprecate_kwarg

from nestopt.config import ModelConfig, as_saved
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
        ConfigError: for a section that is not valid.
    """

    model_type = "nestopt_hope"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["cache"]

    def __init__(self, model: Mapping[str, Any] | None = None, **options: Any) -> None:
        section = ModelConfig(**(model or {}))
        own = {"vocab_size", "tie_word_embeddings", "hidden_size", "num_hidden_layers", "num_attention_heads"}
        super().__init__(**{key: value for key, value in options.items() if key not in own})
        with as_saved():
            self.model = section.model_dump()
        self.vocab_size, self.tie_word_embeddings = section.vocab, section.tie
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = section.dim, section.blocks, section.heads

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


class HopeForCausalLM(PreTrainedModel, GenerationMixin):
    """A `HopeLM` with the methods of a Hugging Face model.

    Args:
        config: what it is made of.

    Attributes:
        model: the `HopeLM`.
    """

    config_class = HopeConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _no_split_modules = ("HopeBlock",)
    _tied_weights_keys = {"model.head.weight": "model.embedding.weight"}  # noqa: RUF012  # as transformers wants it
    _is_stateful = True

    def __init__(self, config: HopeConfig) -> None:
        super().__init__(config)
        self.model: HopeLM = build_model(config.section())
        for parameter in self.parameters():
            # a HopeLM has initialised itself, unless there is no data yet
            parameter._is_hf_initialized = not parameter.is_meta
        self.post_init()

    @classmethod
    def from_hope(cls, model: HopeLM, section: ModelConfig) -> HopeForCausalLM:
        """Return a copy of `model`, which the section `model` of a configuration describes, such as one that was
        trained.

        With a run: `HopeForCausalLM.from_hope(run.load_model(), run.config().model)`.
        """
        found = cls(HopeConfig(section.model_dump()))
        found.model.load_state_dict(model.state_dict())
        return found.to(next(model.parameters()).dtype).eval()

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
                if not getattr(parameter, "_is_hf_initialized", False)
            ]
            if missing:
                raise ValueError(
                    f"HopeForCausalLM: the checkpoint has no {', '.join(missing)} of a {type(module).__name__}, which "
                    "are not made up; is it one of this model?"
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

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As of any model; but for the tokens that it made itself, one by one, there is no mask: none is padding."""
        # transformers looks for `kwargs` by that name
        found = super().prepare_inputs_for_generation(*args, **kwargs)
        went_on = found.get("cache", found.get("past_key_values")) is not None
        if went_on and not kwargs.get("is_first_iteration") and found["input_ids"].shape[1] == 1:
            found["attention_mask"] = None
        return found

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: HopeCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int = 0,
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
            use_cache: whether to give a `HopeCache`. Default: unless training.
            return_dict: False gives a tuple.
            logits_to_keep: logits of so many last places only; 0 is all.
            learn: what writes its memories (`HopeLM.forward`).
            options: of the loss, such as `num_items_in_batch`.
        """
        length = input_ids.shape[1]
        before = 0 if cache is None else cache.length
        mask = None
        if attention_mask is not None:
            mask = attention_mask[:, -length:].bool()
            # on an accelerator nobody waits to see whether there is padding
            mask = None if mask.device.type == "cpu" and mask.all() else mask
        hidden, state = self.model.hidden(input_ids, None if cache is None else cache.state, mask=mask, learn=learn)
        kept = hidden[:, -logits_to_keep:] if logits_to_keep else hidden
        logits = self.model.head(self.model.norm(kept))
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **options)
        if use_cache is False or (use_cache is None and self.training):
            cache = None
        elif cache is None:
            cache = HopeCache(state, length)
        else:  # the caller's own goes on, as caches do
            cache.state, cache.length = state, before + length
        found = CausalLMOutputWithPast(loss=loss, logits=logits, cache=cache)
        return found.to_tuple() if return_dict is False else found


AutoConfig.register(HopeConfig.model_type, HopeConfig, exist_ok=True)
AutoModelForCausalLM.register(HopeConfig, HopeForCausalLM, exist_ok=True)
