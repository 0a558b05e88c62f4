"""Draws the pictures of levels in the guide, from what `nestopt.describe` says. Run `python docs/figures/levels.py`."""

from __future__ import annotations

from pathlib import Path

import nestopt
from nestopt.description import Description
from nestopt.levels import adam, momentum, muon, titans

STATIC = Path(__file__).parents[1] / "_static"


def adam_twice() -> Description:
    """Adam trains a layer whose memory is written by Adam."""
    layer = nestopt.layer(titans(rule=adam(), step_size=0.01), dim=64)
    return nestopt.describe(layer, nestopt.optimizer(layer, adam()))


def stack() -> Description:
    """The stack of the page on composing."""
    both = nestopt.parallel(fast=muon(), slow=muon(period=16), weights=[1.0, 0.5])
    return nestopt.describe(nestopt.chain(smooth=momentum(0.9), both=both), shape=(64, 64))


def main() -> None:
    for name, description in {"levels-adam-twice": adam_twice(), "levels-stack": stack()}.items():
        (STATIC / f"{name}.svg").write_text(description.to_svg(), encoding="utf-8")


if __name__ == "__main__":
    main()
