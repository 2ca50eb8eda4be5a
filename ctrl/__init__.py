"""Scores as actions: fine-tuning diffusion models by continuous-time reinforcement learning, with every formula checked.

Submodules load on first use; `import ctrl` alone imports neither torch nor a solver.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Gaussian": "laws", "GaussianMixture": "laws",
    "VP": "schedule", "VE": "schedule", "SubVP": "schedule", "OU": "schedule", "FlowMatching": "schedule", "DiscreteVP": "schedule",
    "TimeGrid": "schedule",
    "QuadraticReward": "reward", "LinearReward": "reward", "BumpReward": "reward", "LogDensityReward": "reward",
    "ClassLogPosteriorReward": "reward", "CallableReward": "reward",
    "AffinePolicy": "policy", "BasisPolicy": "policy", "MixturePolicy": "policy", "CallablePolicy": "policy",
    "Problem": "problem", "Noise": "noise", "simulate": "rollout", "Gradient": "estimators",
    "save": "storage", "load": "storage",
}
_MODULES = ("estimators", "exact", "learn", "testing", "theorems", "torch", "verify", "zoo")

__all__ = [*_HOME, *_MODULES]  # noqa: PLE0604

if TYPE_CHECKING:
    from ctrl import estimators as estimators
    from ctrl import exact as exact
    from ctrl import learn as learn
    from ctrl import testing as testing
    from ctrl import theorems as theorems
    from ctrl import torch as torch
    from ctrl import verify as verify
    from ctrl import zoo as zoo
    from ctrl.estimators import Gradient as Gradient
    from ctrl.laws import Gaussian as Gaussian
    from ctrl.laws import GaussianMixture as GaussianMixture
    from ctrl.noise import Noise as Noise
    from ctrl.policy import AffinePolicy as AffinePolicy
    from ctrl.policy import BasisPolicy as BasisPolicy
    from ctrl.policy import CallablePolicy as CallablePolicy
    from ctrl.policy import MixturePolicy as MixturePolicy
    from ctrl.problem import Problem as Problem
    from ctrl.reward import BumpReward as BumpReward
    from ctrl.reward import CallableReward as CallableReward
    from ctrl.reward import ClassLogPosteriorReward as ClassLogPosteriorReward
    from ctrl.reward import LinearReward as LinearReward
    from ctrl.reward import LogDensityReward as LogDensityReward
    from ctrl.reward import QuadraticReward as QuadraticReward
    from ctrl.rollout import simulate as simulate
    from ctrl.schedule import OU as OU
    from ctrl.schedule import VE as VE
    from ctrl.schedule import VP as VP
    from ctrl.schedule import DiscreteVP as DiscreteVP
    from ctrl.schedule import FlowMatching as FlowMatching
    from ctrl.schedule import SubVP as SubVP
    from ctrl.schedule import TimeGrid as TimeGrid
    from ctrl.storage import load as load
    from ctrl.storage import save as save


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"ctrl.{_HOME[name]}"), name)
    elif name in _MODULES:
        value = import_module(f"ctrl.{name}")
    else:
        raise AttributeError(f"module 'ctrl' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
