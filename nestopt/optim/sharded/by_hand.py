"""An optimizer for parameters that `fully_shard` has cut up, without an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestopt.optim.optimizer import Nested

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    from nestopt.optim.sharded.optimizer import Sharded


def shard(optimizer: Nested, mesh: DeviceMesh) -> Sharded:
    """Make of an optimizer whose parameters `fully_shard` has cut up one that runs any level on them.

    Levels that work entry by entry run on each process's rows; others on whole tensors, each at one process, its owner,
    which is sent its gradient and values and sends back the new ones. All processes of the mesh call this, after
    `fully_shard`, and then step together.

    Args:
        optimizer: of the model's parameters, not stepped yet; the same in all processes. Not to be stepped itself.
        mesh: the one that `fully_shard` was given, of one dimension.

    Returns:
        An optimizer with the same groups, for loops and schedulers.

    Raises:
        ValueError: another mesh, a parameter that is not cut up by rows over it, or options that each process would
            decide for itself (`on_nonfinite`, `capturable`, `metrics`).
        RuntimeError: the processes have other levels.
    """
    if mesh.ndim != 1:
        raise ValueError(f'mesh has {mesh.ndim} dimensions; give one of one dimension, such as mesh["dp"]')
    # these take longer to import than all of nestopt, and few need them
    from nestopt.optim.sharded.dtensor import placements
    from nestopt.optim.sharded.optimizer import Sharded

    sharded = Sharded(optimizer)
    found = placements(sharded)
    for i, group in enumerate(optimizer.param_groups):
        for name, param in zip(sharded.names[i], group["params"], strict=True):
            if param.device_mesh != mesh:
                raise ValueError(f"{name} lies on {param.device_mesh}, not on the mesh given, {mesh}")
    sharded.attach(found, mesh.get_group())
    return sharded
