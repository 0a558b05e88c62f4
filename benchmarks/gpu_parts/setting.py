"""What a part is given, and the rows that it gives back."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.gpu_parts import NO_TIME
from benchmarks.rows import Missing

Outcome = Literal["passed", "failed", "measured", "skipped"]

NO_CUDA = "no CUDA"
"""Why a row is skipped that exists only there."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One result, plain data.

    Attributes:
        name: what was looked at.
        outcome: `"passed"` and `"failed"` of what has a bound, `"measured"` of what has none, `"skipped"` for a reason.
        words: why it failed or was skipped, or what else there is to say.
        values: numbers and words by column.
    """

    name: str
    outcome: Outcome
    words: str = ""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, name: str, error: float, bound: float, words: str = "", **values: Any) -> Row:
        """Passed if `error` is within `bound`; what is no number is not."""
        within = error <= bound  # false for NaN
        found = {"error": error, "bound": bound, **values}
        return cls(name, "passed" if within else "failed", words or ("" if within else "beyond its bound"), found)


@dataclasses.dataclass(frozen=True)
class Setting:
    """Attributes:
    device: `"cuda"`, or `"cpu"`.
    tiny: small sizes, at which times mean nothing.
    part: the name of the part that is run.
    until: by `time.monotonic`, when it has to be done.
    values: the file that `--prepare` makes.
    scratch: a folder for what is written and read again.
    precisions: of memories' products, by `precision=`; None is the default.
    rates: what the part of that name has found, where it has run before.
    """

    device: str = "cpu"
    tiny: bool = False
    part: str = ""
    until: float = math.inf
    values: Path = Path("runs/gpu/values.safetensors")
    scratch: Path = Path("runs/gpu/scratch")
    precisions: tuple[str | None, ...] = (None,)
    rates: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    def left(self) -> float:
        """Seconds until the part has to be done."""
        return self.until - time.monotonic()

    def to_data(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "values": str(self.values), "scratch": str(self.scratch)}

    @classmethod
    def from_data(cls, data: dict[str, Any]) -> Setting:
        paths = {name: Path(data[name]) for name in ("values", "scratch")}
        return cls(**{**data, **paths, "precisions": tuple(data["precisions"])})


class Lost(Exception):
    """The device answers no more, and what comes after in this process would fail for that alone."""


def attempts(
    setting: Setting, rows: Sequence[tuple[str, Callable[[], Row]]], *, need_s: float = 1.0, peers: bool = False
) -> Iterator[Row]:
    """What each function gives, or how it failed, as rows. What there is no time for is skipped.

    Args:
        setting: with the time that there is.
        rows: names and functions.
        need_s: of the time that must be left for the next one.
        peers: whether they are other people's, which may fail without our run having failed.
    """
    for i, (name, run) in enumerate(rows):
        if setting.left() < need_s:
            yield Row(name, "skipped", NO_TIME)
            continue
        try:
            found = run()
        except Missing as missing:
            found = Row(name, "skipped", str(missing))
        except Exception as error:
            traceback.print_exc()  # to the log
            found = Row(name, "skipped" if peers else "failed", said(error))
        yield found
        free(setting)  # only here, when no traceback holds tensors any more
        if found.outcome == "failed" and lost_device(setting):
            for rest, _ in rows[i + 1 :]:
                yield Row(rest, "failed", "not tried: the device was lost in a row before")
            raise Lost(name)


def said(error: BaseException) -> str:
    """An error in one line, and where in our own code it was raised."""
    lines = str(error).strip().splitlines()
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/nestopt/" in f.filename]
    where = f" (at {'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}{where}"


def lost_device(setting: Setting) -> bool:
    """Whether CUDA answers no more: after an illegal access, or an assertion in a kernel, nothing does."""
    if not setting.cuda:
        return False
    try:
        torch.ones(1, device=setting.device).add_(1)
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def free(setting: Setting) -> None:
    """Give back what the allocator holds and nobody needs."""
    gc.collect()
    if setting.cuda:
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


@contextlib.contextmanager
def no_waits(setting: Setting) -> Iterator[None]:
    """On CUDA, let whatever waits for the device, or copies pageable memory to it, raise. Elsewhere nothing is seen."""
    if not setting.cuda:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()


def error_of(found: Tensor, true: Tensor) -> float:
    """The root mean square of the difference, of that of `true`; NaN where something is not finite."""
    true = true.double().cpu()
    difference = (found.detach().double().cpu() - true).square().mean().sqrt()
    size = true.square().mean().sqrt()
    return float(difference / size.clamp_min(1e-30)) if size > 0 else float(difference)


def generator(seed: int) -> torch.Generator:
    """Random numbers that are the same on every machine: made on the CPU."""
    return torch.Generator().manual_seed(seed)
