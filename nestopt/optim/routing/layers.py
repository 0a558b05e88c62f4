"""How deep in its model a parameter is, for learning rates that fall with the distance from the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from nestopt.optim.routing.roles import EMBEDDINGS, head_of

_LISTS = (nn.ModuleList, nn.Sequential)


def layers(model: nn.Module) -> dict[str, int]:
    """Number the layer of each parameter by name, tied ones once: 0 before the blocks, 1 … n in them, n + 1 after.

    Blocks are what a list (`ModuleList` or `Sequential`) outside of other blocks repeats: its items of the class that
    is most frequent in it. Blocks of several classes are counted on (an encoder's, then a decoder's), but for classes
    with at most half as many blocks as another. Outside of blocks an embedding is in layer 0, the output layer in
    n + 1, and what stands between two blocks (in the order of definition) in the layer of the one before it. With a
    rate lr·decayⁿ⁺¹⁻ⁱ in layer i this is BEiT's layer-wise decay (Bao et al. 2021, arXiv 2106.08254).

    Raises:
        ValueError: no list of the model repeats anything.
    """
    blocks = list(dict.fromkeys(_repeated(model)))
    if not blocks:
        raise ValueError(
            f"layer_decay can't tell the layers of {type(model).__name__}: no ModuleList or Sequential in it repeats "
            "anything; give layer_of, a function from a parameter's name to the number of its layer"
        )
    counts = Counter(map(type, blocks))
    blocks = [block for block in blocks if 2 * counts[type(block)] > max(counts.values())]
    within = _ids((i, block) for i, block in enumerate(blocks, start=1))
    head = head_of(model)[0]
    outside = _ids((0, module) for module in model.modules() if isinstance(module, EMBEDDINGS))
    outside |= {key: len(blocks) + 1 for key in _ids([(0, head)] if head is not None else []) if key not in outside}
    found, block = {}, 0
    for name, param in model.named_parameters():
        if id(param) in within:
            found[name] = block = within[id(param)]
        else:
            found[name] = outside.get(id(param), block if block < len(blocks) else len(blocks) + 1)
    return found


def _repeated(module: nn.Module) -> Iterator[nn.Module]:
    """Yield what lists repeat, in the order of definition; a list that only repeats is looked into instead."""
    children = _children(module)
    counts = Counter(type(child) for child in children if not _repeats_only(child))
    kind, number = counts.most_common(1)[0] if counts and isinstance(module, _LISTS) else (None, 0)
    alone = len(children) == 1 and not isinstance(children[0], _LISTS)
    for child in children:
        if type(child) is kind and not _repeats_only(child) and (number > 1 or alone):
            yield child
        else:
            yield from _repeated(child)


def _repeats_only(module: nn.Module) -> bool:
    children = _children(module)
    return isinstance(module, _LISTS) and len(children) > 1 and len(set(map(type, children))) == 1


def _children(module: nn.Module) -> list[nn.Module]:
    """Return the children that have parameters."""
    return [child for child in module.children() if next(child.parameters(), None) is not None]


def _ids(numbered: Iterable[tuple[int, nn.Module]]) -> dict[int, int]:
    """Return, by the id of each parameter, the number of the first module that holds it."""
    found: dict[int, int] = {}
    for number, module in numbered:
        for param in module.parameters():
            found.setdefault(id(param), number)
    return found
