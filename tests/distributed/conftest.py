"""Starts the processes: one start for each number of them, in which all tests' work is done."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.settings import ENGINES, LEVELS, RUNS, SAVED, STACKS, document_run, run
from tests.train.data.parquet import write_shards

HERE = Path(__file__).parent
Case = tuple[Any, ...]


def torchrun(world: int, *command: object, timeout: int = 900) -> tuple[int, str]:
    """The status and output of a command in so many processes."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            *map(str, command),
        ],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONFAULTHANDLER": "1"},
    )
    return done.returncode, done.stdout + done.stderr


class Together:
    """Jobs of so many processes, and what came of them, by case."""

    def __init__(self, world: int, folder: Path) -> None:
        self.world, self.path = world, folder / f"jobs-{len(list(folder.glob('*.json')))}.json"
        self.cases: list[Case] = []
        self.jobs: list[Any] = []

    def add(self, case: Case, name: str, **arguments: Any) -> None:
        assert case not in self.cases
        self.cases.append(case)
        self.jobs.append([name, arguments])

    def start(self) -> dict[Case, Any]:
        self.path.write_text(json.dumps(self.jobs))
        status, output = torchrun(self.world, HERE / "driver.py", self.path)
        assert status == 0, "\n".join(line for line in output.splitlines()[-150:] if "INFO" not in line)
        return dict(zip(self.cases, json.loads(self.path.with_suffix(".done").read_text()), strict=True))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("levels remember gradients and tokens alike. " * 400)
    return str(path)


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str | None:
    """Documents; None where the extra `data` is not installed."""
    if importlib.util.find_spec("datasets") is None:
        return None
    return str(write_shards(tmp_path_factory.mktemp("shards")))


def saves(out: Path) -> dict[tuple[str, int], str]:
    """The folders of the runs that are saved in the middle, by engine and number of processes."""
    return {(name, world): str(out / f"saved-{name}-{world}" / "001") for world in (1, 2) for name in ENGINES}


INITIALIZED: dict[str, dict[str, Any]] = {
    "plain": {"config": {}},
    "clipped": {"config": {"gradient_clipping": 0.3}},
    "accumulated": {"config": {}, "accumulate": 2},
    "scheduled": {"config": {}, "scheduler": True},
    "recomputed": {"config": {}, "recompute": True},
    "round robin": {"config": {"zero_optimization": {"round_robin_gradients": True}}},
    "small buckets": {"config": {"zero_optimization": {"reduce_bucket_size": 100, "allgather_bucket_size": 100}}},
    "sub-groups": {"config": {"zero_optimization": {"sub_group_size": 100}}},
    "bf16": {"config": {"bf16": {"enabled": True}}},
    "bf16, float32 sums": {"config": {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}},
    "fp16": {"config": {"fp16": {"enabled": True, "initial_scale_power": 4}}},
    "fp16, too large a scale": {"config": {"fp16": {"enabled": True, "initial_scale_power": 19, "hysteresis": 1}}},
}
"""Loops as DeepSpeed's users write them."""

LOOPS = [
    (case, stage)
    for case in INITIALIZED
    for stage in range(4)
    if stage or case not in ("bf16, float32 sums", "fp16", "fp16, too large a scale")  # not as DeepSpeed has stage 0
]

SPEC = {"level": "m3", "slow_period": 2, "dtype": "float32"}
OPTIONS = {"lr": 0.05, "rest": {"stack": "adamw", "lr": 0.01}}

FROZEN = ("norm", "embedding|up.weight", "^(?!head)")
"""What is not trained: vectors, matrices, all but one layer."""

REFUSED: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "another optimizer": (
        "initialized",
        {"config": {"optimizer": {"type": "Adam"}}, "spec": "adam"},
        ["config.optimizer", "the levels are the optimizer"],
    ),
    "NVMe": (
        "initialized",
        {"config": {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme"}}}, "spec": "adam"},
        ["offload_optimizer.device", "nvme", "cpu"],
    ),
    "offloaded matrices": (
        "initialized",
        {"config": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, "spec": "muon"},
        ["offload_optimizer", "muon", "elementwise"],
    ),
    "float16 at stage 0": (
        "initialized",
        {"config": {"fp16": {"enabled": True}}, "spec": "adam"},
        ["fp16", "stage 0", "stage 1 or more"],
    ),
    "inputs in float16": (
        "initialized",
        {"config": {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}, "spec": "dgd"},
        ["fp16", "dgd", "bf16"],
    ),
    "surprise at stage 3": (
        "initialized",
        {"config": {"zero_optimization": {"stage": 3}}, "spec": {"level": "ggd", "objective": "huber"}},
        ["zero_optimization.stage", "ggd", "stage 2"],
    ),
    "a matrix level on a flat slice": ("flat", {"spec": "muon", "stage": 1}, ["muon", "flat slices", "initialize"]),
    "a shaped level on a flat slice": (
        "flat",
        {"spec": "delta_momentum", "stage": 2},
        ["delta_momentum", "flat slices", "initialize"],
    ),
    "levels that differ": ("levels_differ", {}, ["group 0", "process 0", "process 1", "0.8", "0.9"]),
}


@pytest.fixture(scope="session")
def ends(text: str, shards: str | None, out: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Any]:
    """What came of everything."""
    folder = tmp_path_factory.mktemp("jobs")
    found: dict[Case, Any] = {}
    for world in (1, 2):
        now = Together(world, folder)
        for dtype in ("float32", "bfloat16"):
            for kind in RUNS:
                for name, engine in ENGINES.items():
                    now.add(
                        ("same", dtype, kind, name, world),
                        "trained",
                        config=run(kind, text, str(out / "same"), dtype=dtype, **engine),
                    )
        for name, engine in ENGINES.items():
            where = Path(saves(out)[name, world]).parent
            now.add(
                ("whole", name, world),
                "trained",
                config=run("hope", text, str(where), save_every=SAVED, keep=9, **engine),
                back_to=SAVED,
            )
        taken_up = {key: path for key, path in saves(out).items() if key[1] <= world}
        add_resumed(now, text, out, taken_up)
        if world == 2:
            add_of_two(now, text, out)
            if shards:
                add_documents(now, shards, out)
        found |= now.start()
    # and what two saved, by one
    last = Together(1, folder)
    add_resumed(last, text, out, {key: path for key, path in saves(out).items() if key[1] == 2})
    if shards:
        config = document_run("hope", shards, str(out), **ENGINES["zero 1"])
        last.add(("documents", "again"), "trained", config=config, resume=str(out / "documents-zero 3" / "001"))
    return found | last.start()


def add_resumed(now: Together, text: str, out: Path, folders: dict[tuple[str, int], str]) -> None:
    for name, engine in ENGINES.items():
        of = sorted({world for _, world in folders})
        copies = out / f"copies-{name}-{now.world}-of-{of}"
        now.add(
            ("resumed", name, now.world, tuple(folders)),
            "resumed",
            config=run("hope", text, str(out), **engine),
            folders=list(folders.values()),
            out=str(copies),
        )


def add_documents(now: Together, shards: str, out: Path) -> None:
    for name, engine in ENGINES.items():
        for kind in RUNS:
            where = str(out / f"documents-{name}") if kind == "hope" else str(out / "documents")
            config = document_run(kind, shards, where, save_every=SAVED, keep=9, **engine)
            now.add(("documents", kind, name), "trained", config=config, back_to=SAVED)


def add_of_two(now: Together, text: str, out: Path) -> None:
    for level, spec in {**LEVELS, **STACKS}.items():
        for name, engine in ENGINES.items():
            now.add(("level", level, name), "level", spec=spec, **engine)
    for name, engine in ENGINES.items():
        if name not in ("ddp", "zero 0"):
            now.add(("rounds", name), "in_rounds", spec="delta_momentum", limit=100, **engine)
        now.add(("low", name), "level", spec=LEVELS["m3"], dtype="bfloat16", accumulate=4, **engine)
        for level in ("muon", "m3"):
            now.add(("iterations", level, name), "iterations", spec=LEVELS[level], accumulate=1, **engine)
    for case, stage in LOOPS:
        arguments = INITIALIZED[case]
        section = {**arguments["config"].get("zero_optimization", {}), "stage": stage}
        config = {**arguments["config"], "zero_optimization": section}
        now.add(("initialized", case, stage), "initialized", spec=SPEC, **{**arguments, "config": config}, **OPTIONS)
    for stage in (2, 3):
        offloaded = {"zero_optimization": {"stage": stage, "offload_optimizer": {"device": "cpu"}}}
        now.add(("offloaded", stage), "initialized", spec="adam", config=offloaded, lr=0.01)
    zero3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    now.add(("cut", "m3"), "initialized", spec=SPEC, config=zero3, cut_from_the_start=True, **OPTIONS)
    now.add(("cut", "dgd"), "initialized", spec="dgd", config=zero3, cut_from_the_start=True, **OPTIONS)
    now.add(("dgd",), "initialized", spec="dgd", config={"zero_optimization": {"stage": 0}}, **OPTIONS)
    for save, load in ((1, 3), (3, 0), (0, 2)):
        folder = str(out / f"own-{save}-{load}")
        sizes = {"stage3_param_persistence_threshold": 0}
        first, then = ({"zero_optimization": {"stage": stage, **sizes}} for stage in (save, load))
        # a frozen layer; and once in the middle of a period, with half of a period's layer inputs
        half = {"spec": "dgd", "groups": [{"match": "weight", "period": 2}]} if save == 1 else {"spec": SPEC}
        options = {"frozen_layer": "down", **half, **OPTIONS}
        now.add(("saved", save, load), "initialized", config=first, steps=3, saved=folder, **options)
        now.add(("loaded", save, load), "initialized", config=then, steps=6, loaded=folder, **options)
        now.add(("longer", save, load), "initialized", config={}, steps=6, **options)
    for pattern in FROZEN:
        for save, load in ((3, 3), (3, 0), (0, 3), (2, 1)):
            folder = str(out / f"frozen-{pattern[:4]}-{save}-{load}")
            first, then = ({"zero_optimization": {"stage": stage, **sizes}} for stage in (save, load))
            what = {"spec": SPEC, "frozen": pattern, **OPTIONS}
            key = (pattern, save, load)
            now.add(("frozen", "saved", *key), "initialized", config=first, steps=3, saved=folder, **what)
            now.add(("frozen", "loaded", *key), "initialized", config=then, steps=6, loaded=folder, **what)
    for stage in range(4):
        given = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
        folder = str(out / f"theirs-{stage}")
        now.add(
            ("theirs", "saved", stage),
            "initialized",
            spec=SPEC,
            config=given,
            steps=3,
            saved=folder,
            theirs=True,
            **OPTIONS,
        )
        now.add(
            ("theirs", "loaded", stage),
            "initialized",
            spec=SPEC,
            config=given,
            steps=6,
            loaded=folder,
            theirs=True,
            **OPTIONS,
        )
    now.add(("longer",), "initialized", spec=SPEC, config={}, steps=6, **OPTIONS)
    for case, (name, arguments, _) in REFUSED.items():
        now.add(("refused", case), name, refuse=True, **arguments)
