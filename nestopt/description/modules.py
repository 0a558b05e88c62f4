"""Memories of a module: those that learn from token to token, and its weights by the kind of module that holds them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from nestopt.core.level import Level
from nestopt.core.tree import leaves
from nestopt.description import stacks
from nestopt.description.memory import WEIGHTS, Memory
from nestopt.description.optimizers import Family
from nestopt.levels.continuum.level import Auto, Cms, ticks_of
from nestopt.models.stacking import Stacked
from nestopt.nn.cms import CMS
from nestopt.nn.sequence_memory import SequenceMemory

RECURRENT = (nn.RNNBase, nn.RNNCellBase)
KINDS: tuple[tuple[str, tuple[type[nn.Module], ...], str], ...] = (
    ("embedding", (nn.Embedding, nn.EmbeddingBag), "Embedding"),
    ("recurrent", RECURRENT, ""),
    ("linear", (nn.Linear, nn.Bilinear), "Linear"),
    ("conv", (nn.modules.conv._ConvNd,), ""),
    ("norm", (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase), "Norm"),
)
"""Kinds of weights: their name, the classes that hold them, and how the names of other such classes end."""
OUTSIDE, OTHER = "outside the module", "other"


def level_of(module: nn.Module) -> Level | None:
    """Return the level that a layer of nestopt's, or one like it, runs on tokens."""
    level = getattr(module, "level", None)
    return level if isinstance(level, Level) else None


# -- memories of tokens ------------------------------------------------------------------------------------------------


def token_memories(module: nn.Module) -> tuple[list[Memory], list[str]]:
    """Return every memory that is updated as tokens pass, by its path, and notes."""
    found: list[Memory] = []
    by_name: dict[str, None] = {}
    holders: list[str] = []
    empty: list[str] = []
    for path, inner in module.named_modules():
        if any(path.startswith(f"{holder}.") or not holder for holder in holders):
            continue
        name, level = path or type(inner).__name__, level_of(inner)
        memories: list[Memory] = []
        if level is not None:
            if isinstance(inner, CMS) and inner.learns:
                memories = _continuum(inner, name)
            elif isinstance(level, Cms) or _wraps(inner, level):
                continue  # a static continuum learns as weights do; a wrapper's level is its inner module's
            else:
                memories = stacks.memories(level, name, "tokens", _sizes(inner, level, name))
                empty += stacks.keeps_nothing(level, name, memories)
        elif isinstance(inner, nn.MultiheadAttention):
            memories = [_attention(name)]
        elif isinstance(inner, RECURRENT):
            memories = [_recurrent(inner, name)]
        elif _is_attention(inner) and not any(_is_memory(below) for below in inner.modules() if below is not inner):
            memories = [_attention(name)]
            by_name[type(inner).__name__] = None
        if memories:
            holders.append(path)
            found += memories
    return found, [
        *(
            f"{cls} is taken for softmax attention over all tokens by its class name; what it computes was not looked "
            "at."
            for cls in by_name
        ),
        *dict.fromkeys(empty),
        *_forms(module),
        *_precisions(module),
    ]


def _forms(module: nn.Module) -> list[str]:
    """Which form runs each memory on tokens; of those that the reference machine runs, also why."""
    found: list[str] = []
    for inner in module.modules():
        if isinstance(inner, SequenceMemory):
            first, *more = inner.form.explain()
            found += [first, *(more if "reference" in inner.explain() else [])]
    return [line.strip() for line in dict.fromkeys(found)]


def _precisions(module: nn.Module) -> list[str]:
    """Return what is said of products of memories that are not made in float32."""
    found: dict[str, list[str]] = {}
    for path, inner in module.named_modules():
        if isinstance(inner, SequenceMemory | CMS | Stacked):
            found.setdefault(inner.precision, []).append(path or type(inner).__name__)
    return [
        f"Products of {'all memories' if len(found) == 1 else ', '.join(names)} are made in {precision}; "
        "their states and sums are float32."
        for precision, names in found.items()
        if precision != "float32"
    ]


def _is_attention(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Attention")


def _is_memory(module: nn.Module) -> bool:
    known = isinstance(module, (nn.MultiheadAttention, *RECURRENT))
    return known or _is_attention(module) or level_of(module) is not None


def _wraps(module: nn.Module, level: Level) -> bool:
    return any(below is not module and level_of(below) is level for below in module.modules())


def _continuum(module: CMS, name: str) -> list[Memory]:
    """Return the levels of a continuum in context, which writes at its periods."""
    level, state = module.level, module.init_state(1)
    objective = "the model's loss" if module.taught else "l2"
    found = []
    for key, period in level.chain().items():
        kept = [leaf for _, leaf in leaves(state["levels"][key])]
        rule = level.learner.label + (" if surprised" if isinstance(period, Auto) else "")
        numbers, size = sum(x.numel() for x in kept), sum(x.numel() * x.element_size() for x in kept)
        memory = level.block(module.dim).label
        found.append(Memory(f"{name}.{key}", "tokens", ticks_of(period), memory, objective, rule, numbers, size))
    return found


def _attention(name: str) -> Memory:
    return Memory(name, "tokens", 1, "window", "softmax regression", "append", grows=True)


def _recurrent(module: nn.Module, name: str) -> Memory:
    dtype = next(module.parameters()).dtype
    if isinstance(module, nn.RNNBase):
        rule, hidden, states = module.mode.lower(), module.proj_size or module.hidden_size, module.num_layers
        cell = module.hidden_size if isinstance(module, nn.LSTM) else 0
        states *= 2 if module.bidirectional else 1
    else:
        assert isinstance(module, nn.RNNCellBase)
        rule, hidden, states = type(module).__name__.removesuffix("Cell").lower(), module.hidden_size, 1
        cell = hidden if isinstance(module, nn.LSTMCell) else 0
    numbers = states * (hidden + cell)
    return Memory(name, "tokens", 1, "vector", "", rule, numbers, numbers * dtype.itemsize)


def _sizes(module: nn.Module, level: Level, name: str) -> stacks.Sizes | None:
    """Measure the memories of one sequence, where the module says how many heads of which size it has."""
    width, heads = getattr(module, "dim_head", None), getattr(module, "heads", None)
    if not (isinstance(width, int) and isinstance(heads, int)):
        return None
    dtype = next((param.dtype for param in module.parameters()), None)
    state = stacks.begin(level, (width, width), "tokens", dtype)
    return {key: size.times(heads) for key, size in stacks.measure(level, name, state).items()}


# -- weights -----------------------------------------------------------------------------------------------------------


def kinds_of_weights(module: nn.Module) -> dict[Tensor, str]:
    """Return the kind of every parameter, tied ones once, in the order of the module."""
    found: dict[Tensor, str] = {}
    for param, kind in _walk(module, ""):
        found.setdefault(param, kind)
    return found


def _walk(module: nn.Module, above: str) -> Iterator[tuple[Tensor, str]]:
    kind = above or _holder(module)
    for param in module.parameters(recurse=False):
        yield param, kind or _kind(module)
    for child in module.children():
        yield from _walk(child, kind)


def _holder(module: nn.Module) -> str:
    """Return the kind of all weights within a module that is a memory of tokens as a whole."""
    level = level_of(module)
    if level is not None and not _wraps(module, level):
        return "cms" if isinstance(level, Cms) else f"{level.label} layers"
    attention = isinstance(module, nn.MultiheadAttention) or _is_attention(module)
    return "attention" if attention else ""


def _kind(module: nn.Module) -> str:
    for kind, classes, ending in KINDS:
        if isinstance(module, classes) or (ending and type(module).__name__.endswith(ending)):
            return kind
    return OTHER


def weights(kinds: dict[Tensor, str], families: Sequence[Family]) -> list[Memory]:
    """Return a memory for each kind of weights and family of the optimizer that trains them; others are fixed."""
    owner = {param: family for family in families for param in family.params}
    parts: dict[tuple[str, str], list[Tensor]] = {}
    for param in dict.fromkeys([*kinds, *owner]):
        family = owner.get(param)
        parts.setdefault((kinds.get(param, OUTSIDE), family.name if family else ""), []).append(param)
    by_name = {family.name: family for family in families}
    together = [kind for kind, _ in parts]
    found = []
    for (kind, owned_by), params in parts.items():
        name = f"weights: {kind}" if kinds else WEIGHTS
        if together.count(kind) > 1:
            name += f" ({owned_by or 'not trained'})"
        found.append(_weights(name, params, by_name.get(owned_by)))
    return found


def _weights(name: str, params: Sequence[Tensor], family: Family | None) -> Memory:
    if any(isinstance(param, UninitializedParameter) for param in params):
        raise ValueError(f"{name}: lazy parameters have no shape yet; pass a batch through the module first")
    numbers = sum(param.numel() for param in params)
    held = sum(param.numel() * param.element_size() for param in params)
    if family is None:
        return Memory(name, "gradients", None, WEIGHTS, parameters=numbers, state=held)
    needs = tuple(memory.name for memory in family.memories)
    return Memory(name, "gradients", family.period, WEIGHTS, "the loss", family.rule, numbers, held, needs)
