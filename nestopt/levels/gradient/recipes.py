"""Optimizers known by a name that are chains of other levels: what each is, and nothing more."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from typing import ClassVar

from nestopt.core.associative import Gd
from nestopt.core.compose import Chain, Parallel
from nestopt.core.level import Level
from nestopt.core.part import FieldError
from nestopt.levels.gradient.adam import Adam
from nestopt.levels.gradient.links import Clip, GradientCorrection, Normalize, Sign, TrustRatio, WeightDecay
from nestopt.levels.gradient.momentum import Momentum
from nestopt.levels.gradient.muon import Muon, NewtonSchulz
from nestopt.levels.gradient.second_moment import SecondMoment

RMS_OF_ADAM = 0.2
"""The root mean square of Adam's directions in training (Liu et al. 2025), to which others are brought."""


class Recipe(Chain):
    """A chain whose levels follow from its own fields."""

    takes_schedules: ClassVar[bool] = False

    levels: dict[str, Level] = dataclasses.field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.levels = self.made()
        super().__post_init__()

    @abstractmethod
    def made(self) -> dict[str, Level]:
        """Return the levels of the chain, by name."""


def _checked(recipe: Recipe, betas: tuple[float, float]) -> tuple[float, float]:
    """Return the field `betas` as a tuple. Raises FieldError unless it holds two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise FieldError(recipe.label, "betas", tuple(betas), "is not allowed; give two numbers in [0, 1)")
    return betas[0], betas[1]


class Lamb(Recipe):
    r"""LAMB (You et al. 2020): Adam, weight decay, and steps as long as the parameter.

    `chain(adam(betas, eps, bias_correction), weight_decay(weight_decay), trust_ratio(limit=limit, eps=eps))`

    Convention: a step moves a tensor by the learning rate times its own length. Clip all gradients together before it
    (`torch.nn.utils.clip_grad_norm_`), as the paper does.

    Args:
        betas: β1 and β2 in [0, 1). Default (0.9, 0.999).
        eps: ε > 0, of Adam and of the ratio. Default 1e-6.
        weight_decay: λ >= 0. Default 0.01.
        limit: the largest norm of a parameter that counts; None: any, as printed. Default 10.
        bias_correction: as printed (default).
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    weight_decay: float = 0.01
    limit: float | None = 10.0
    bias_correction: bool = True

    def made(self) -> dict[str, Level]:
        self.betas = _checked(self, self.betas)
        self.check("eps", 0.0)
        self.check("weight_decay", 0.0)
        adam = Adam(self.betas, self.eps, self.bias_correction)
        ratio = TrustRatio(limit=self.limit, eps=self.eps)
        return {"adam": adam, "weight_decay": WeightDecay(self.weight_decay), "trust_ratio": ratio}


class LionChain(Recipe):
    r"""Lion (Chen et al. 2023) made of parts: the sign of a short and a long view of the gradient.

    $$u = \mathrm{sign}(\beta_1 m + (1-\beta_1)\,g), \qquad m \leftarrow \beta_2 m + (1-\beta_2)\,g$$

    `chain(parallel(momentum(β2, dampening=β2), gd(), weights=[β1/β2, 1 - β1/β2]), sign())`: the new memory holds the
    old one, so that a weighted sum of it and g is what Lion takes the sign of. The plugin nestopt-lion registers the
    same update as one level, `lion`, which takes one pass where this takes three. Convention: entries are -1, 0 or 1,
    so learning rates are about a tenth of Adam's.

    Args:
        betas: β1 in [0, 1) and β2 in (0, 1). Default (0.9, 0.99).
    """

    betas: tuple[float, float] = (0.9, 0.99)

    def made(self) -> dict[str, Level]:
        self.betas = beta1, beta2 = _checked(self, self.betas)
        if not beta2:
            raise FieldError(self.label, "betas", self.betas, "is not allowed; give a β2 above 0")
        views = {"long": Momentum(beta2, dampening=beta2), "short": Gd()}
        return {"views": Parallel(views, weights=(beta1 / beta2, 1 - beta1 / beta2)), "sign": Sign()}


class Grokfast(Recipe):
    r"""The filter of Grokfast (Lee et al. 2024): what is slow in gradients, amplified; to be put before an optimizer.

    $$u = g + \lambda m, \qquad m \leftarrow \alpha m + (1-\alpha)\,g, \qquad m_1 = g_1$$

    `parallel(gd(), momentum(α, dampening=α, undamped_start=True), weights=[1, λ])`: it has a memory, and no mask.
    `chain(grokfast(), adamw())` is Grokfast's AdamW; its learning rate is of gradients 1 + λ times as long.

    Args:
        alpha: α in [0, 1). Default 0.98.
        amplify: λ >= 0. Default 2.
    """

    alpha: float = 0.98
    amplify: float = 2.0

    def made(self) -> dict[str, Level]:
        self.check("alpha", 0.0, 1.0, closed="[)")
        self.check("amplify", 0.0)
        slow = Momentum(self.alpha, dampening=self.alpha, undamped_start=True)
        return {"filter": Parallel({"all": Gd(), "slow": slow}, weights=(1.0, self.amplify))}


class Mars(Recipe):
    r"""MARS with Adam (Yuan et al. 2024): Adam on gradients that are led on by how they change.

    `chain(gradient_correction(gamma, β1), clip(1), adam(betas, eps))`

    Args:
        betas: β1 and β2 in [0, 1). Default (0.95, 0.99).
        gamma: γ >= 0 of the correction. Default 0.025.
        eps: ε > 0 of Adam. Default 1e-8.
    """

    betas: tuple[float, float] = (0.95, 0.99)
    gamma: float = 0.025
    eps: float = 1e-8

    def made(self) -> dict[str, Level]:
        self.betas = _checked(self, self.betas)
        self.check("gamma", 0.0)
        self.check("eps", 0.0)
        correction = GradientCorrection(self.gamma, self.betas[0])
        return {"correction": correction, "clip": Clip(1.0), "adam": Adam(self.betas, self.eps)}


class Normuon(Recipe):
    r"""NorMuon (Li et al. 2025): Muon, each row over the root of its second moment. Matrices only.

    `chain(muon(beta, scale=None), second_moment(beta2, over="rows"), normalize(0.2, by="rms"))`

    Convention: directions have the root mean square of Adam's (0.2), so its learning rates serve.

    Args:
        beta: β of Muon, Nesterov, in [0, 1). Default 0.95.
        beta2: of the rows' second moment, in [0, 1). Default 0.95.
        eps: ε >= 0, added to its root. Default 1e-10.
        dtype: of Newton-Schulz, as of `muon`.
    """

    beta: float = 0.95
    beta2: float = 0.95
    eps: float = 1e-10
    dtype: str | None = None

    @property
    def rates_as(self) -> str:
        return "adam"

    def made(self) -> dict[str, Level]:
        self.check("beta", 0.0, 1.0, closed="[)")
        self.check("beta2", 0.0, 1.0, closed="[)")
        self.check("eps", 0.0)
        moment = SecondMoment(self.beta2, self.eps, bias_correction=False, over="rows")
        muon = Muon(self.beta, scale=None, dtype=self.dtype)
        return {"muon": muon, "second_moment": moment, "normalize": Normalize(RMS_OF_ADAM, "rms")}


class Adamuon(Recipe):
    r"""AdaMuon (Si et al. 2025): Adam's second moment of orthogonal directions. Matrices only.

    `chain(momentum(β1, dampening=β1), sign(), newton_schulz(), second_moment(β2), normalize(0.2, by="rms"))`

    Convention: directions have the root mean square of Adam's (0.2), so its learning rates serve.

    Args:
        betas: β1 and β2 in [0, 1). Default (0.95, 0.95).
        eps: ε >= 0, added to the root. Default 1e-8.
        signed: orthogonalise the momentum's signs, as in the paper's present version (default); False: the momentum.
        dtype: of Newton-Schulz, as of `newton_schulz`.
    """

    betas: tuple[float, float] = (0.95, 0.95)
    eps: float = 1e-8
    signed: bool = True
    dtype: str | None = None

    @property
    def rates_as(self) -> str:
        return "adam"

    def made(self) -> dict[str, Level]:
        self.betas = _checked(self, self.betas)
        self.check("eps", 0.0)
        beta1, beta2 = self.betas
        first: dict[str, Level] = {"momentum": Momentum(beta1, dampening=beta1)}
        signed: dict[str, Level] = {"sign": Sign()} if self.signed else {}
        moment = SecondMoment(beta2, self.eps)
        last = {"newton_schulz": NewtonSchulz(dtype=self.dtype), "second_moment": moment}
        return {**first, **signed, **last, "normalize": Normalize(RMS_OF_ADAM, "rms")}
