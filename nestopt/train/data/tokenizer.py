"""Text as tokens, by a `tokenizer.json`."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestopt.core.part import nearest
from nestopt.train.errors import CorpusError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

EXTRA = "documents need the packages datasets and tokenizers: pip install 'nestopt[data]'"


def on_disk(tokenizer: str) -> str | None:
    """Return the path of a tokenizer's file: its own, or that which the hub's cache has of it. None: there is none."""
    path = Path(os.path.expanduser(tokenizer))
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.exists():
        return str(file)
    try:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(tokenizer, "tokenizer.json")
    except (ImportError, ValueError):  # a path is no name on the hub
        return None
    return found if isinstance(found, str) else None


class Vocabulary:
    """Documents as tokens, with a token before and one behind each.

    Args:
        tokenizer: the path of a `tokenizer.json`, or of a folder with one; or a name on the Hugging Face hub.
        begin, end: the tokens before and behind a document, as the vocabulary has them; None for none.

    Raises:
        CorpusError: there is no such tokenizer, or it has not these tokens; says what it has.
    """

    def __init__(self, tokenizer: str, begin: str | None, end: str | None) -> None:
        self.tokenizer = tokenizer
        self._loaded  # noqa: B018  # found now, or never
        self.vocab = max(self._loaded.get_vocab(with_added_tokens=True).values()) + 1
        self.before = [] if begin is None else [self._number("begin", begin)]
        self.behind = [] if end is None else [self._number("end", end)]

    def encode(self, text: str) -> Sequence[int]:
        """Return a whole document."""
        return [*self.before, *self._loaded.encode(text, add_special_tokens=False).ids, *self.behind]

    def encode_prompt(self, text: str) -> Sequence[int]:
        """Return a document of which only the begin is there."""
        return [*self.before, *self._loaded.encode(text, add_special_tokens=False).ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return text, without the tokens that are marks."""
        return self._loaded.decode(list(tokens), skip_special_tokens=True)

    @functools.cached_property
    def _loaded(self) -> Tokenizer:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise CorpusError(EXTRA) from None
        file = on_disk(self.tokenizer)
        try:
            return Tokenizer.from_pretrained(self.tokenizer) if file is None else Tokenizer.from_file(file)
        except Exception as error:  # tokenizers raises Exception itself
            raise CorpusError(
                f"tokenizer={self.tokenizer!r} is neither a tokenizer.json, a folder with one, nor the name of one on "
                f"the Hugging Face hub: {error}"
            ) from None

    def _number(self, key: str, token: str) -> int:
        number = self._loaded.token_to_id(token)
        if number is None:
            marks = [added.content for added in self._loaded.get_added_tokens_decoder().values() if added.special]
            raise CorpusError(
                f"{key}={token!r} is no token of {self.tokenizer}.{nearest(token, marks)} Give null, or one of its "
                f"tokens; those that are marks: {', '.join(marks) or 'none'}"
            )
        return int(number)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_loaded"}
