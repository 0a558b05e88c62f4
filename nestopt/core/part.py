"""What everything configurable in nestopt is made of: a dataclass whose fields are its config keys."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import numbers
import re
from abc import ABCMeta
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeGuard, TypeVar, get_args, get_origin, get_type_hints

from torch import Tensor
from typing_extensions import dataclass_transform

from nestopt.core.schedule import is_scheduled, resolved

_T = TypeVar("_T")

FINITE, PARAM = "finite", "param"
"""Needs of a part (see `Part.requires`)."""


class Gate:
    """A number that the data choose: a learned function of the token, `low + (high - low) · sigmoid(w·x + b)`.

    Give one wherever a level takes a number (`momentum(beta=Gate(0.9))`). A layer learns `w` (from 0) and `b` (so that
    the gate starts at `init`), one per head, and the level sees a number per token. Gradients carry no such data:
    there the constant `init` is used.

    Args:
        init: the value at the start of training, strictly between `low` and `high`.
        low, high: the open range of values.

    Raises:
        ValueError: unless `low < init < high`.
    """

    def __init__(self, init: float, low: float = 0.0, high: float = 1.0) -> None:
        if not low < init < high:
            raise ValueError(f"gate: init={init!r} is not allowed; give a number strictly between {low} and {high}")
        self.init, self.low, self.high = float(init), float(low), float(high)

    @property
    def bias(self) -> float:
        """The logit at which the gate equals `init`."""
        share = (self.init - self.low) / (self.high - self.low)
        return math.log(share / (1 - share))

    def width(self, dim_k: int) -> int | None:
        """Return how many numbers it has for a token and head with a key of `dim_k`; None is one, without dimension."""
        return None

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash((type(self), *vars(self).values()))

    def __repr__(self) -> str:
        span = "" if (self.low, self.high) == (0.0, 1.0) else f", low={self.low}, high={self.high}"
        return f"{'Channels' if isinstance(self, Channels) else 'Gate'}({self.init}{span})"


class Heads(Gate):
    """A constant for each head, nothing learned: 1 - (1 - init) · ratio^h for head h = 0, 1, …

    RetNet's decays are `Heads(1 - 2**-5)`: what a head forgets is half of what the one before it does. Where there are
    no heads (on gradients), it is `init`.

    Args:
        init: of the first head, strictly between 0 and 1.
        ratio: of what 1 lacks from head to head, above 0 and at most 1.

    Raises:
        ValueError: for a number out of range.
    """

    def __init__(self, init: float, ratio: float = 0.5) -> None:
        super().__init__(init)
        if not 0 < ratio <= 1:
            raise ValueError(f"heads: ratio={ratio!r} is not allowed; give a number above 0 and at most 1")
        self.ratio = float(ratio)

    def values(self, heads: int) -> list[float]:
        """Return the constants of so many heads."""
        return [1 - (1 - self.init) * self.ratio**h for h in range(heads)]

    def __repr__(self) -> str:
        return f"Heads({self.init}{'' if self.ratio == 0.5 else f', ratio={self.ratio}'})"


class Channels(Gate):
    """A gate with a number for each channel of the keys: the decay of GLA and of Kimi's delta attention.

    A layer learns D_k of them per head. It can be the `keep` of a matrix memory's `decay`. Arguments: `Gate`.
    """

    def width(self, dim_k: int) -> int:
        return dim_k


class Several(Gate):
    """A gate with `count` numbers for each token and head, which a level makes of the `Gate` that it was given."""

    def __init__(self, gate: Gate, count: int) -> None:
        super().__init__(gate.init, gate.low, gate.high)
        self.count = count

    def width(self, dim_k: int) -> int:
        return self.count


class FieldError(ValueError):
    """A field of a part holds what it may not.

    Attributes:
        label: the part, as in configs.
        key: its field.
        value: what that holds.
        problem: what is wrong with it and what is allowed, to be read after the value.
    """

    def __init__(self, label: str, key: str, value: object, problem: str) -> None:
        super().__init__(label, key, value, problem)
        self.label, self.key, self.value, self.problem = label, key, value, problem

    def __str__(self) -> str:
        return f"{self.label}: {self.key}={self.value!r} {self.problem}"


class FieldTypeError(FieldError, TypeError):
    """A field of a part holds something of the wrong type."""


Number = float | Tensor | Gate
"""A constant, a tensor (a learned or per-token value), or a `Gate` that a layer turns into one."""


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return ` Did you mean 'x'?` for the allowed name closest to `name`, in whatever case, or nothing."""
    by_case = {other.lower(): other for other in sorted(allowed)}
    given = name.lower()
    close = [given] if given in by_case else difflib.get_close_matches(given, by_case, n=1, cutoff=0.65)
    close = close or [other for other in by_case if len(given) > 2 and other.startswith(given)][:1]
    return f" Did you mean {by_case[close[0]]!r}?" if close else ""


def plain(value: Any) -> Any:
    """Return numbers, text and sequences of other libraries' types (NumPy's, a config's list) as Python's own.

    Anything else is returned as it is, so that what is saved loads under `weights_only=True`.
    """
    if value is None or type(value) in (bool, int, float, str) or isinstance(value, Tensor | Part | Gate):
        return value
    if hasattr(value, "tolist"):  # NumPy's scalars and arrays
        value = value.tolist()
    if isinstance(value, str):
        return str.__str__(value)
    if type(value) is not bool and isinstance(value, numbers.Number) and hasattr(value, "__float__"):  # no complex one
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return (tuple if isinstance(value, tuple) else list)(plain(item) for item in value)
    return value


def snake_case(name: str) -> str:
    """Return `DeltaMomentum` as `delta_momentum`; a capital that begins no word (`AdamW`) begins none."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z][a-z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def is_subclass(value: object, base: type[_T]) -> TypeGuard[type[_T]]:
    """Return whether `value` is a class, and is `base` or derived from it."""
    # in Python 3.10 `tuple[float, float]` says that it is a type, and `issubclass` refuses it
    return get_origin(value) is None and isinstance(value, type) and issubclass(value, base)


class _PartType(ABCMeta):
    """Notes in a part, once it is made, the names of its attributes: torch 2.11's compiler can't list them."""

    def __call__(cls: type[_T], *args: Any, **kwargs: Any) -> _T:
        if any(map(is_scheduled, (*args, *kwargs.values()))):
            given = inspect.signature(vars(cls)["__init__"]).bind(None, *args, **kwargs).arguments
            part = cls._with_schedules(given)  # type: ignore[attr-defined]  # cls is a _PartType, too
        else:
            part = super().__call__(*args, **kwargs)  # type: ignore[misc]
        if any(inner.is_scheduled for _, inner in part.parts()):
            part.is_scheduled = True
        part._attributes = (*vars(part), "_attributes")
        return part

    def _with_schedules(cls, given: Mapping[str, Any]) -> Any:
        """Make a part whose numbers are allowed at both ends of their schedules, and so between."""
        fields = {key: value for key, value in given.items() if key != "self"}
        scheduled = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
        scheduled = {key: value for key, value in scheduled.items() if is_scheduled(value)}
        ends = [
            {key: resolved(value, lambda own, end=end: own.ends[end]) for key, value in scheduled.items()}  # type: ignore[misc]
            for end in (0, 1)
        ]
        part, _ = (super(_PartType, cls).__call__(**{**fields, **end}) for end in ends)
        hints = get_type_hints(cls)
        for key, value in scheduled.items():
            if float not in _flat(hints[key]):
                problem = "is not allowed; a schedule can stand for any number but a whole one"
                raise FieldTypeError(part.label, key, value, problem)
            if not part.takes_schedules:
                problem = "is not allowed here; write out the chain that it stands for, with the schedule in it"
                raise FieldError(part.label, key, value, problem)
            setattr(part, key, value)
        part.is_scheduled = True
        return part


def _flat(hint: Any) -> set[Any]:
    """Return a type hint and all within it."""
    return {hint}.union(*map(_flat, get_args(hint)))


@dataclass_transform(field_specifiers=(dataclasses.field,))
class Part(metaclass=_PartType):
    """A piece of a level. Every subclass becomes a dataclass by itself; its fields are its config keys, in Python, in
    YAML and in `describe`. Two parts with equal fields are equal.
    """

    kind: ClassVar[str] = "part"
    field_names: ClassVar[tuple[str, ...]] = ()
    """The names of this part's fields."""
    former_defaults: ClassVar[Mapping[str, Any]] = {}
    """What fields were by default, as a spec has them, when saved runs did not name the first of these, which they now
    always do (`nestopt.config.as_saved`)."""
    _attributes: ClassVar[tuple[str, ...]]
    is_scheduled: ClassVar[bool] = False
    """Whether a number of it, or of a part within it, is a `Schedule`: set where one is made."""

    takes_schedules: ClassVar[bool] = True
    """Whether its numbers may be; not where other parts are made of them."""
    by_channel: ClassVar[tuple[str, ...]] = ()
    """Its numbers that may be `Channels`."""
    requires: ClassVar[frozenset[str]] = frozenset()
    """What this part must be shown to be itself: `"shape"` (whole tensors in their true shape, never a flat slice of
    several), `"matrix"` (as `"shape"`, and only matrices), `"param"` (a parameter beside the gradient, so that it is no
    memory of its own, and no layer), `"finite"` (an infinity or a NaN breaks it: an optimizer on
    the CPU raises before anything has changed)."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(cls)
        cls.field_names = tuple(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        known = cls.__dataclass_fields__  # type: ignore[attr-defined]
        for name in known.keys() - set(cls.field_names):  # a class variable would give its place to a field of its name
            del known[name]

    def __post_init__(self) -> None:
        for key in self.field_names:
            setattr(self, key, plain(getattr(self, key)))
        for key, field in _fields(type(self)).items():
            if not field.holds(value := getattr(self, key)):
                setattr(self, key, _read(field.hint, value, key))

    @property
    def label(self) -> str:
        """The name that this part's class is registered under; of one that is not, the class's own, in snake case."""
        return _registered(type(self)) or snake_case(type(self).__name__)

    @property
    def needs(self) -> frozenset[str]:
        """What this part and all parts within it require (see `requires`)."""
        return self.requires.union(*(part.needs for _, part in self.parts()))

    def parts(self) -> Iterator[tuple[str, Part]]:
        """Yield the parts directly within this one, as (dotted name, part)."""
        for key in self.field_names:
            value = getattr(self, key)
            if isinstance(value, Part):
                yield key, value
            elif isinstance(value, Mapping):
                yield from ((f"{key}.{name}", item) for name, item in value.items() if isinstance(item, Part))

    def check(self, key: str, low: float, high: float = math.inf, *, closed: str = "[]") -> None:
        """Raise FieldError unless field `key` lies between `low` and `high`. Gates and tensors pass: no value yet.

        `closed` says which ends belong to the range, as in mathematics: `"[)"` keeps `low` and leaves out `high`.
        """
        value = getattr(self, key)
        if isinstance(value, Channels) and key not in self.by_channel:
            raise FieldError(self.label, key, value, "is not allowed; give a number, or a Gate: one per token and head")
        if isinstance(value, Tensor | Gate):
            return
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise FieldTypeError(self.label, key, value, "is not a number")
        above = value >= low if closed[0] == "[" else value > low
        below = value <= high if closed[1] == "]" else value < high
        if not (above and below):
            right = "∞)" if high == math.inf else f"{high:g}{closed[1]}"
            raise FieldError(self.label, key, value, f"is not allowed; give a number in {closed[0]}{low:g}, {right}")

    def check_choice(self, key: str, allowed: Iterable[Any]) -> None:
        """Raise FieldError unless field `key` holds one of `allowed`."""
        value, allowed = getattr(self, key), list(allowed)
        if value not in allowed:
            hint = nearest(value, [a for a in allowed if isinstance(a, str)]) if isinstance(value, str) else ""
            raise FieldError(self.label, key, value, f"is not allowed; give one of {allowed}.{hint}")


def _none_is(cls: type) -> None:
    """Return no name: there is no registry yet."""


_registered: Callable[[type], str | None] = _none_is


def label_by(name_of: Callable[[type], str | None]) -> None:
    """Let parts have the labels that `name_of` gives their classes, where it gives one: a registry's names."""
    global _registered  # noqa: PLW0603  # the registry knows parts, so parts can't import it
    _registered = name_of


Reader = Callable[[Any, Any, str], Any]


def _unread(hint: Any, value: Any, key: str) -> Any:
    """Raise TypeError: nothing here reads specs yet."""
    raise TypeError(f"{key}: {value!r} is not a part")


_read: Reader = _unread


def read_by(reader: Reader) -> None:
    """Let fields that hold parts be given by specs, which `reader` makes parts of, by a type hint and the key."""
    global _read  # noqa: PLW0603  # configs know parts, so parts can't import them
    _read = reader


def read_part(hint: Any, value: Any, key: str) -> Any:
    """Return `value`, a part or a spec of one, as the part or the parts that a field with this type hint holds."""
    return value if isinstance(value, Part) else _read(hint, value, key)


@dataclasses.dataclass(frozen=True)
class _Field:
    """A field of parts, or of a number that the data may choose, which may be written as a mapping.

    Attributes:
        hint: its type.
        part: the class of its parts; None: it is a number.
        many: whether it holds a mapping or a sequence of them.
    """

    hint: Any
    part: type[Part] | None
    many: bool = False

    def holds(self, value: Any) -> bool:
        """Return whether `value` is what the field holds, and no spec of it."""
        if self.part is None:
            return not isinstance(value, Mapping)
        if not self.many:
            return isinstance(value, self.part)
        items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
        return bool(items) and all(isinstance(item, self.part) for item in items)


_FIELDS: dict[type, dict[str, _Field]] = {}


def _fields(cls: type[Part]) -> dict[str, _Field]:
    if cls not in _FIELDS:
        hints = get_type_hints(cls)
        found = {key: _field(hints[key]) for key in cls.field_names}
        _FIELDS[cls] = {key: field for key, field in found.items() if field is not None}
    return _FIELDS[cls]


def _field(hint: Any) -> _Field | None:
    """Return what a field with this type hint holds, if parts, or a number that the data may choose."""
    args = get_args(hint)
    if Gate in args:
        return _Field(hint, None)
    if get_origin(hint) in (dict, list, tuple):
        part = next((arg for arg in args if is_subclass(arg, Part)), None)
        return _Field(hint, part, many=True) if part is not None else None
    part = next((arg for arg in (hint, *args) if is_subclass(arg, Part)), None)
    return _Field(hint, part) if part is not None else None
