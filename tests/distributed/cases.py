"""What the processes of a test do together, each function in all of them."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import nestopt
from nestopt.config import Config
from nestopt.levels import m3, muon
from nestopt.optim.sharded import units
from nestopt.train import engines
from nestopt.train.checkpoints.shards import ShardReader
from nestopt.train.loop import train
from nestopt.train.report.metrics import read
from nestopt.train.run import Run
from nestopt.train.training import Training


def trained(
    config: dict[str, Any], resume: str | None = None, refuse: bool = False, back_to: int | None = None
) -> dict[str, Any]:
    """A run, to its end; its folder is then as it was when this step had been saved, if one is given."""
    run = train(Config.from_data(config), resume=resume, quiet=True).run
    if back_to is not None and int(os.environ["RANK"]) == 0:
        put_back(run.path, back_to)
    dist.barrier()
    return {"folder": str(run.path), "records": read(run.metrics_file)}


def put_back(folder: Path, step: int) -> None:
    """Leave of a folder's checkpoints the one of this step, as the last."""
    for index in folder.glob("checkpoint-*.json"):
        with ShardReader(index) as parts:
            if parts.meta["step"] == step:
                index.replace(folder / "checkpoint.json")
                for path in folder.glob("checkpoint-*"):
                    if path.name not in parts.files:
                        path.unlink()
                return
    raise AssertionError(f"{folder} has no checkpoint of step {step}")


def resumed(config: dict[str, Any], folders: list[str], out: str) -> list[list[float]]:
    """Each folder's checkpoint taken up by one engine, saved again at once beneath `out`, and trained to the end."""
    found = []
    settled = Config.from_data(config)
    for i, folder in enumerate(folders):
        engine = engines.make(settled)
        training = Training(settled, engine, Run(Path(folder)), True)
        copy = Path(out) / str(i)
        engine.checkpoints.save(copy, {"step": training.step, "elapsed": 0.0, "losses": []}, training._own)
        losses = []
        while training.step < settled.train.steps:
            loss, _ = training._update()
            training.step += 1
            losses.append(float(engine.mean(loss)))
        found.append(losses)
    return found


# -- levels ------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """Odd sizes on purpose, so that slices cut through matrices, and the mean loss of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(17, 12)
        self.up = nn.Linear(12, 21)
        self.norm = nn.LayerNorm(21)
        self.down = nn.Linear(21, 12, bias=False)
        self.head = nn.Linear(12, 17)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.down(self.norm(torch.tanh(self.up(x))))
        targets = (tokens * 3 + 1) % 17
        return F.cross_entropy(self.head(x).float().flatten(0, -2), targets.flatten())


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def frozen_net(pattern: str, moved: bool) -> Net:
    """One whose weights of this pattern are not trained, and are elsewhere if `moved`: a checkpoint tells where."""
    model = net()
    for name, param in model.named_parameters():
        if re.search(pattern, name):
            param.requires_grad_(False).add_(0.5 if moved else 0.0)
    return model


def batch(step: int, rank: int, world: int, count: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + step)
    tokens = torch.randint(17, (count, 5), generator=generator)
    return tokens.view(world, count // world, -1)[rank]


def level(spec: Any, steps: int = 5, accumulate: int = 2, **train: Any) -> list[float]:
    """The losses of a level under an engine."""
    config = Config.from_data(
        {
            "data": {"batch": 8},
            "train": {"device": "cpu", "threads": 1, "clip": 0.7, "accumulate": accumulate, **train},
        }
    )
    engine = engines.make(config)
    model = net().to(getattr(torch, config.train.dtype))
    engine.cut_up(model)
    nested = nestopt.optimizer(model, spec, lr=0.05, weight_decay=0.01, rest={"stack": "adamw", "lr": 0.01})
    engine.attach(model, model, nested)
    losses = []
    for step in range(steps):
        loss, _ = engine.update([(part,) for part in batch(step, engine.rank, engine.world).chunk(accumulate)])
        losses.append(float(engine.mean(loss)))
    return losses


def in_rounds(spec: Any, limit: int, **train: Any) -> dict[str, Any]:
    """The losses of a level whose tensors go to their owners in several rounds, and how many there were."""
    before, units.LIMIT = units.LIMIT, limit
    made: list[int] = []
    owned = units.Owned.__init__

    def counted(self: units.Owned, *args: Any, **options: Any) -> None:
        owned(self, *args, **options)
        made.append(len(self.rounds))

    units.Owned.__init__ = counted  # type: ignore[method-assign]
    try:
        return {"losses": level(spec, **train), "rounds": made}
    finally:
        units.LIMIT, units.Owned.__init__ = before, owned  # type: ignore[method-assign]


def iterations(spec: Any, steps: int = 6, **train: Any) -> dict[str, Any]:
    """How many matrices all processes together put through Newton-Schulz in so many steps, by module that asked."""
    counts: Counter[str] = Counter()
    before = {}

    def counting(name: str, run: Any) -> Any:
        def counted(part: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
            counts[name] += x[..., 0, 0].numel()
            return run(part, x, *args, **options)

        return counted

    import sys

    modules = {"muon": sys.modules[muon.__module__], "m3": sys.modules[m3.__module__]}
    for name, module in modules.items():
        before[name] = module.orthogonal  # type: ignore[attr-defined]
        module.orthogonal = counting(name, before[name])  # type: ignore[attr-defined]
    try:
        level(spec, steps, **train)
    finally:
        for name, module in modules.items():
            module.orthogonal = before[name]  # type: ignore[attr-defined]
    found = torch.tensor([counts["muon"], counts["m3"]])
    dist.all_reduce(found)
    return {"muon": int(found[0]), "m3": int(found[1])}


# -- nestopt.train.deepspeed.initialize ----------------------------------------------------------------------------


def initialized(
    spec: Any,
    config: dict[str, Any],
    steps: int = 4,
    accumulate: int = 1,
    cut_from_the_start: bool = False,
    scheduler: bool = False,
    recompute: bool = False,
    frozen: str | None = None,
    saved: str | None = None,
    loaded: str | None = None,
    theirs: bool = False,
    frozen_layer: str | None = None,
    refuse: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A loop as DeepSpeed's users write it."""
    import deepspeed

    from nestopt.train import deepspeed as ours

    ours.import_deepspeed("cpu")
    # DeepSpeed leaves float16 to processors that are fast at it; here it may be slow
    deepspeed.get_accelerator().is_fp16_supported = lambda: True
    micro = 8 // dist.get_world_size() // accumulate
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulate, **config}
    if cut_from_the_start:
        torch.manual_seed(0)
        with deepspeed.zero.Init(config_dict_or_path={**config, "train_batch_size": 8}):
            model = Net()
        whole = net()
        with deepspeed.zero.GatheredParameters(list(model.parameters()), modifier_rank=0):
            for param, other in zip(model.parameters(), whole.parameters(), strict=True):
                param.data.copy_(other.data)
    else:
        model = net() if frozen is None else frozen_net(frozen, moved=not loaded)
    if frozen_layer:
        layer = model.get_submodule(frozen_layer).requires_grad_(False)
        if loaded:  # what it is comes from the checkpoint
            nn.init.zeros_(layer.weight)
    if recompute:
        run = model.up.forward
        model.up.forward = lambda x: torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False)  # type: ignore
    if scheduler:
        options["lr_scheduler"] = lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    engine, optimizer, _, _ = ours.initialize(model, spec, config, **options)
    begin = 0
    if loaded and theirs:
        begin = engine.load_checkpoint(loaded)[1]["step"]
    elif loaded:
        begin = ours.load(engine, loaded)["step"]
    losses = []
    for step in range(begin, steps):
        for part in batch(step, dist.get_rank(), dist.get_world_size()).chunk(accumulate):
            loss = engine(part)
            engine.backward(loss)
            engine.step()
            total = loss.detach().clone()
            dist.all_reduce(total)
            losses.append(float(total) / dist.get_world_size())
    if saved and theirs:
        engine.save_checkpoint(saved, client_state={"step": steps})
    elif saved:
        ours.save(engine, saved, {"step": steps})
    steps_taken = {int(s["step"]) for unit in optimizer.units() for n in unit.inner() for s in n.state.values()}
    return {
        "losses": losses,
        "steps": sorted(steps_taken),
        "lr": optimizer.param_groups[0]["lr"],
        "skipped": engine.skipped_steps,
    }


def flat(spec: Any, stage: int, refuse: bool = True) -> None:
    """A nest given to DeepSpeed as if it were any optimizer."""
    import deepspeed

    from nestopt.train import deepspeed as ours

    ours.import_deepspeed("cpu")
    model = net()
    optimizer = nestopt.optimizer(model, spec, lr=0.05)
    config = {
        "train_micro_batch_size_per_gpu": 8 // dist.get_world_size(),
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    engine.backward(engine(batch(0, dist.get_rank(), dist.get_world_size())))
    engine.step()


def levels_differ(refuse: bool = True) -> None:
    """Each process has a level of its own."""
    from nestopt.train import deepspeed as ours

    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": 1}}
    ours.initialize(net(), {"level": "momentum", "beta": 0.9 if dist.get_rank() else 0.8}, config)
