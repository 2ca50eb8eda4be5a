"""All estimators in one list, each with what it claims and what it needs (theory.md, section 7)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from ctrl.check import Array
from ctrl.estimators.actions import ActionAdvantage, ActionNoise
from ctrl.estimators.adjoint import AdjointMatching, Pathwise, QForm, ValueGradient
from ctrl.estimators.contract import Claim, Estimator, Need, ValueFunction
from ctrl.estimators.kl import K1, K2, K3, Analytic, KLForm
from ctrl.estimators.likelihood import LeaveOneOut, LogVariance, RewardToGo, ScoreFunction, TemporalDifference
from ctrl.estimators.ratio import DDPO, ClippedRatio, RewardWeighted
from ctrl.estimators.reshaped import FiniteDifference, NaturalGradient, OneRandomStep
from ctrl.policy import Policy
from ctrl.problem import Problem


@dataclass(frozen=True, eq=False)
class Given:
    """What estimators may ask for: a value, an advantage rate, the parameters of an old policy, a Fisher matrix; None where there is none.

    Source: theory.md, section 7.   Checked: tests/test_estimators_claims.py::test_the_catalogue_says_what_is_lacking
    """

    value: ValueFunction | None = None
    advantage: Callable[[int, Array, Array], Array] | None = None
    theta_old: Array | None = None
    fisher: Array | None = None

    def has(self, need: Need, problem: Problem, policy: Policy) -> bool:
        """Whether a problem, a policy and what is given here answer a need; two paths and grad r are anybody's."""
        return {Need.DIFFUSION: problem.eta > 0, Need.KL_WEIGHT: problem.kl_weight > 0, Need.EXPLORATION: policy.exploration is not None,
                Need.VALUE: self.value is not None, Need.VALUE_GRADIENT: self.value is not None, Need.ADVANTAGE: self.advantage is not None,
                Need.OLD_POLICY: self.theta_old is not None, Need.FISHER: self.fisher is not None}.get(need, True)


@dataclass(frozen=True, eq=False)
class Entry:
    """A named estimator that is made of what is given, with its claim and its needs.

    Source: theory.md, section 7.   Checked: tests/test_estimators_claims.py::test_the_catalogue_says_what_is_lacking
    """

    name: str
    claim: Claim
    needs: frozenset[Need]
    make: Callable[[Given], Estimator | FiniteDifference]

    def lacking(self, given: Given, problem: Problem, policy: Policy) -> frozenset[Need]:
        """What it needs and cannot have here; empty where `make(given)` runs."""
        return frozenset(need for need in self.needs if not given.has(need, problem, policy))


def _entry(name: str, make: Callable[[Given], Estimator | FiniteDifference], *more: Need) -> Entry:
    """Claims and needs are read off a specimen made of stand-ins, which never runs."""
    specimen = make(Given(_NoValue(), lambda i, x, a: x[:, 0], np.zeros(1), np.eye(1)))
    return Entry(name, specimen.claim, specimen.needs | set(more), make)


class _NoValue:
    """A stand-in for a value."""

    def __call__(self, i: int, x: Array) -> Array:
        raise NotImplementedError

    def gradient(self, i: int, x: Array) -> Array:
        raise NotImplementedError


T = TypeVar("T")


def _asked(name: str, thing: T | None) -> T:
    if thing is None:
        raise ValueError(f"{name}: expected one to be given for this estimator, got None")
    return thing


def _old(given: Given) -> Array:
    return _asked("theta_old", given.theta_old)


def catalogue() -> list[Entry]:
    """Every estimator of theory.md, section 7, for the low-dimensional bench: name, claim, needs, and how to make it.

    Source: theory.md, section 7.   Checked: tests/test_estimators_claims.py::test_every_claim_is_tested_as_what_it_is
    """
    return [
        _entry("score function", lambda g: ScoreFunction()),
        _entry("score function, k1 in the return", lambda g: ScoreFunction(sampled_kl=True)),
        _entry("score function, leave-one-out baseline", lambda g: ScoreFunction(LeaveOneOut()), Need.BATCH),
        _entry("reward-to-go", lambda g: RewardToGo()),
        _entry("reward-to-go, k1 in the return", lambda g: RewardToGo(sampled_kl=True)),
        _entry("reward-to-go, leave-one-out baseline", lambda g: RewardToGo(LeaveOneOut()), Need.BATCH),
        _entry("reward-to-go, baseline V", lambda g: RewardToGo(_asked("value", g.value)), Need.VALUE),
        _entry("temporal difference", lambda g: TemporalDifference(_asked("value", g.value))),
        _entry("log-variance", lambda g: LogVariance()),
        _entry("log-variance away from theta_old", lambda g: LogVariance(_old(g)), Need.OLD_POLICY),
        _entry("value gradient", lambda g: ValueGradient(_asked("value", g.value))),
        _entry("q form", lambda g: QForm(_asked("value", g.value))),
        _entry("pathwise", lambda g: Pathwise()),
        _entry("pathwise, last step only", lambda g: Pathwise(last=1)),
        _entry("lean adjoint (Adjoint Matching)", lambda g: AdjointMatching()),
        _entry("action noise", lambda g: ActionNoise()),
        _entry("action noise, reward-to-go", lambda g: ActionNoise(reward_to_go=True)),
        _entry("action noise times an advantage", lambda g: ActionAdvantage(_asked("advantage", g.advantage))),
        _entry("KL: k3 in the return and as a loss", lambda g: KLForm(K3(), K3())),
        _entry("KL: analytic in the return alone (reward folding)", lambda g: KLForm(Analytic(), None)),
        _entry("KL: k3 in the return alone", lambda g: KLForm(K3(), None)),
        _entry("KL: analytic as a loss alone", lambda g: KLForm(None, Analytic())),
        _entry("KL: k1 as a loss alone", lambda g: KLForm(None, K1())),
        _entry("KL: k2 as a loss alone", lambda g: KLForm(None, K2())),
        _entry("KL: k3 as a loss alone", lambda g: KLForm(None, K3())),
        _entry("one random step of reward-to-go", lambda g: OneRandomStep(RewardToGo())),
        _entry("one random step of pathwise", lambda g: OneRandomStep(Pathwise())),
        _entry("natural gradient of reward-to-go", lambda g: NaturalGradient(RewardToGo(), _asked("fisher", g.fisher))),
        _entry("clipped ratio at theta_old (PPO)", lambda g: ClippedRatio()),
        _entry("ratio away from theta_old", lambda g: ClippedRatio(theta_old=_old(g), clip=None), Need.OLD_POLICY, Need.BATCH),
        _entry("clipped ratio away from theta_old (PPO)", lambda g: ClippedRatio(theta_old=_old(g)), Need.OLD_POLICY, Need.BATCH),
        _entry("DDPO as published", lambda g: DDPO()),
        _entry("reward-weighted regression", lambda g: RewardWeighted()),
        _entry("finite difference", lambda g: FiniteDifference()),
    ]
