"""Ways of running one level over many tensors at once: a lane is a set of tensors that go the same way together."""

from nestopt.optim.lanes.choose import lanes_for
from nestopt.optim.lanes.lane import STEP, SUM, Lane, Member, Rates, check_shape, placed

__all__ = ["STEP", "SUM", "Lane", "Member", "Rates", "check_shape", "lanes_for", "placed"]
