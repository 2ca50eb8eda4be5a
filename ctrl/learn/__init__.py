r"""Algorithms that move theta, one file each on one contract, judged by the exact objective after every update (theory.md, section 15).

    ScoreFunction         step of the score function, leave-one-out baseline (DDPO-SF)
    DDPO                  as published: standardised rewards, densities averaged over dimensions, no KL
    PPO                   clipped ratios, two epochs on the same paths (DDPO-IS)
    DPOK                  clipped ratio with a learned V as baseline, and the KL
    CPPO                  four epochs up the surrogate, adaptive penalty on the square root of the KL
    TemporalDifference    continuous-time policy gradient, V learned by the martingale loss or by orthogonality
    ValueGradient         the same with grad V
    QLearning             actor-critic on sampled actions, V and q learned
    Pathwise              the reward's gradient through the chain; its last K steps
    AdjointMatching       regression on the lean adjoint
    LogVariance           descent of Var( r/lambda - k1 )
    NaturalGradient       score function turned by the Fisher information, trust region in nats
    RewardWeighted        weighted maximum likelihood towards the tilted path law

Steps are plain: theta + step * direction, without momentum or adaptive scaling, so that a step size means the same everywhere.
`train` runs one and judges it, `search` finds its step size, `Yardstick` splits the regret: J* - J = (J* - J_class) + (J_class - J).
"""

from __future__ import annotations

from ctrl.learn.adjoint_matching import AdjointMatching as AdjointMatching
from ctrl.learn.contract import Algorithm as Algorithm
from ctrl.learn.contract import Counts as Counts
from ctrl.learn.contract import Diverged as Diverged
from ctrl.learn.contract import State as State
from ctrl.learn.contract import Training as Training
from ctrl.learn.contract import noise_of as noise_of
from ctrl.learn.contract import train as train
from ctrl.learn.cppo import CPPO as CPPO
from ctrl.learn.ctpg import TemporalDifference as TemporalDifference
from ctrl.learn.ctpg import ValueGradient as ValueGradient
from ctrl.learn.ddpo import DDPO as DDPO
from ctrl.learn.ddpo import ScoreFunction as ScoreFunction
from ctrl.learn.dpok import DPOK as DPOK
from ctrl.learn.log_variance import LogVariance as LogVariance
from ctrl.learn.natural import NaturalGradient as NaturalGradient
from ctrl.learn.pathwise import Pathwise as Pathwise
from ctrl.learn.ppo import PPO as PPO
from ctrl.learn.qlearning import QLearning as QLearning
from ctrl.learn.regret import Best as Best
from ctrl.learn.regret import Yardstick as Yardstick
from ctrl.learn.regret import best_in_class as best_in_class
from ctrl.learn.reward_weighted import RewardWeighted as RewardWeighted
from ctrl.learn.search import Search as Search
from ctrl.learn.search import search as search
from ctrl.learn.values import Critic as Critic
from ctrl.learn.values import LearnedValue as LearnedValue
from ctrl.learn.values import MartingaleLoss as MartingaleLoss
from ctrl.learn.values import Orthogonality as Orthogonality
from ctrl.learn.values import Quadratic as Quadratic

ALL: tuple[Algorithm, ...] = (
    ScoreFunction(), DDPO(), PPO(), DPOK(), CPPO(), TemporalDifference(), ValueGradient(), QLearning(), Pathwise(), AdjointMatching(),
    LogVariance(), NaturalGradient(), RewardWeighted())
