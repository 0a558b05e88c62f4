"""`describe`: from any level, optimizer or module to its levels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.optim import Optimizer

from nestopt.core.level import Level
from nestopt.description import modules, optimizers, stacks
from nestopt.description.description import Description
from nestopt.description.memory import Context


def describe(
    thing: Level | Optimizer | nn.Module,
    optimizer: Optimizer | None = None,
    *,
    shape: Sequence[int] | None = None,
    context: Context = "gradients",
) -> Description:
    """Describe a thing: its memories, sorted into levels by how often they learn (NL Def. 2).

    * of a level, or a stack of them: its memories;
    * of an optimizer, nestopt's or any other: what it keeps of the gradients, and the weights that it moves;
    * of a module: what is updated as tokens pass (levels in it, attention, recurrent states), and its weights by the
      kind of module that holds them: fixed, or at the frequency of their group in `optimizer`.

    Args:
        thing: what to describe. It is not changed, and need not have run.
        optimizer: of the module's parameters; only with a module.
        shape: of one parameter `(out, in)` (on tokens: values and keys of one head, `(D_v, D_k)`), to have the sizes of
            a level's memories; only with a level. Default: sizes are left out.
        context: whether a level is described as it runs on `"gradients"` (default) or on `"tokens"`; only with a level.

    Raises:
        TypeError: `thing` is none of these, or is given with an argument that belongs to another.
        ValueError: `context` is neither of the two; `shape` is not two sizes on tokens; a module has lazy parameters.

    >>> from nestopt.levels import adam
    >>> print(describe(adam()))
    adam
    ───────────────────────────────────────────────────────────
    level  name             frequency   memory  objective  rule
    ───────────────────────────────────────────────────────────
    1      adam.exp_avg     every step  vector  l2 to g    adam
           adam.exp_avg_sq  every step  vector  l2 to g²   adam
    ───────────────────────────────────────────────────────────
    2 memories on 1 level
    """
    if not isinstance(thing, Level | Optimizer | nn.Module):
        raise TypeError(f"describe: {thing!r} is not a level, a torch optimizer or a torch module")
    if optimizer is not None and not isinstance(thing, nn.Module):
        raise TypeError(f"describe: optimizer= goes with a module, and {type(thing).__name__} is none")
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"describe: optimizer={optimizer!r} is not a torch optimizer")
    if not isinstance(thing, Level) and (shape is not None or context != "gradients"):
        raise TypeError(f"describe: shape= and context= go with a level; {type(thing).__name__} has its own")
    if isinstance(thing, Level):
        return _level(thing, shape, context)
    return _module(thing, optimizer) if isinstance(thing, nn.Module) else _optimizer(thing)


def _level(level: Level, shape: Sequence[int] | None, context: Context) -> Description:
    if context not in ("gradients", "tokens"):
        raise ValueError(f"describe: context={context!r} is not allowed; give 'gradients' or 'tokens'")
    if shape is not None and context == "tokens" and len(shape) != 2:
        raise ValueError(f"describe: shape={tuple(shape)} is not allowed on tokens; give (D_v, D_k)")
    sizes = None if shape is None else stacks.measure(level, level.label, stacks.begin(level, shape, context))
    found = stacks.memories(level, level.label, context, sizes)
    return Description.of(stacks.words(level), found, stacks.keeps_nothing(level, level.label, found))


def _optimizer(optimizer: Optimizer) -> Description:
    families, notes = optimizers.families(optimizer)
    memories = [memory for family in families for memory in family.memories]
    return Description.of(type(optimizer).__name__, [*modules.weights({}, families), *memories], notes)


def _module(module: nn.Module, optimizer: Optimizer | None) -> Description:
    tokens, notes = modules.token_memories(module)
    taken = {name for name, _ in module.named_children()} | {type(module).__name__}
    families, said = optimizers.families(optimizer, taken) if optimizer is not None else ([], [])
    title = type(module).__name__ + (f" + {type(optimizer).__name__}" if optimizer is not None else "")
    learned = [memory for family in families for memory in family.memories]
    weights = modules.weights(modules.kinds_of_weights(module), families)
    return Description.of(title, [*weights, *learned, *tokens], [*notes, *said])
