"""The built-in levels, by the names of configs: `nestopt.levels.momentum(0.9)`. Levels of plugins are here too."""

from __future__ import annotations

from nestopt.core import features, memories, objectives, outputs, retentions
from nestopt.core.associative import AssociativeMemory as associative_memory
from nestopt.core.associative import Gd as gd
from nestopt.core.compose import Chain, Parallel
from nestopt.core.hookspecs import Register, hookimpl
from nestopt.core.level import Level
from nestopt.core.nesting import Nest
from nestopt.core.registry import UnknownName, registry
from nestopt.core.token_composition import ChainForm, NestForm, ParallelForm
from nestopt.core.token_reference import ReferenceForm
from nestopt.levels.attention.forgetting import ForgettingAttentionForm
from nestopt.levels.attention.form import AttentionForm
from nestopt.levels.attention.level import ForgettingAttention as forgetting_attention
from nestopt.levels.continuum.level import Cms as cms
from nestopt.levels.continuum.log_linear import LogLinear as log_linear
from nestopt.levels.continuum.log_linear import LogLinearForm
from nestopt.levels.deep.architectures import Mac as mac
from nestopt.levels.deep.architectures import Mag as mag
from nestopt.levels.deep.architectures import Mal as mal
from nestopt.levels.deep.form import DeepMemoryForm
from nestopt.levels.deep.level import Atlas as atlas
from nestopt.levels.deep.level import Dla as dla
from nestopt.levels.deep.level import Memora as memora
from nestopt.levels.deep.level import Moneta as moneta
from nestopt.levels.deep.level import Titans as titans
from nestopt.levels.deep.level import Ttt as ttt
from nestopt.levels.deep.level import Yaad as yaad
from nestopt.levels.deep.rule_form import RuleByChunkForm
from nestopt.levels.gradient.adam import Adam as adam
from nestopt.levels.gradient.adam import AdamW as adamw
from nestopt.levels.gradient.average import Average as average
from nestopt.levels.gradient.dgd import Dgd as dgd
from nestopt.levels.gradient.dgd import Ggd as ggd
from nestopt.levels.gradient.ftrl import Ftrl as ftrl
from nestopt.levels.gradient.links import Cautious as cautious
from nestopt.levels.gradient.links import Centralize as centralize
from nestopt.levels.gradient.links import Clip as clip
from nestopt.levels.gradient.links import GradientCorrection as gradient_correction
from nestopt.levels.gradient.links import Normalize as normalize
from nestopt.levels.gradient.links import Sign as sign
from nestopt.levels.gradient.links import TrustRatio as trust_ratio
from nestopt.levels.gradient.links import WeightDecay as weight_decay
from nestopt.levels.gradient.m3 import M3 as m3
from nestopt.levels.gradient.momentum import DeltaMomentum as delta_momentum
from nestopt.levels.gradient.momentum import Momentum as momentum
from nestopt.levels.gradient.muon import Muon as muon
from nestopt.levels.gradient.muon import NewtonSchulz as newton_schulz
from nestopt.levels.gradient.muon import NewtonSchulzOutput
from nestopt.levels.gradient.preconditioned import FeatureMomentum as feature_momentum
from nestopt.levels.gradient.preconditioned import PreconditionedMomentum as preconditioned_momentum
from nestopt.levels.gradient.preconditioned import SignedPower
from nestopt.levels.gradient.recipes import Adamuon as adamuon
from nestopt.levels.gradient.recipes import Grokfast as grokfast
from nestopt.levels.gradient.recipes import Lamb as lamb
from nestopt.levels.gradient.recipes import LionChain as lion_chain
from nestopt.levels.gradient.recipes import Mars as mars
from nestopt.levels.gradient.recipes import Normuon as normuon
from nestopt.levels.gradient.regression import RegressionOptimum as regression_optimum
from nestopt.levels.gradient.second_moment import SecondMoment as second_moment
from nestopt.levels.gradient.shampoo import MatrixAdagrad as matrix_adagrad
from nestopt.levels.gradient.shampoo import Shampoo as shampoo
from nestopt.levels.gradient.soap import Soap as soap
from nestopt.levels.listing import names as list  # noqa: F401  # not in __all__, whose names are all levels
from nestopt.levels.matrix.additive import Hgrn2 as hgrn2
from nestopt.levels.matrix.additive import Hgrn2Form, Rwkv6Form
from nestopt.levels.matrix.additive import Rwkv6 as rwkv6
from nestopt.levels.matrix.corrective import Comba as comba
from nestopt.levels.matrix.corrective import CombaForm, Rwkv7Form
from nestopt.levels.matrix.corrective import Rwkv7 as rwkv7
from nestopt.levels.matrix.delta_product import Deltaproduct as deltaproduct
from nestopt.levels.matrix.delta_product import DeltaproductForm
from nestopt.levels.matrix.form import DeltaRuleForm, LinearAttentionForm, OjaForm, OmegaForm
from nestopt.levels.matrix.level import Omega as omega
from nestopt.levels.matrix.mesa import Mesa as mesa
from nestopt.levels.matrix.mesa import MesaForm
from nestopt.levels.matrix.normalizer import NormalizedLinearForm
from nestopt.levels.presets import Attention as attention
from nestopt.levels.presets import DeepMomentum as deep_momentum
from nestopt.levels.presets import Deltanet as deltanet
from nestopt.levels.presets import GatedDeltanet as gated_deltanet
from nestopt.levels.presets import GatedLinear as gated_linear
from nestopt.levels.presets import Gla as gla
from nestopt.levels.presets import Kda as kda
from nestopt.levels.presets import LinearAttention as linear_attention
from nestopt.levels.presets import OjaMemory as oja
from nestopt.levels.presets import Retnet as retnet
from nestopt.levels.presets import WindowAttention as window_attention
from nestopt.levels.self_modifying.form import SelfModifyingForm
from nestopt.levels.self_modifying.level import SelfModifying as self_modifying
from nestopt.levels.weights import ScheduleFree as schedule_free
from nestopt.levels.weights import WeightAverage as weight_average

__all__ = [
    "adam",
    "adamuon",
    "adamw",
    "associative_memory",
    "atlas",
    "attention",
    "average",
    "cautious",
    "centralize",
    "clip",
    "cms",
    "comba",
    "deep_momentum",
    "delta_momentum",
    "deltanet",
    "deltaproduct",
    "dgd",
    "dla",
    "feature_momentum",
    "forgetting_attention",
    "ftrl",
    "gated_deltanet",
    "gated_linear",
    "gd",
    "ggd",
    "gla",
    "gradient_correction",
    "grokfast",
    "hgrn2",
    "kda",
    "lamb",
    "linear_attention",
    "lion_chain",
    "log_linear",
    "m3",
    "mac",
    "mag",
    "mal",
    "mars",
    "matrix_adagrad",
    "memora",
    "mesa",
    "momentum",
    "moneta",
    "muon",
    "newton_schulz",
    "normalize",
    "normuon",
    "oja",
    "omega",
    "preconditioned_momentum",
    "regression_optimum",
    "retnet",
    "rwkv6",
    "rwkv7",
    "schedule_free",
    "second_moment",
    "self_modifying",
    "shampoo",
    "sign",
    "soap",
    "titans",
    "trust_ratio",
    "ttt",
    "weight_average",
    "weight_decay",
    "window_attention",
    "yaad",
]


@hookimpl
def nestopt_register_levels(register: Register) -> None:
    for name in __all__:
        register(name, globals()[name])
    register("chain", Chain)
    register("parallel", Parallel)
    register("nest", Nest)


@hookimpl
def nestopt_register_memories(register: Register) -> None:
    register("vector", memories.Vector)
    register("matrix", memories.Matrix)
    register("mlp", memories.Mlp)
    register("swiglu", memories.Swiglu)
    register("factored", memories.Factored)
    register("window", memories.Window)


@hookimpl
def nestopt_register_objectives(register: Register) -> None:
    register("dot", objectives.Dot)
    register("l2", objectives.L2)
    register("lp", objectives.Lp)
    register("huber", objectives.Huber)
    register("oja", objectives.Oja)


@hookimpl
def nestopt_register_retentions(register: Register) -> None:
    register("keep", retentions.Keep)
    register("decay", retentions.Decay)
    register("elastic_net", retentions.ElasticNet)
    register("lq", retentions.Lq)
    register("kl", retentions.Kl)


@hookimpl
def nestopt_register_features(register: Register) -> None:
    register("identity", features.Identity)
    register("elu", features.Elu)
    register("polynomial", features.Polynomial)
    register("random", features.Random)
    register("signed_power", SignedPower)


@hookimpl
def nestopt_register_outputs(register: Register) -> None:
    register("plain", outputs.Plain)
    register("sign", outputs.Sign)
    register("rms_norm", outputs.RmsNorm)
    register("newton_schulz", NewtonSchulzOutput)


@hookimpl
def nestopt_register_token_forms(register: Register) -> None:
    register("attention", AttentionForm)
    register("forgetting_attention", ForgettingAttentionForm)
    register("linear_attention", LinearAttentionForm)
    register("hgrn2", Hgrn2Form)
    register("rwkv6", Rwkv6Form)
    register("normalized_linear", NormalizedLinearForm)
    register("delta_rule", DeltaRuleForm)
    register("rwkv7", Rwkv7Form)
    register("comba", CombaForm)
    register("deltaproduct", DeltaproductForm)
    register("log_linear", LogLinearForm)
    register("mesa", MesaForm)
    register("oja", OjaForm)
    register("omega", OmegaForm)
    register("deep_memory", DeepMemoryForm)
    register("rule_by_chunk", RuleByChunkForm)
    register("self_modifying", SelfModifyingForm)
    register("parallel", ParallelForm)
    register("chain", ChainForm)
    register("nest", NestForm)
    register("reference", ReferenceForm)


def __getattr__(name: str) -> type[Level]:
    """Levels of plugins, by name."""
    if name.startswith("_"):
        raise AttributeError(name)
    try:
        return registry.get("level", name)
    except UnknownName as error:
        raise AttributeError(str(error)) from None
