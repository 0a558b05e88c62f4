"""What tests of precision look at: the products that reach torch."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nestopt.core.precision import tf32_is_on


class Products(TorchDispatchMode):
    """The dtypes of the factors of all products that are dispatched, `"tf32"` where torch's switch says so."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("mm", "bmm", "addmm", "baddbmm", "baddbmm_", "dot", "mv"):
            factors = [x for x in args if isinstance(x, Tensor)][-2:]
            short = {str(x.dtype).removeprefix("torch.") for x in factors}
            self.seen.append("tf32" if short == {"float32"} and tf32_is_on() else "/".join(sorted(short)))
        return func(*args, **(kwargs or {}))
