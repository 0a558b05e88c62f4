"""A fair sample of what was read, in a limited room."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Replay:
    """A buffer of vectors of each sequence of a batch, for `nestopt.nn.consolidate`.

    Once full, it is a fair sample of all that was added (Vitter's reservoir, algorithm R): each of t vectors is in it
    with probability size / t.

    Args:
        size: vectors kept of each sequence, 1 or more. It never holds more.
        seed: of the choices.
    """

    def __init__(self, size: int, seed: int = 0) -> None:
        if size < 1:
            raise ValueError(f"Replay: size={size} is not allowed; give a whole number of vectors, 1 or more")
        self.size = size
        self.kept: Tensor | None = None
        self.seen = 0
        self._generator = torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        """Return how many vectors of each sequence there are."""
        return min(self.seen, self.size)

    @torch.no_grad()
    def add(self, x: Tensor) -> None:
        """Take in x `[B, n, dim]`.

        Raises:
            ValueError: if the batch or the width is not that of what is there.
        """
        if x.ndim != 3 or (self.kept is not None and (x.shape[0], x.shape[2]) != self.kept.shape[::2]):
            wanted = "[B, n, dim]" if self.kept is None else f"[{self.kept.shape[0]}, n, {self.kept.shape[2]}]"
            raise ValueError(f"Replay.add: x has the shape {list(x.shape)}; it must be {wanted}")
        batch, n, dim = x.shape
        if self.kept is None:
            self.kept = x.new_zeros(batch, self.size, dim)
        number = torch.arange(self.seen, self.seen + n)
        drawn = (torch.rand(batch, n, generator=self._generator, dtype=torch.float64) * (number + 1)).long()
        slot = torch.where(number < self.size, number, drawn)
        # the last that comes to a slot stays there; those beyond the end go to a slot that is thrown away
        slot = slot.clamp_max(self.size)
        last = torch.full((batch, self.size + 1), -1).scatter_reduce(1, slot, torch.arange(n).expand(batch, n), "amax")
        last = last[:, : self.size].to(x.device)
        came = x.detach().gather(1, last.clamp_min(0)[..., None].expand(-1, -1, dim))
        self.kept = torch.where((last >= 0)[..., None], came, self.kept)
        self.seen += n

    def vectors(self) -> Tensor:
        """Return all that is kept, `[B, len(self), dim]`. Raises ValueError where there is nothing."""
        if self.kept is None or not self.seen:
            raise ValueError("Replay is empty; add what was read first")
        return self.kept[:, : len(self)]

    def state_dict(self) -> dict[str, Tensor]:
        """Plain tensors, from which it goes on as if it had not stopped."""
        kept = torch.zeros(0, 0, 0) if self.kept is None else self.kept.clone()
        return {"kept": kept, "seen": torch.tensor(self.seen), "random": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state_dict` gave. Raises ValueError if that is of another size."""
        kept = state["kept"]
        if kept.numel() and kept.shape[1] != self.size:
            raise ValueError(f"Replay: the state is of size={kept.shape[1]}, and this one of size={self.size}")
        self.kept = kept.clone() if kept.numel() else None
        self.seen = int(state["seen"])
        self._generator.set_state(state["random"])
