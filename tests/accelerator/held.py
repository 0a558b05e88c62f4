"""Running code by an accelerator's rules: once as it comes, which makes what is made once, and then held to them."""

from __future__ import annotations

from collections.abc import Callable

from nestopt.testing import accelerator_rules


def held(run: Callable[[], object]) -> None:
    run()
    with accelerator_rules():
        run()
