r"""Values that a memory makes for itself, bounded: what self-modifying memories need so as not to diverge.

A memory M that is to answer $k_t$ with its own $\hat v = M(v_t)$, where $v_t = M_v(v)$ is made by a memory that learns
likewise, chases itself. Say that M maps a direction, in which keys lie and values, too, to itself times a: then it is
to answer a key of length 1 with $a^2\lVert v\rVert$, and a grows without bound as soon as $a\lVert v\rVert > 1$ (with a
delta decay of strength δ, as soon as it is above 1 + δ), however short the steps are. The normalised step
(`nestopt.levels.deep.step_size`) is of no help: it bounds what is learned of given values. Constant, alternating and
random tokens with a mean all have such a direction, and made memories infinite within a few hundred tokens.

So a value is cut to the length of what it is made of, $\lVert v_t\rVert \le \lVert v\rVert$ and
$\lVert\hat v\rVert \le \lVert v_t\rVert$. All memories then learn values no longer than those of the data, as others
do, and the step bounds what comes of that.
"""

from __future__ import annotations

from torch import Tensor


def bounded(y: Tensor, x: Tensor) -> Tensor:
    """y `[.., D]`, no longer than x `[.., D]`."""
    most, length = (z.square().sum(-1, keepdim=True) + _TINY for z in (x, y))
    return y * (most / length).clamp_max(1.0).sqrt()


_TINY = 1e-12
"""Under both squares: of two vectors of zeros neither is the longer."""
