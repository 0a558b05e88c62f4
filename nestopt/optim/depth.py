"""How deep in its model a parameter is, for learning rates that fall with the distance from the output."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from torch import nn

from nestopt.optim.roles import EMBEDDINGS, head_of

_LISTS = (nn.ModuleList, nn.Sequential)


def layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by name, tied ones once: 0 before the blocks, 1 … n in them, n + 1 after.

    Blocks are the modules of the class that stands most often in the model's `ModuleList`s and `Sequential`s (not in
    those within a block). Outside of them an embedding is in layer 0, the output layer in n + 1, and what stands
    between two blocks (in the order of definition) in the layer of the one before it. With a rate lr·decayⁿ⁺¹⁻ⁱ in
    layer i this is BEiT's layer-wise decay (Bao et al. 2021, arXiv 2106.08254).

    Raises:
        ValueError: the model has no such list.
    """
    counts = Counter(type(module) for module in _items(model))
    if not counts:
        raise ValueError(
            f"layer_decay can't tell the layers of {type(model).__name__}: no ModuleList or Sequential in it; "
            "give layer_of, a function from a parameter's name to the number of its layer"
        )
    kind = max(counts, key=lambda cls: counts[cls])  # of equals the first, which is the outermost
    blocks = list(dict.fromkeys(module for module in _items(model, kind) if type(module) is kind))
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


def _items(module: nn.Module, kind: type | None = None) -> Iterator[nn.Module]:
    """What stands in lists, with parameters: the outermost, and in lists within lists unless these are of `kind`."""
    for child in module.children():
        if isinstance(module, _LISTS) and next(child.parameters(), None) is not None:
            yield child
            if type(child) is kind or not isinstance(child, _LISTS):
                continue
        yield from _items(child, kind)


def _ids(numbered: Iterable[tuple[int, nn.Module]]) -> dict[int, int]:
    """The number of the first module that holds it, of each parameter by id."""
    found: dict[int, int] = {}
    for number, module in numbered:
        for param in module.parameters():
            found.setdefault(id(param), number)
    return found
