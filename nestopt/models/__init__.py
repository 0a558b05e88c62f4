"""Whole models."""

from typing import Any

from nestopt.models.build import build_model
from nestopt.models.hope import HopeLM
from nestopt.models.stacking import Stacked, stack

__all__ = ["HopeLM", "Stacked", "build_model", "stack"]

_HUGGING_FACE = ("HopeConfig", "HopeForCausalLM", "HopeModel", "byte_tokenizer")
"""Those that need the extra `hf`, and so are imported when they are asked for (`nestopt.models.hf`)."""


def __getattr__(name: str) -> Any:
    if name not in _HUGGING_FACE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from nestopt.models import hf
    except ModuleNotFoundError as error:
        if error.name != "transformers":
            raise
        raise ImportError(f"nestopt.models.{name} needs transformers; pip install 'nestopt[hf]'") from None
    return getattr(hf, name)
