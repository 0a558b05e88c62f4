"""The parts of memories: where pairs are kept, what is minimised and forgotten, how keys and reads are made."""

from nestopt.core.features import Elu, Features, Identity, Polynomial, Random
from nestopt.core.memories import Factored, Matrix, Memory, Mlp, Swiglu, Vector, Window
from nestopt.core.objectives import L2, Dot, Huber, Lp, Objective, Oja
from nestopt.core.outputs import Output, Plain, RmsNorm, Sign
from nestopt.core.retentions import Decay, ElasticNet, Keep, Kl, Lq, Retention
from nestopt.levels.gradient.muon import NewtonSchulzOutput
from nestopt.levels.gradient.preconditioned import SignedPower

__all__ = [
    "L2",
    "Decay",
    "Dot",
    "ElasticNet",
    "Elu",
    "Factored",
    "Features",
    "Huber",
    "Identity",
    "Keep",
    "Kl",
    "Lp",
    "Lq",
    "Matrix",
    "Memory",
    "Mlp",
    "NewtonSchulzOutput",
    "Objective",
    "Oja",
    "Output",
    "Plain",
    "Polynomial",
    "Random",
    "Retention",
    "RmsNorm",
    "Sign",
    "SignedPower",
    "Swiglu",
    "Vector",
    "Window",
]
