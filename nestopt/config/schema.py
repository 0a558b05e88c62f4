"""The schema of a run: every key, its type, its default and what it means."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    field_validator,
    model_validator,
)
from typing_extensions import Self

from nestopt.config.errors import ConfigError, join
from nestopt.config.patterns import check_pattern
from nestopt.config.section import Section
from nestopt.config.sizes import named
from nestopt.config.spec import build, to_spec
from nestopt.config.values import Bool, FilePath, Finite, Whole, check_size, no_bool
from nestopt.core import Level, Part
from nestopt.core.precision import Precision

LATEST = "latest"
"""What stands for the newest run where a run is asked for."""

_written = PlainSerializer(to_spec, return_type=Any)
LevelSpec = Annotated[Level, BeforeValidator(lambda spec: build("level", spec)), _written]
ScheduleSpec = Annotated[Part, BeforeValidator(lambda spec: build("schedule", spec)), _written]
CallbackSpec = Annotated[Part, BeforeValidator(lambda spec: build("callback", spec)), _written]
LoggerSpec = Annotated[Part, BeforeValidator(lambda spec: build("logger", spec)), _written]
DatasetSpec = Annotated[Part, BeforeValidator(lambda spec: build("dataset", spec)), _written]
TaskSpec = Annotated[Part, BeforeValidator(lambda spec: build("task", spec)), _written]


def _spec(default: object) -> Any:
    """Return a default as a spec: it is built when a section is made, and importing this needs no registry."""
    return default


_ATTENTION = {"level": "window_attention", "memory": {"memory": "window", "size": 128}}
_TAUGHT = {"level": "cms", "periods": [32], "learn": "context", "teach": "loss", "through": "first_order"}


_NEAR = 10_000


class ModelConfig(Section):
    """The language model: by default a small Hope-Attention, whose last MLP goes on learning as it reads."""

    rivals: ClassVar[Mapping[str, tuple[str, Any]]] = {"mixer": ("mixers", []), "mlp": ("mlps", [])}

    mixer: LevelSpec = Field(
        default=_spec("attention"),
        description="what mixes tokens in each block: any level; given without `mixers`, all blocks have it",
    )
    mixers: list[LevelSpec] = Field(
        default=_spec([_ATTENTION]),
        description="a mixer for each block, from the first on, again and again; empty: all have `mixer`",
    )
    mlp: LevelSpec = Field(
        default=_spec({**_TAUGHT, "rate": 0.08}),
        description="what follows it, token by token: a cms; given without `mlps`, all blocks have it",
    )
    mlps: list[LevelSpec] = Field(
        default=_spec([{"level": "cms", "periods": [1]}, {**_TAUGHT, "rate": 0.05, "keep": 0.99}]),
        description="one for each block; of fewer, the last block has the last, and the first comes again and again; "
        "empty: all have `mlp`",
    )
    dim: Whole = Field(default=160, gt=0, description="width: numbers per token")
    blocks: Whole = Field(default=2, ge=1, le=1024, description="how many blocks, each a mixer and an mlp")
    heads: Whole = Field(default=4, ge=1, description="memories side by side in a mixer; must divide dim")
    kv_heads: Whole = Field(default=0, ge=0, description="keys and values, which heads share; a divisor; 0: heads")
    conv: Whole = Field(default=4, ge=0, description="width of the causal depthwise convolution; 0 for none")
    gate_output: Bool = Field(default=True, description="multiply each mixer's read by silu(W x)")
    out_norm: Bool | None = Field(default=None, description="normalise each head's read; null: but for attention")
    vocab: Whole = Field(default=256, ge=1, description="how many different tokens; 256 for bytes")
    tie: Bool = Field(default=False, description="let the head have the embedding's weights")
    segment: Whole = Field(
        default=0, ge=0, description="in training, recompute all but the states at every so many tokens; 0: keep all"
    )
    precision: Precision = Field(default="float32", description="of memories' products; states and sums are float32")

    @model_validator(mode="after")
    def _heads_divide_dim(self) -> Self:
        if self.dim % self.heads:
            top = min(self.heads - 1, self.dim)  # looked for near it only: of a large number that would take hours
            below = next((n for n in range(top, max(0, top - _NEAR), -1) if self.dim % n == 0), 1)
            above = [n for n in range(self.heads + 1, self.heads + _NEAR) if self.dim % n == 0][:1]
            near = " or ".join(str(n) for n in [below, *above])
            raise ConfigError.refuse("heads", self.heads, f"give a divisor of dim={self.dim}, such as {near}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ConfigError.refuse("kv_heads", self.kv_heads, f"give a divisor of heads={self.heads}, or 0")
        return self


class ViewConfig(Section):
    """A parameter as several matrices of one size, for levels that take matrices: fused projections, heads, and
    weights that lie the other way round than those of `nn.Linear`.
    """

    split: Whole = Field(ge=1, description="how many matrices; must divide the dimension")
    dim: Annotated[Literal[0, 1], no_bool("give 0 or 1")] = Field(
        default=0, description="the dimension to cut: 0, outputs (rows), or 1, inputs (columns)"
    )
    transposed: bool = Field(default=False, description="whether the parameter is `[in, out]`; `dim` is of it as it is")


class GroupConfig(Section):
    """Parameters with a stack or settings of their own. What is not given is as for the other parameters."""

    match: str = Field(description="a regular expression that is searched for in the parameters' names")
    stack: LevelSpec | None = Field(default=None, description="the level that steps them")
    lr: Finite | None = Field(default=None, ge=0, description="their learning rate")
    weight_decay: Finite | None = Field(default=None, ge=0, description="their decoupled weight decay")
    period: Whole | None = Field(default=None, ge=1, description="they change once in so many steps")
    view: ViewConfig | None = Field(
        default=None, description="show levels of matrices each as several: `{split: 3}` for a fused QKV projection"
    )

    @field_validator("match")
    @classmethod
    def _compiles(cls, match: str) -> str:
        check_pattern(match)
        return match


class RestConfig(Section):
    """What the stack does not take: embeddings, heads, norms and biases, where the stack is for matrices."""

    stack: LevelSpec = Field(
        default=_spec({"level": "adamw", "betas": [0.9, 0.95], "weight_decay": 0.0}),
        description="the level that steps them",
    )
    lr: Finite | None = Field(
        default=None,
        ge=0,
        description="their learning rate; null: 0.001, or that of the optimizer where both levels' are alike",
    )
    weight_decay: Finite | None = Field(default=None, ge=0, description="their decay; null: that of the optimizer")


def _rest(spec: object) -> object:
    """Make a section of a bare level, which stands for one with that stack."""
    if isinstance(spec, RestConfig) or (isinstance(spec, Mapping) and "level" not in spec):
        return spec
    return RestConfig(stack=build("level", spec))


class OptimizerConfig(Section):
    """How the parameters learn."""

    stack: LevelSpec = Field(default=_spec("muon"), description="the level, or composition of levels, that steps them")
    lr: Finite = Field(default=0.02, ge=0, description="learning rate")
    weight_decay: Finite = Field(
        default=0.05, ge=0, description="decoupled weight decay; 0 where `stack`, or a key of it, is given"
    )
    rest: Annotated[RestConfig, BeforeValidator(_rest)] = Field(
        default=_spec({"lr": 0.003}),
        description="for the parameters that the stack does not take: a section, or just a level",
    )
    groups: list[GroupConfig] = Field(
        default=[], description="parameters with a stack or settings of their own; the first match counts"
    )
    route: Literal["auto", "hidden_matrices", "all"] = Field(
        default="auto",
        description="what the stack takes: hidden_matrices, all, or auto: what it can take, as its levels require",
    )
    layer_decay: Finite = Field(
        default=1.0,
        gt=0,
        le=1,
        description="the last layer has the learning rate, and each layer this factor of the next one's; 1 for none",
    )
    strict: Bool = Field(default=True, description="refuse to run where a level gets no parameters")

    @model_validator(mode="after")
    def _a_stack_has_its_own_decay(self) -> Self:
        if "stack" in self.model_fields_set and "weight_decay" not in self.model_fields_set:
            self.__dict__["weight_decay"] = 0.0
        return self


class DataConfig(Section):
    """The text."""

    rivals: ClassVar[Mapping[str, tuple[str, Any]]] = {"dataset": ("path", None)}

    dataset: DatasetSpec | None = Field(default=_spec("stdlib"), description="the dataset, by name")
    path: FilePath | None = Field(default=None, description="own text: a file or a folder, in place of the dataset")
    task: TaskSpec | None = Field(
        default=None, description="in place of text: examples that are made, of a task such as parity or mqar"
    )
    window: Whole = Field(default=128, ge=1, description="tokens per sequence")
    batch: Whole = Field(default=8, ge=1, description="sequences per step")
    workers: Whole = Field(
        default=0,
        ge=0,
        le=1024,
        description="processes that read and tokenize documents ahead; 0: the training process does it",
    )

    @model_validator(mode="after")
    def _task_or_text(self) -> Self:
        if self.task is not None and self.path is not None:
            raise ConfigError.refuse("path", self.path, "it does nothing beside task; give one of them")
        return self


class TrainConfig(Section):
    """The run."""

    steps: Whole = Field(default=10_000, ge=1, description="optimizer steps")
    seconds: Finite | None = Field(
        default=180,
        gt=0,
        description="limit of the time in which it trains, without what it takes to measure, draw and save; the "
        "schedule follows whichever of both is further; null for none, as it is where only `steps` is given",
    )
    clock: Literal["wall", "cpu"] = Field(
        default="wall", description="what `seconds` are: of a clock on the wall, or of the CPU, of all threads together"
    )
    warmup: Finite = Field(default=0.02, ge=0, le=1, description="share of the run in which the learning rate rises")
    decay: Finite = Field(default=0.8, ge=0, le=1, description="share of the run, at its end, in which it falls to 0")
    decay_shape: ScheduleSpec = Field(
        default=_spec("linear"),
        description="how it falls: linear, in a straight line; cosine, along half a wave; or a plugin's schedule",
    )
    clip: Finite | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient; null for any")
    seed: Whole = Field(default=0, ge=0, le=2**64 - 1, description="of all random numbers")
    eval_every: Whole = Field(default=500, ge=0, description="steps between evaluations; 0: at the end only")
    eval_bytes: Whole = Field(default=16384, ge=2, description="held-out bytes per evaluation on the way")
    final_bytes: Whole = Field(default=131072, ge=2, description="held-out bytes for the evaluation at the end")
    eval_streams: Whole = Field(
        default=16,
        ge=0,
        description="read held-out text as so many stretches side by side, each with the state carried from its start "
        "to its end; 0: in windows, each from a new state",
    )
    learn: Literal["all", "mixer"] = Field(
        default="mixer",
        description="what writes its memories in training windows: all, or the mixers only, while an mlp that learns "
        "in context is trained as it starts",
    )
    log_every: Whole = Field(default=10, ge=1, description="steps between lines of metrics.jsonl")
    loggers: list[LoggerSpec] = Field(
        default=_spec(["jsonl"]),
        description="where else the lines go: csv, tensorboard, wandb, or a plugin's; metrics.jsonl is always written",
    )
    callbacks: list[CallbackSpec] = Field(
        default=[],
        description="what else happens at steps, evaluations, checkpoints and the end: early_stopping, or a plugin's",
    )
    save_every: Whole = Field(
        default=500,
        ge=0,
        description="steps between checkpoints, which are also after a minute, at each best evaluation and at the end; "
        "0: at the end only",
    )
    keep: Whole = Field(
        default=1, ge=1, description="checkpoints that stay: the last so many, and the one with the best evaluation"
    )
    sample_bytes: Whole = Field(default=400, ge=0, description="bytes of text to generate after each evaluation")
    device: str = Field(
        default="auto", description="cpu, cuda, cuda:1, mps, ..., or auto: an accelerator if there is one"
    )
    dtype: Literal["float32", "float64", "bfloat16", "float16"] = Field(
        default="float32",
        description="of weights and activations; below float32, the optimizer keeps weights and states in float32",
    )
    accumulate: Whole = Field(
        default=1, ge=1, description="a step's sequences are read in so many batches, one after another"
    )
    engine: Literal["single", "ddp", "fsdp2", "deepspeed"] = Field(
        default="single", description="one process, or how several share"
    )
    zero_stage: Annotated[Literal[0, 1, 2, 3] | None, no_bool("give 0, 1, 2 or 3")] = Field(
        default=None, description="of DeepSpeed's ZeRO; null: as `deepspeed` says, or 0"
    )
    deepspeed: dict[str, Any] | None = Field(
        default=None, description="other settings of DeepSpeed, as in its JSON; `--deepspeed FILE` puts them here"
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        default="stop",
        description="where a loss or gradient is not finite in any process: stop the run, or leave the step "
        "out in all of them; more than 10 such steps in a row stop it too",
    )
    timeout: Finite | None = Field(
        default=None,
        gt=0,
        description="seconds that processes wait for one another at most; null: 30 minutes with gloo, 10 with NCCL",
    )
    out: FilePath = Field(default="runs", description="folder in which runs are kept")
    name: str | None = Field(
        default=None, description="of the run's folder in it, which must not be there yet; null: the next number"
    )
    threads: Annotated[Whole, Field(ge=1, le=1024)] | Literal["auto"] | None = Field(
        default="auto",
        description="CPU threads; null: as torch chooses; auto: that, or 1 for a model of `dim` 160 or less, whose "
        "threads would spend more time waiting for each other than they save",
    )

    @field_validator("name")
    @classmethod
    def _is_no_path(cls, name: str | None) -> str | None:
        if name is not None and (name == LATEST or not re.fullmatch(r"(?!\.)[\w.=,+-]{1,100}", name)):
            raise ValueError(f"give 1 to 100 letters, digits and _ . = , + -, no dot first, and not {LATEST!r}")
        return name

    @model_validator(mode="after")
    def _steps_alone_have_no_limit(self) -> Self:
        if "steps" in self.model_fields_set and "seconds" not in self.model_fields_set:
            self.__dict__["seconds"] = None
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.warmup + self.decay > 1 + 1e-9:
            raise ConfigError.refuse("decay", self.decay, f"give at most 1 - warmup = {1 - self.warmup:g}")
        return self

    @model_validator(mode="after")
    def _stage_has_its_engine(self) -> Self:
        for key in ("zero_stage", "deepspeed"):
            value = getattr(self, key)
            if value and self.engine != "deepspeed":
                raise ConfigError.refuse(key, value, f"it needs engine=deepspeed, not {self.engine}")
        return self


class Config(Section):
    """A whole run. `Config()` is the one that `nestopt train` alone starts."""

    model: ModelConfig = Field(default=_spec({}), description="the language model; or a name, such as hope-340m")
    optimizer: OptimizerConfig = Field(default=_spec({}), description="how its parameters learn")
    data: DataConfig = Field(default=_spec({}), description="the text")
    train: TrainConfig = Field(default=_spec({}), description="the run")

    @field_validator("*", mode="before")
    @classmethod
    def _empty_is_default(cls, section: object) -> object:
        return {} if section is None else section  # `model:` with nothing under it

    @field_validator("model", mode="before")
    @classmethod
    def _named(cls, section: object) -> object:
        return named(section) if isinstance(section, str) else section

    @classmethod
    def from_data(cls, data: object, source: str = "") -> Config:
        """Return the configuration that `data` (nested mappings, as from YAML) describes; None is the default one.

        Args:
            data: what is not given has its default.
            source: where it comes from, such as a file name, for messages.

        Raises:
            ConfigError: one, for all that is wrong.
        """
        data = {} if data is None else data
        try:
            if not isinstance(data, Mapping):
                raise ConfigError.refuse("", data, f"give a mapping with the sections {', '.join(cls.model_fields)}")
            check_size(data)
            _check_keys(data, "")
            return cls(**data)
        except ConfigError as error:
            raise error.under("", source) from None

    @property
    def threads(self) -> int | None:
        """How many CPU threads torch is to use, or None: as it chooses."""
        given = self.train.threads
        return given if given != "auto" else 1 if self.model.dim <= 160 else None

    def to_data(self) -> dict[str, Any]:
        """Return every key, as plain data: `from_data` makes an equal configuration of it."""
        return self.model_dump()

    def to_yaml(self) -> str:
        """Return `to_data` as YAML text."""
        from nestopt.config.io import dump

        return dump(self.to_data())


def _check_keys(data: object, path: str, steps: bool = False) -> None:
    """Raise ConfigError at a key that is not text (in YAML, `on` and `1` are not), but for a schedule's `steps`."""
    if isinstance(data, Mapping):
        for key, value in data.items():
            if not isinstance(key, str) and not (steps and type(key) is int):
                raise ConfigError.refuse(join(path, str(key)), key, "keys must be text")
            _check_keys(value, join(path, key), key in ("schedule", "points"))
    elif isinstance(data, list | tuple):
        for i, item in enumerate(data):
            _check_keys(item, join(path, i))
