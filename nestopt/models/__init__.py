"""Whole models."""

from nestopt.models.build import build_model
from nestopt.models.hope import HopeLM

__all__ = ["HopeLM", "build_model"]
