"""Plans as text."""

from __future__ import annotations

from collections.abc import Sequence

from nestopt.models.cost import Cost
from nestopt.train.planning.ranks import Simulation
from nestopt.train.planning.scale import GIGA, TERA, Scale
from nestopt.train.tables import grid

_SENT = {
    "gradients": "gradients, added up over GPUs",
    "weights": "weights, gathered",
    "owners": "gradients and masters to owners, and back",
}


def scale_table(plan: Scale) -> str:
    """Return all of a plan, with what is counted and what is assumed."""
    sharing, memory, gpu = plan.sharing, plan.memory, plan.gpu
    each = f"{plan.rows} x {plan.window:,} tokens"
    passes = "" if sharing.accumulate == 1 else f", {sharing.accumulate} micro-batches a step"
    written = "; mixers only write" if plan.learn == "mixer" else ""
    lines = [
        f"{plan.parameters:,} parameters, {str(sharing.dtype).removeprefix('torch.')}; {sharing} on {sharing.world} "
        f"GPU{'s' if sharing.world > 1 else ''}, {each} on each{passes}{written}",
        "",
        "memory of a GPU",
        *_column(
            [
                ("weights", _gb(memory.weights)),
                ("gradients", _gb(memory.gradients)),
                ("optimizer: states", _gb(memory.states)),
                ("optimizer: float32 masters", _gb(memory.masters)),
                ("buffers for sending", _gb(memory.buffers)),
                ("fast weights: states of the sequences", _gb(memory.fast)),
                ("activations, at the peak of the pass", _gb(memory.activations)),
                ("work space of the optimizer's step", _gb(memory.work)),
                ("at a time: in the pass", _gb(memory.in_pass)),
                ("at a time: in the step", _gb(memory.in_step)),
                (_fits(plan), _gb(memory.total)),
            ]
        ),
        "",
        *_times(plan),
        "",
        "sent by a GPU in a step",
        *_column([(_SENT[name], _gb(size)) for name, size in plan.sent.items()]),
        "",
        "Counted, on tensors without data, as an accelerator would do it: weights, gradients, states, masters, fast",
        "weights, activations, work space; launches, bytes and products, those done again too. Assumed: that launches,",
        "bytes, products and sending go on side by side, each at its rate, and the engine's buffers and collectives",
        f"(rings). Rates: {gpu.rates.source}.",
    ]
    return "\n".join(lines)


def _times(plan: Scale) -> list[str]:
    """Return what a step does, how fast, and what then takes longest."""
    passes, step, rates, times = plan.passes, plan.step, plan.gpu.rates, plan.times
    dtypes = sorted({**passes.products, **step.products})
    rows: list[tuple[str, str, str, str, float]] = [
        ("launches", f"{passes.ops:,}", f"{step.ops:,.0f}", f"{rates.per_launch_s * 1e6:.1f} µs", times["launches"]),
        ("bytes moved", _moved(passes.bytes), _moved(step.bytes), f"{_moved(rates.bytes_per_s)}/s", times["bytes"]),
    ]
    for dtype in dtypes:
        one, other = (Cost({dtype: cost.products.get(dtype, 0)}) for cost in (passes, step))
        rate = f"{rates.flops_per_s[rates.dtype(dtype)] / TERA:.1f} TFLOP/s"
        taken = rates.seconds(one + other)["products"]
        of_each = [f"{cost.flops / TERA:.2f} TFLOP" for cost in (one, other)]
        rows.append((f"products in {dtype}", of_each[0], of_each[1], rate, taken))
    if len(dtypes) > 1:
        rows.append(("products together", "", "", "", times["products"]))
    lines = [
        (f"a step at the least: {plan.binding} bind", f"{plan.seconds:.3f} s"),
        ("all GPUs, at the most", f"{plan.tokens_per_second:,.0f} tokens/s"),
        (f"the run of {plan.tokens:,} tokens, at the least", f"{plan.days:.2f} days"),
    ]
    if plan.binding == "launches":
        rest = max((name for name in times if name != "launches"), key=times.__getitem__)
        lines.insert(1, (f"launches aside, as in a CUDA graph or compiled: {rest} bind", f"{times[rest]:.3f} s"))
    head = ("time of a GPU and step", "forward, backward", "optimizer", "at", "takes")
    table = [head, *((*row[:-1], f"{row[-1]:.3f} s") for row in rows)]
    width = max(len(row[0]) for row in table) + 2
    indented = [(f"{'  ' if i else ''}{row[0]}".ljust(width), *row[1:]) for i, row in enumerate(table)]
    return [*grid(indented), *_column(lines)]


def _moved(size: float) -> str:
    return f"{size / GIGA:,.1f} GB"


def _fits(plan: Scale) -> str:
    verdict = "fits" if plan.memory.total <= plan.gpu.memory * GIGA else "does not fit"
    return f"at the most; {verdict} in {plan.gpu.memory:g} GB"


def ranks_table(found: Simulation) -> str:
    """Return one line a process, and how even they are."""
    lines: list[tuple[str, ...]] = [("rank", "tensors", "cost", "GFLOP", "states", "sent", "received")]
    for i, rank in enumerate(found.ranks):
        lines.append(
            (
                str(i),
                str(len(rank.owned)),
                f"{rank.cost / GIGA:.1f}",
                f"{rank.flops / GIGA:.1f}",
                _gb(rank.states),
                _gb(rank.sent),
                _gb(rank.received),
            )
        )
    uneven = [f"{found.uneven(name):.3f}" for name in ("cost", "flops", "states", "sent", "received")]
    lines.append(("max/mean", "", *uneven))
    return "\n".join([f"owners of {len(found.owner)} whole tensors", *grid(lines)])


def _column(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [f"  {line}" for line in grid(rows, left=1)]


def _gb(size: float) -> str:
    return f"{size / GIGA:.3f} GB"
