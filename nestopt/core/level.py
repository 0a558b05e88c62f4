"""A level: an associative memory on a clock, which does not care what it remembers."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from nestopt.core.clock import advance, start
from nestopt.core.order import Node
from nestopt.core.part import PARAM, FieldError, Number, Part
from nestopt.core.precision import matmul
from nestopt.core.signal import Signal
from nestopt.core.tree import State, leaves, store

RENAMED = {
    "attend": "token_step",
    "attend_chunk": "chunk_step",
    "begin": "init_tokens",
    "damping": "steady_gain",
    "descend_": "step_",
    "entrywise": "elementwise",
    "fixed": "constant_keys",
    "follows": "depends_on",
    "is_entrywise": "is_elementwise",
    "keeps_pending": "owns_partial_chunk",
    "recall": "token_read",
    "span": "chunk_size",
}
"""What a level's attributes were called, and are."""

OF_STEP = {"step_", "average_", "averages", "reads_param"}
"""What follows from a level's `step`, so that a subclass with another one does not inherit it."""


class Level(Part):
    r"""One level of a nest, defined by what it does to one tensor's gradient.

    Write `init` and `step`, in plain torch operations on one tensor; that is all. The library runs the same object

    * **on gradients**, as an optimizer: $W \leftarrow W - \mathrm{lr}\cdot u$ with $u$ the direction `step` returns;
    * **on tokens**, as a layer: an association $k \to v$ is the gradient $v k^\top$ of the `dot` objective (NL eq.
      14-18), the level compresses those, and its direction is read at the query, $y = u\,q$;
    * **as another level's rule**: shown the inner gradients of that level's memory.

    Fields are config keys. A field that holds a number may be given a `Gate` and is then a number per token on tokens.

    Args:
        period: writes once in so many steps of its context, on the sum of what it saw (NL eq. 71). Default 1. Its
            direction is taken at every step until the next write: a level of period C whose direction is as long as
            what it sees (`gd`, `momentum`) applies the sum of C gradients C times, and needs a learning rate C times
            smaller. One that forgets scale (`adam`, `muon`) does not.
        clock: `"sum"` (default), or `"mean"`: it sees the mean of the gradients of its period.
    """

    kind: ClassVar[str] = "level"
    objectives: ClassVar[dict[str, str]] = {}
    """For `describe`: the objective by which each state tensor is a memory, by its key."""
    depends_on: ClassVar[dict[str, str]] = {}
    """For the order of levels: state tensors whose update needs another's of the same step first."""

    batched: ClassVar[bool] = False
    """Whether `step` may be shown a stack `[n, *shape]` of tensors as it stands; otherwise the library uses `vmap`."""

    elementwise: ClassVar[bool] = False
    """Whether an entry of the direction and of the state depends on that entry of the gradient, state and parameter
    alone, and all state has the parameter's shape: the library may then cut tensors to pieces and glue them together,
    which is a great deal faster. It holds for the level by itself; `is_elementwise` asks for those within it, too."""

    reads_param: ClassVar[bool] = True
    """Whether `step` looks at `signal.param`; the library need not bring parameters together for one that does not.
    A subclass with a `step` of its own does, unless it says otherwise. `needs_param` asks for levels within, too."""

    owns_partial_chunk: ClassVar[bool] = False
    """Whether the state itself keeps the tokens of chunks that are not over: `chunk_step` then takes any number of
    tokens, from anywhere in a chunk."""

    constant_keys: ClassVar[tuple[str, ...]] = ()
    """The keys of the state that no token changes, whose start is learned: where a layer goes on from a state, it puts
    its present parameters there, and gradients reach them whatever the state was."""

    positive: ClassVar[frozenset[str]] = frozenset()
    """Keys of the state that are never negative, such as second moments."""

    momentum_field: ClassVar[str | None] = None
    """The field that holds β of its average of gradients (or a tuple that begins with it), for schedules of it."""

    period: int = dataclasses.field(default=1, kw_only=True)
    clock: Literal["sum", "mean"] = dataclasses.field(default="sum", kw_only=True, repr=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for old, new in RENAMED.items():
            if old in vars(cls) and (old != "damping" or old not in cls.field_names):  # a number may be called that
                raise TypeError(f"{cls.__name__}: a level's {old!r} is called {new!r} now; rename it")
        if "step" in vars(cls):  # what a parent says of its step, and how it does it fast, is of the parent's
            for name in OF_STEP - vars(cls).keys():
                setattr(cls, name, vars(Level)[name])

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_choice("clock", ("sum", "mean"))
        if isinstance(self.period, bool) or not isinstance(self.period, int) or self.period < 1:
            raise FieldError(
                self.label, "period", self.period, "is not allowed; give a whole number of steps, 1 or more"
            )

        for key, part in self.parts():
            if isinstance(part, Level) and part.of_weights and not (self.of_weights and key == "inner"):
                problem = "moves weights, of which there is one set, so it stands around a whole stack: put this in it"
                raise FieldError(self.label, key, part, problem)

    # -- on gradients ----------------------------------------------------------------------------------------------

    def init(self, param: Tensor) -> State:
        """Return the state at the start: a dict of tensors (nested dicts are fine), for a tensor like `param`."""
        return {}

    @abstractmethod
    def step(self, grad: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        """Write `grad` and read: the direction u (descent is `param - lr * u`) and the new state.

        Must be a pure function: it changes nothing in place and keeps nothing on `self`.
        """

    def step_(self, grad: Tensor, state: State, signal: Signal) -> Tensor:
        """Do as `step` in place: write over the tensors of `state` and return the direction.

        The direction may be a tensor of the state, the gradient itself, or a place that other levels use too: it is to
        be read before the `step_` of any other level, or copied, and not written to. A level overrides this where it
        can do with fewer passes over memory; never `signal.param`, nor `grad`, is changed.
        """
        direction, new = self.step(grad, state, signal)
        return store(state, new, direction)

    def average_(self, average: Tensor, keep: float, take: float, grad: Tensor, state: State, signal: Signal) -> bool:
        """Do as `step_` and set `average` to `keep · average + take · direction`, in fewer passes than by themselves.

        Returns:
            Whether it was done. False, and nothing has changed, for a level that can't.
        """
        return False

    @property
    def averages(self) -> tuple[str, float, float] | None:
        """Return `(key, keep, take)` if a step is `state[key] = keep · state[key] + take · grad`, its direction too."""
        return None

    def before_last_(self, grad: Tensor, state: State, signal: Signal) -> tuple[Level, Tensor, State]:
        """Do in place what comes before the level whose direction is this one's: nothing, but in a chain.

        Returns:
            That level, what it is shown, and its state.
        """
        return self, grad, state

    @property
    def is_batched(self) -> bool:
        """Whether this level and all levels within it are `batched`."""
        return self.batched and all(part.is_batched for _, part in self.parts() if isinstance(part, Level))

    @property
    def needs_param(self) -> bool:
        """Whether this level, or a level within it, looks at the parameter (`reads_param`)."""
        return self.reads_param or any(part.needs_param for _, part in self.parts() if isinstance(part, Level))

    @property
    def is_elementwise(self) -> bool:
        """Whether this level and all levels within it are `elementwise`, and no number of theirs has a shape."""
        numbers = (getattr(self, field.name) for field in dataclasses.fields(self))
        if not type(self).elementwise or any(isinstance(number, Tensor) and number.ndim for number in numbers):
            return False
        return all(part.is_elementwise for _, part in self.parts() if isinstance(part, Level))

    @property
    def of_weights(self) -> bool:
        """Whether it acts on the weights themselves, after each update (see `nestopt.core.weights`)."""
        return False

    @property
    def steady_gain(self) -> Number:
        """Return the factor that makes the sum of all directions which one gradient ever causes equal to that gradient.

        1 - β for momentum, which adds a gradient again and again; 1 for a level that passes it on once.
        """
        return 1.0

    @property
    def rates_as(self) -> str:
        """Return the name of the level that this one's learning rates are comparable to: its own, unless it says so."""
        return self.label

    @property
    def forgets_scale(self) -> bool:
        """Return whether the direction stays as it is where all gradients are multiplied by a constant."""
        return self.rates_as in ("adam", "muon")

    # -- on tokens -------------------------------------------------------------------------------------------------

    @property
    def of_tokens(self) -> bool:
        """Whether this level, or one within it that is shown tokens, does more on tokens than compress v kᵀ."""
        return type(self).token_step is not Level.token_step or type(self).chunk_step is not Level.chunk_step

    @property
    def appends(self) -> bool:
        """Whether its memory on tokens keeps every pair, and so grows."""
        return False

    @property
    def chunk_size(self) -> int:
        """How many tokens are shown at a time: with more than 1, by `chunk_step`."""
        return 1

    def init_tokens(self, dim_k: int, dim_v: int, like: Tensor, learned: State) -> State:
        """Return the state of one sequence and head before its first token, from the start that a layer learned.

        Raises ValueError for a level that needs a parameter: there is none.
        """
        if PARAM in self.needs:
            raise ValueError(f"{self.label} can't run on tokens: it needs a parameter beside its gradient")
        return start(self, like.new_zeros(dim_v, dim_k))

    def token_step(self, q: Tensor, k: Tensor, v: Tensor, state: State, signal: Signal) -> tuple[Tensor, State]:
        """One token of one head: write the pair `k [D_k] -> v [D_v]`, read at `q [D_k]`; gives `(y [D_v], state)`."""
        direction, state = advance(self, torch.outer(v, k), state, signal)
        return matmul(direction, q), state

    def chunk_step(
        self, q: Tensor, k: Tensor, v: Tensor, gates: Mapping[str, Tensor], live: Tensor, state: State, signal: Signal
    ) -> tuple[Tensor, State]:
        """Up to `chunk_size` tokens of a head, from a chunk's start: `[C, D_k]`, `[C, D_v]`, gates and `live` `[C]`.

        Gives `(y [C, D_v], state)`. Tokens that are not `live` are not written. The level is as it was configured:
        `gates` are values of its gates by dotted path. `signal.step` counts the tokens before these. A level that
        `owns_partial_chunk` takes more than `chunk_size`, and from anywhere in a chunk.
        """
        raise NotImplementedError(f"{self.label} has chunk_size={self.chunk_size} and no chunk_step")

    def token_read(self, q: Tensor, dim_v: int, state: State, signal: Signal) -> Tensor:
        """Read at `q [D_k]` and write nothing: `[D_v]`. By default what a token of zeros, key and value, is answered.

        A level that forgets by itself, such as momentum, has done so once more in that answer. The state stays as it
        is, so that `state` is not returned.
        """
        return self.token_step(q, torch.zeros_like(q), q.new_zeros(dim_v), state, signal)[0]

    def learned_start(self, dim_k: int, dim_v: int) -> dict[str, Tensor]:
        """Return what a layer learns as this level's initial memory, at its own start; empty where that is zero."""
        return {}

    # -- for describe ----------------------------------------------------------------------------------------------

    def nodes(self, name: str, period: int = 1, after: tuple[str, ...] = ()) -> list[Node]:
        """Return the memories of this level, for the order of levels (`nestopt.core.order`)."""
        keys = [key for key, _ in leaves(self.init(torch.zeros(2, 2)))]
        every = period * self.period
        if not keys:
            return [Node(name, every, after, memory="none", objective="", rule=self.label)]
        return [
            Node(
                f"{name}.{key}" if len(keys) > 1 else name,
                every,
                (*after, f"{name}.{self.depends_on[key]}") if key in self.depends_on else after,
                memory="vector",
                objective=self.objectives.get(key, ""),
                rule=self.label,
            )
            for key in keys
        ]
