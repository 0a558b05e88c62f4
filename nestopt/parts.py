"""The parts of memories: where pairs are kept, what is minimised and forgotten, how keys and reads are made."""

from nestopt.core.features import Elu, Features, Identity, Polynomial
from nestopt.core.memories import Matrix, Memory, Mlp, Vector, Window
from nestopt.core.objectives import L2, Dot, Huber, Lp, Objective, Oja
from nestopt.core.outputs import Output, Plain, RmsNorm, Sign
from nestopt.core.retentions import Decay, Keep, Retention
from nestopt.levels.gradient.muon import NewtonSchulzOutput
from nestopt.levels.gradient.preconditioned import SignedPower

__all__ = [
    "L2",
    "Decay",
    "Dot",
    "Elu",
    "Features",
    "Huber",
    "Identity",
    "Keep",
    "Lp",
    "Matrix",
    "Memory",
    "Mlp",
    "NewtonSchulzOutput",
    "Objective",
    "Oja",
    "Output",
    "Plain",
    "Polynomial",
    "Retention",
    "RmsNorm",
    "Sign",
    "SignedPower",
    "Vector",
    "Window",
]
