"""The parts of `benchmarks/gpu.py`, in order: each a module with `run(setting)`, which yields `Row`s as it has them.

    from benchmarks.gpu_parts import rates
    from benchmarks.gpu_parts.setting import Setting
    for row in rates.run(Setting("cuda")):
        print(row.name, row.values)

Nothing is imported here but the standard library, so that the command can say what is missing.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the run, in a process of its own.

    Attributes:
        name: for `--only`, and in tables; also of the module, unless that is given.
        about: what it does, for whoever waits.
        limit_s: after so many seconds, its start included, it is ended with all that it has started.
        module: in this package; or anywhere, by a name with a dot.
    """

    name: str
    about: str
    limit_s: float
    module: str = ""

    @property
    def where(self) -> str:
        return self.module if "." in self.module else f"{__name__}.{self.module or self.name}"


PARTS: tuple[Part, ...] = (
    Part("rates", "launches, bandwidth and matrix products of the card", 28),
    Part("optimizers", "steps against torch on the CPU in float64, none of which may wait for the device", 42),
    Part("waits", "layers and models, of which no forward, backward or step may wait for the device", 45),
    Part("ops", "every operation with its gradients against float64 values", 45),
    Part("capture", "capturable steps in a CUDA graph, against the same steps without", 40),
    Part("layers", "layers at full size beside attention and their peers", 85),
    Part("optimizer_speed", "optimizers on a Transformer's parameters beside torch's", 40),
    Part("training", "a training step of four models of 340M beside what the plan says", 105),
    Part("zero1", "DeepSpeed ZeRO 1 in one process, saved and resumed", 25, module="engines"),
    Part("fsdp2", "FSDP2 in one process, saved and resumed", 20, module="engines"),
)
"""The most important first."""

TOTAL_S = 480.0
"""What all of it may take: the parts' limits, and what the command does itself."""

MARGIN_S = 3.0
"""A part is told to be done so long before it is ended."""

NO_TIME = "no time left"
"""Why a row is skipped when its part has to be done."""
