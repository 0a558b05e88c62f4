"""The prepared run for a machine with a GPU: what nobody could know without one, in eight minutes at the most.

    python benchmarks/gpu.py --prepare           # beforehand, on any machine: values and plans, a quarter of an hour
    python benchmarks/gpu.py                     # on the machine with the GPU; no network
    python benchmarks/gpu.py --tiny              # all of it in small, on a CPU too

Each part has a process, and a time limit, of its own, and gives what it has if it fails or hangs. Lines come as results
do, a table last; `gpu.json`, `gpu.md` and a log lie in the folder of `--out`. `benchmarks/README.md` says how to read
them, and which wheels to take along. Exit status: 0 if nothing failed, 1 if something did, 2 if it could not begin.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_parts import PARTS, TOTAL_S, Part
from benchmarks.gpu_parts.runner import ROOT, Ended, Told, run
from benchmarks.gpu_parts.summary import counts, line, rates, text, well, write

NEEDED = ("torch", "numpy", "pluggy", "pydantic", "safetensors", "tqdm", "typing_extensions", "yaml")
LEAST_S = 2.0
"""Less than that is not worth a start."""
PRECISIONS = ("float32", "tf32", "bfloat16")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    parser.add_argument("--prepare", action="store_true", help="make the file of values and plans, and nothing else")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes: to see that all of it runs; times mean nothing"
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda, or with --tiny what there is")
    names = [part.name for part in PARTS]
    parser.add_argument(
        "--only", nargs="+", choices=names, default=names, help="parts to run; default: all", metavar="PART"
    )
    parser.add_argument("--out", type=Path, default=default, metavar="FOLDER", help=f"default: $OUT, or {default}")
    values = ROOT / "runs" / "gpu" / "values.safetensors"
    parser.add_argument("--values", type=Path, default=values, metavar="FILE", help="that --prepare makes")
    parser.add_argument("--no-plans", action="store_true", help="with --prepare: values only, which takes seconds")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        metavar="NAME",
        help=f"of memories' products, for layers, training and plans: {', '.join(PRECISIONS)}; default: the library's",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=TOTAL_S,
        metavar="S",
        help=f"seconds for all, in proportion to which the parts' limits are; default {TOTAL_S:g}",
    )
    args = parser.parse_args(given)
    if not 0 < args.budget < math.inf:
        parser.error(f"--budget {args.budget} is not allowed; give seconds, more than 0")
    args.command = shlex.join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if given is None else given)])
    args.out, args.values = args.out.resolve(), args.values.resolve()
    return args


def main(given: Sequence[str] | None = None, parts: Sequence[Part] = PARTS) -> int:
    """Run the command; `parts` are those that `--only` chooses from."""
    begun = time.monotonic()
    args = arguments(given)
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"not installed here: {', '.join(missing)}; benchmarks/README.md says which wheels to take along")
        return 2
    if args.prepare:
        return prepare(args)
    import torch  # only looked at: each part has its own context

    device = args.device or ("cuda" if torch.cuda.is_available() or not args.tiny else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print(
            f"torch {torch.__version__} finds no CUDA device here, and this run is for one: give --tiny to see it run"
        )
        return 2
    return all_parts(args, device, [part for part in parts if part.name in args.only], begun)


def prepare(args: argparse.Namespace) -> int:
    """Make the file of values and plans."""
    import nestopt
    from benchmarks.gpu_parts import planned, values
    from benchmarks.gpu_parts.precision import suffix

    begun = time.monotonic()
    made, plans = values.make(), {}
    print(f"values of {len(values.CASES)} operations, {time.monotonic() - begun:.0f} s", flush=True)
    wanted = itertools.product(planned.MODELS, args.precision or [None])
    for name, precision in () if args.no_plans else wanted:
        begun, label = time.monotonic(), name + suffix(precision)
        plans[label] = planned.count(name, precision=precision)
        print(f"the plan of {label}, {time.monotonic() - begun:.0f} s", flush=True)
    values.write(args.values, made, {"nestopt": nestopt.__version__, "plans": plans})
    print(f"{args.values}: {args.values.stat().st_size / 1e6:.1f} MB")
    return 0


def all_parts(args: argparse.Namespace, device: str, parts: Sequence[Part], begun: float) -> int:
    """Run parts in their order, and write what there is after each."""
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "gpu.log"
    log.write_bytes(b"")
    ended = [Ended(part.name) for part in parts]
    machine: dict[str, Any] = {}
    print(f"{len(parts)} parts on {device}, {args.budget:g} s at the most; log: {log}", flush=True)
    try:
        with tempfile.TemporaryDirectory() as scratch, _ask_to_stop():
            setting = {
                "device": device,
                "tiny": args.tiny,
                "values": str(args.values),
                "scratch": scratch,
                "precisions": args.precision or [None],
                "rates": {},
            }
            for i, (part, found) in enumerate(zip(parts, ended, strict=True)):
                left = args.budget - (time.monotonic() - begun)
                limit_s = min(part.limit_s * args.budget / TOTAL_S, left)
                if limit_s < LEAST_S:
                    found.words = "no time was left for it"
                    continue
                print(f"[{i + 1}/{len(parts)}] {part.name}: {part.about} (at most {limit_s:.0f} s)", flush=True)
                run(part, {**setting, "describe": not machine}, limit_s, log, found, lambda told: _tell(told, machine))
                print(f"    {_said(found)}", flush=True)
                setting["rates"] = rates(ended)
                write(args.out, machine, args.command, ended)
    except KeyboardInterrupt:
        print("stopped; what there is:", flush=True)
        for found in ended:
            found.words = found.words or ("" if found.how in ("done", "died") else "the run was stopped")
    write(args.out, machine, args.command, ended)
    print(f"\n{text(machine, args.command, ended, brief=True)}\nall of it: {args.out / 'gpu.md'}, gpu.json", flush=True)
    return 0 if well(ended, whole=args.tiny) else 1


def _tell(told: Told, machine: dict[str, Any]) -> None:
    if "row" in told:
        print(f"    {line(told['row'])}", flush=True)
    machine.update(told.get("machine", {}))


def _said(ended: Ended) -> str:
    found = ", ".join(f"{count} {outcome}" for outcome, count in counts(ended).items() if count)
    words = f": {ended.words}" if ended.words else ""
    return f"→ {ended.part} {ended.how} in {ended.seconds:.1f} s{words} ({found or 'no result'})"


class _ask_to_stop:
    """Have SIGTERM end the part and the run as Ctrl-C does, so that there is a summary."""

    def __enter__(self) -> None:
        self.before = signal.signal(signal.SIGTERM, self._stop)

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGTERM, self.before)

    @staticmethod
    def _stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
