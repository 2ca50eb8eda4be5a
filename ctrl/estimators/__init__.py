r"""Policy-gradient estimators on the chain: one gradient, many estimators (theory.md, section 7).

Every estimator is a choice of cotangents u_i in one formula; per path,

    gradient sample = sum_i (d mu_i / d theta)' u_i,          xi the noise, G returns, c_i = h_i sqrt(D_i) / (eta g_i),
                                                              e_i = -2 lambda kappa_i D_i (a_i - s_i).
    ScoreFunction        u_i = c_i xi_i (G - b_i) + e_i       G the total return (REINFORCE, DDPO-SF)
    RewardToGo           u_i = c_i xi_i (G_{i+1} - b_i) + e_i G_{i+1} the return after step i
    KLForm               u_i = c_i xi_i (r - R) - d L_i       R, L forms of the KL: analytic, k1, k2, k3, or none
    LogVariance          u_i = c_i xi_i (r - lambda k1 - b)   b the mean of the others
    TemporalDifference   u_i = c_i xi_i (V_{i+1}(X_{i+1}) - V_i(X_i)) + e_i
    ValueGradient        u_i = D_i h_i grad V_{i+1}(X_{i+1}) + e_i
    QForm                u_i = D_i h_i grad V_i(X_i) + e_i                              off by O(D)
    Pathwise             u_i = D_i h_i p_{i+1} + e_i          p the adjoint of the whole chain; biased for the last K steps alone
    AdjointMatching      the same with the lean adjoint                                 biased
    ActionNoise          u_i = Sigma_i^{-1} (a_i - mu_i) G    sampled actions only
    ActionAdvantage      u_i = Sigma_i^{-1} (a_i - mu_i) D_i A_i
    ClippedRatio         u_i = c_i xi_i rho_i A_i + e_i       on paths of theta_old; biased away from it
    DDPO                 u_i = c_i xi_i (r - mean r)/(d std r)                          biased
    RewardWeighted       u_i = c_i xi_i w                     w self-normalised e^{r/lambda - k1}; biased
    OneRandomStep        u_i of one step, over its probability
    NaturalGradient      F^{-1} times the sample
    FiniteDifference     not a cotangent: (J(theta + e) - J(theta - e)) / 2e on shared noise

All running terms carry e^{-rho t_i} and the reward e^{-rho T}. Values are arguments: this package never computes one.
Each says in `claim` what its mean is, and in `needs` what it asks for; `catalogue()` lists them all.
"""

from __future__ import annotations

from ctrl.estimators.actions import ActionAdvantage as ActionAdvantage
from ctrl.estimators.actions import ActionNoise as ActionNoise
from ctrl.estimators.adjoint import AdjointMatching as AdjointMatching
from ctrl.estimators.adjoint import Pathwise as Pathwise
from ctrl.estimators.adjoint import QForm as QForm
from ctrl.estimators.adjoint import ValueGradient as ValueGradient
from ctrl.estimators.catalogue import Entry as Entry
from ctrl.estimators.catalogue import Given as Given
from ctrl.estimators.catalogue import catalogue as catalogue
from ctrl.estimators.contract import UNBIASED as UNBIASED
from ctrl.estimators.contract import Bias as Bias
from ctrl.estimators.contract import Claim as Claim
from ctrl.estimators.contract import Estimator as Estimator
from ctrl.estimators.contract import Gradient as Gradient
from ctrl.estimators.contract import Need as Need
from ctrl.estimators.contract import Run as Run
from ctrl.estimators.contract import ValueFunction as ValueFunction
from ctrl.estimators.contract import runs as runs
from ctrl.estimators.kl import K1 as K1
from ctrl.estimators.kl import K2 as K2
from ctrl.estimators.kl import K3 as K3
from ctrl.estimators.kl import Analytic as Analytic
from ctrl.estimators.kl import KLForm as KLForm
from ctrl.estimators.kl import StepKL as StepKL
from ctrl.estimators.likelihood import LeaveOneOut as LeaveOneOut
from ctrl.estimators.likelihood import LogVariance as LogVariance
from ctrl.estimators.likelihood import RewardToGo as RewardToGo
from ctrl.estimators.likelihood import Score as Score
from ctrl.estimators.likelihood import ScoreFunction as ScoreFunction
from ctrl.estimators.likelihood import TemporalDifference as TemporalDifference
from ctrl.estimators.likelihood import best_constant as best_constant
from ctrl.estimators.ratio import DDPO as DDPO
from ctrl.estimators.ratio import ClippedRatio as ClippedRatio
from ctrl.estimators.ratio import RewardWeighted as RewardWeighted
from ctrl.estimators.reshaped import FiniteDifference as FiniteDifference
from ctrl.estimators.reshaped import NaturalGradient as NaturalGradient
from ctrl.estimators.reshaped import OneRandomStep as OneRandomStep
from ctrl.estimators.reshaped import fisher as fisher
from ctrl.estimators.reshaped import information as information
from ctrl.estimators.reshaped import weighted_information as weighted_information
