"""What all sections of a configuration share: their keys are checked, and what is refused is refused in words."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from typing_extensions import Self

from nestopt.config.errors import ConfigError, translate
from nestopt.config.spec import to_spec
from nestopt.core import Part


class Section(BaseModel):
    """A part of a configuration. Unknown keys are refused, and what is assigned is checked. Raises ConfigError."""

    model_config = ConfigDict(
        extra="forbid", validate_assignment=True, validate_default=True, arbitrary_types_allowed=True
    )

    rivals: ClassVar[Mapping[str, tuple[str, Any]]] = {}
    """By key: another one that stands in its place, unless that is this value, which it is if only the key is given."""

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise self._translate(error, data) from None

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.copy()
        for key, (other, nothing) in self.rivals.items():  # the one that is assigned counts
            if name == key:
                self.__dict__[other] = copy.copy(nothing)
            elif name == other and value != nothing:
                self.__dict__[key] = getattr(type(self)(), key)
        try:
            super().__setattr__(name, value)
        except ValidationError as error:
            # pydantic has assigned it already where it is a check of several fields that fails
            object.__setattr__(self, "__dict__", before)
            raise self._translate(error, {name: value}) from None

    @model_validator(mode="after")
    def _given_keys_act(self) -> Self:
        for key, (other, nothing) in self.rivals.items():
            if key not in self.model_fields_set:
                continue
            if other not in self.model_fields_set:
                self.__dict__[other] = copy.copy(nothing)
            value = getattr(self, key)
            if getattr(self, other) != nothing and value != getattr(type(self)(), key):
                shown = to_spec(value) if isinstance(value, Part) else value
                raise ConfigError.refuse(key, shown, f"it does nothing beside {other}; give one of them")
        return self

    @classmethod
    def _translate(cls, error: ValidationError, data: dict[str, Any]) -> ConfigError:
        found: list[ConfigError] = []
        by_key: dict[str, list[Any]] = {}
        for item in error.errors(include_url=False):
            by_key.setdefault(str(item["loc"][0]) if item["loc"] else "", []).append(item)
        for key, items in by_key.items():
            if items[0]["type"] in ("extra_forbidden", "no_such_attribute"):
                owner = cls.__name__.removesuffix("Config").lower() or "a configuration"
                found.append(ConfigError.unknown_key("", key, items[0]["input"], owner, cls.model_fields))
            elif items[0]["type"] == "missing":
                found.append(ConfigError(f"missing; give {cls.model_fields[key].description}", key))
            else:
                found += translate([{**item, "loc": item["loc"][1:]} for item in items], key, data.get(key)).errors
        return ConfigError.of(found)
