"""A run on many GPUs: memory of each, time, and what is sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from nestopt.config import Config, ConfigError
from nestopt.models.cost import Cost
from nestopt.nn.hope import Learn
from nestopt.optim.sharded import units
from nestopt.train.planning.parts import Parts
from nestopt.train.planning.passes import Device, Pass, count_pass
from nestopt.train.planning.ranks import NUMBER, traffic
from nestopt.train.planning.rates import Rates
from nestopt.train.planning.sharing import BUCKET, Sharing

GIGA, TERA, DAY = 1e9, 1e12, 86400.0


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What a GPU can do.

    Args:
        memory: 10⁹ bytes. Default 80.
        rates: how fast it is. Default: as stated for an H100.

    Raises:
        ConfigError: a number out of range; names the flag.
    """

    memory: float = 80.0
    rates: Rates = dataclasses.field(default_factory=Rates.stated)

    def __post_init__(self) -> None:
        if not 0 < self.memory < float("inf"):
            raise ConfigError.refuse("--memory", self.memory, "give a number above 0")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on a GPU: what is there all the time, and what comes and goes.

    Attributes:
        weights: in the dtype that is computed with; of spread ones, the GPU's slices.
        gradients: at the end of the backward pass.
        states, masters: the optimizer's, and float32 weights beside narrow ones.
        buffers: what gradients are sent from, and weights that are gathered for as long as they are used.
        fast: the states of the micro-batch's sequences, fast weights among them, at the end of the pass.
        activations: what else the pass holds at its peak.
        work: what the step of the optimizer makes and throws away; at an owner, the tensors that came to it too.
        in_pass, in_step: all that is held at the peak of either.
    """

    weights: int
    gradients: int
    states: int
    masters: int
    buffers: int
    fast: int
    activations: int
    work: int
    in_pass: int
    in_step: int

    @property
    def total(self) -> int:
        """At the most, at a time."""
        return max(self.in_pass, self.in_step)


@dataclasses.dataclass(frozen=True)
class Scale:
    """The plan of a run; memory and costs are those of one GPU and one step, of the GPU that has most.

    Attributes:
        sharing, gpu: what was planned for.
        parameters: numbers in the model, what is tied once.
        rows, window: sequences of a micro-batch, and their tokens.
        memory: of a GPU.
        passes: cost of the forward and backward passes, with what is computed again.
        step: cost of the optimizer, on average over its levels' clocks.
        sent: bytes by what is in them.
        tokens: of the whole run.
        tokens_per_step: of all GPUs.
        learn: what writes its memories in training: `"all"`, or `"mixer"`, the mixers only.
    """

    sharing: Sharing
    gpu: Gpu
    parameters: int
    rows: int
    window: int
    memory: Memory
    passes: Cost
    step: Cost
    sent: Mapping[str, float]
    tokens: int
    tokens_per_step: int
    learn: str

    @property
    def times(self) -> dict[str, float]:
        """Seconds that the launches, the bytes and the products of a step take, each as if the others took none."""
        return self.gpu.rates.seconds(self.passes + self.step)

    @property
    def binding(self) -> str:
        """Which of `times` is longest: no step is shorter."""
        return max(self.times, key=self.times.__getitem__)

    @property
    def seconds(self) -> float:
        """Of a step, at the least; sending is taken to go on meanwhile."""
        return self.times[self.binding]

    @property
    def tokens_per_second(self) -> float:
        """Of all GPUs, at the most."""
        return self.tokens_per_step / self.seconds

    @property
    def days(self) -> float:
        return self.tokens / self.tokens_per_second / DAY


def scale(
    config: Config,
    sharing: Sharing,
    gpu: Gpu | None = None,
    *,
    tokens: int | None = None,
    device: Device = "meta",
    quiet: bool = True,
) -> Scale:
    """Return what training `config` takes of each of `sharing.world` GPUs.

    Nothing is computed: the model's pass and the optimizer's step are run on tensors without data.

    Args:
        config: the run. Its batch is that of all GPUs and micro-batches.
        sharing: how the GPUs share it.
        gpu: what each can do. Default an H100.
        tokens: of the whole run. Default: steps × batch × window.
        device: whose path the passes take: `"meta"`, an accelerator's, or `"cpu"`, this machine's.
        quiet: show no progress.

    Raises:
        ConfigError: the batch is no multiple of GPUs and micro-batches; tokens out of range; a dtype without a rate.
    """
    data, pieces = config.data, sharing.world * sharing.accumulate
    if data.batch % pieces:
        what = f"{sharing.world} GPUs with {sharing.accumulate} micro-batches each"
        raise ConfigError.refuse("data.batch", data.batch, f"give a multiple of {pieces}, for {what}")
    per_step = data.batch * data.window
    tokens = config.train.steps * per_step if tokens is None else tokens
    if tokens < 1:
        raise ConfigError.refuse("--tokens", tokens, "give a whole number, 1 or more")
    gpu = gpu or Gpu()
    gpu.rates.dtype(config.train.dtype)
    rows = data.batch // pieces
    learn: Learn = True if config.train.learn == "all" else "mixer"
    counted = count_pass(config.model, rows, data.window, dtype=sharing.dtype, learn=learn, device=device, quiet=quiet)
    parts = Parts.of(config)
    owner = parts.owners(sharing.world) if sharing.spreads_states else {}
    ranks = _unlike(parts, owner, sharing)
    steps = [parts.step(sharing, rank, owner).cost for rank in ranks]
    return Scale(
        sharing,
        gpu,
        parts.numel,
        rows,
        data.window,
        max((rank_memory(parts, counted, sharing, owner, rank) for rank in ranks), key=lambda memory: memory.total),
        counted.cost * sharing.accumulate,
        max(steps, key=lambda cost: max(gpu.rates.seconds(cost).values())),
        _sent(parts, owner, sharing),
        tokens,
        per_step,
        config.train.learn,
    )


def _unlike(parts: Parts, owner: Mapping[str, int], sharing: Sharing) -> list[int]:
    """Return processes that have tensors of other shapes than those before. The first has the largest slices."""
    found: dict[tuple[tuple[int, ...], ...], int] = {}
    if not sharing.spreads_states:
        return [0]
    for rank in range(sharing.world):
        found.setdefault(tuple(sorted(tuple(parts.shapes[n]) for n, own in owner.items() if own == rank)), rank)
    return list(found.values())


def rank_memory(parts: Parts, counted: Pass, sharing: Sharing, owner: Mapping[str, int], rank: int) -> Memory:
    """Return what the GPU of the process `rank` holds."""
    done = parts.step(sharing, rank, owner)
    states, work = done.held, _working(parts, owner, sharing, rank, done.work)
    wide, width = NUMBER, sharing.dtype.itemsize
    whole, slices = parts.numel, sum(sharing.part(shape.numel(), rank) for shape in parts.shapes.values())
    masters = (slices if sharing.spreads_states else whole) * wide if sharing.has_masters else 0
    weights = (slices if sharing.spreads_weights else whole) * width
    gradients = (slices if sharing.spreads_gradients else whole) * width
    if sharing.engine == "fsdp2":  # which keeps masters only, and reduces into their dtype
        gradients = slices * max(wide, width)
        weights = 0 if masters else weights
    resident = weights + states + masters + _buffers(parts, sharing)
    stepping = gradients
    if sharing.has_masters and sharing.engine != "fsdp2":  # their gradients, as wide as they are
        work += masters
        if sharing.engine != "deepspeed":  # which take the others' place
            stepping = 0
    # where nothing is spread or added to, gradients come into being in the course of the pass
    growing = not sharing.spreads_gradients and sharing.accumulate == 1
    in_pass = counted.peak if growing else counted.apart + gradients
    return Memory(
        weights,
        gradients,
        states,
        masters,
        _buffers(parts, sharing),
        counted.state,
        counted.apart - counted.state,
        work,
        resident + in_pass,
        resident + stepping + work,
    )


def _working(parts: Parts, owner: Mapping[str, int], sharing: Sharing, rank: int, work: int) -> int:
    """Return what steps take for a while: `work` of the levels, and at an owner the tensors that come and go."""
    if not sharing.spreads_states:
        return work
    most = work
    for group in parts.groups:
        sizes = {name: shape.numel() for name, shape in group.shapes.items() if name in owner}
        if sizes:
            shapes = {name: tuple(group.shapes[name]) for name in sizes}
            found = units.rounds(shapes, owner, sharing.world, units.LIMIT)
            own = [sum(sizes[name] for name in names if owner[name] == rank) for names in found]
            slices = [sum(sharing.part(sizes[name], rank) for name in names) for names in found]
            most = max(most, NUMBER * units.held_in_rounds(own, slices, -(-work // NUMBER)))
    return most


def _buffers(parts: Parts, sharing: Sharing) -> int:
    """Return what torch and DeepSpeed keep for sending, as they come.

    DDP: a copy of all gradients. ZeRO 1 and 2: a bucket. ZeRO 3 and FSDP2: weights of two blocks, this and the next,
    and of what is outside of blocks, and the gradients of one.
    """
    width = sharing.dtype.itemsize
    if sharing.engine == "single" or sharing.world == 1:
        return 0
    if not sharing.spreads_weights:
        return (min(BUCKET, parts.numel) if sharing.engine == "deepspeed" else parts.numel) * width
    blocks: dict[str, int] = {}
    outside = 0
    for name, shape in parts.shapes.items():
        kind, _, rest = name.partition(".")
        if kind == "blocks":
            block = rest.partition(".")[0]
            blocks[block] = blocks.get(block, 0) + shape.numel()
        else:
            outside += shape.numel()
    return (3 * max(blocks.values()) + outside) * width


def _sent(parts: Parts, owner: Mapping[str, int], sharing: Sharing) -> dict[str, float]:
    """Return bytes that a GPU sends in a step: rings for what all get, each process to each for owners."""
    width, world = sharing.dtype.itemsize, sharing.world
    once = (world - 1) / world * parts.numel * width
    if not sharing.spreads_states:
        return {"gradients": 2 * once}
    # slices are not added up over micro-batches before they are sent, whole gradients are
    times = sharing.accumulate if sharing.spreads_gradients else 1
    sizes = {name: parts.shapes[name].numel() for name in owner}
    return {
        "gradients": once * times,
        "weights": once * (2 * sharing.accumulate if sharing.spreads_weights else 1),
        "owners": float(max(traffic(sizes, owner, sharing)[0])),
    }
