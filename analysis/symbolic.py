r"""The identities of theory.md, sections 4-7 and 9, derived with symbols for the scalar Gaussian chain.

    python -m analysis.symbolic [--steps 2]      every identity on one page, and the wrong formulas that it rejects

    from analysis.symbolic import ScalarChain, numbers, path_kl, substitute
    chain = ScalarChain(steps=1)
    chain.objective, chain.path_kl, chain.value(0), chain.states[1]      # sympy expressions: LaTeX in a notebook
    path_kl(chain)[1]                                                    # an identity, both sides written out
    substitute(chain.objective, numbers(problem, policy, grid))          # the exact solver's number

No sampling and no numbers: the two sides of an identity are built in different ways (path expectations, backward recursions, derivatives,
dense Gaussian laws), and their difference is expanded to nothing. So it holds on every grid, at every eta > 0, for every affine policy.
Increments B_i ~ N(0, D_i) in the place of sqrt(D_i) xi_i keep everything a polynomial in letters and their reciprocals, where zero is decidable.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, cached_property
from typing import NamedTuple

import sympy as sp
import tyro
from sympy.polys.matrices import DomainMatrix
from sympy.polys.rings import PolyRing

from ctrl.exact.chain import applies
from ctrl.policy import Policy
from ctrl.problem import Problem
from ctrl.schedule import TimeGrid

DIGITS = 40

# kl_weight lambda; start N(m, P); reward r(x) = -1/2 Q x^2 + b x + r_0
eta, lam, rho, m_start, P_start, Q, b, r0 = sp.symbols("eta lambda rho m_start P_start Q b r_0", real=True)
x, a = sp.symbols("x a", real=True)


# ------------------------------------------------------------------- polynomials in letters and their reciprocals

Terms = dict[tuple[int, ...], sp.Rational]


def terms(expression: sp.Expr) -> tuple[list[sp.Symbol], Terms]:
    """Letters and {exponents: coefficient} of a polynomial in letters and their reciprocals; no terms if and only if it is zero."""
    expression = sp.sympify(expression)
    negative = [power for power in expression.atoms(sp.Pow) if power.exp.is_negative]
    if wrong := [power for power in negative if not power.base.is_Symbol]:
        raise ValueError(f"expression: expected reciprocals of letters only, got {wrong[0]}")
    inverse = {power.base: sp.Dummy() for power in negative}
    expression = expression.xreplace({power: inverse[power.base] ** -power.exp for power in negative})
    letters = sorted((expression.free_symbols - set(inverse.values())) | set(inverse), key=str)
    place = [letters.index(letter) for letter in inverse]
    out: Terms = defaultdict(lambda: sp.QQ.zero)
    for exponents, coefficient in PolyRing([*letters, *inverse.values()], sp.QQ, sp.lex).from_expr(expression).terms():
        powers = list(exponents[: len(letters)])
        for j, exponent in zip(place, exponents[len(letters) :], strict=True):
            powers[j] -= exponent
        out[tuple(powers)] += coefficient
    return letters, {powers: coefficient for powers, coefficient in out.items() if coefficient}


def assembled(letters: Sequence[sp.Symbol], table: Terms) -> sp.Expr:
    """The sum that `terms` took apart."""
    return sp.Add(*(sp.QQ.to_sympy(coefficient) * sp.Mul(*(letter**e for letter, e in zip(letters, powers, strict=True) if e))
                    for powers, coefficient in table.items()))


def eliminated(expression: sp.Expr, letter: sp.Symbol, meaning: sp.Expr) -> sp.Expr:
    """The meaning of a letter put in, after multiplication with the power of the letter that clears it from denominators."""
    letters, table = terms(expression)
    j = letters.index(letter)
    lowest = min((powers[j] for powers in table), default=0)
    if lowest >= 0:
        return expression.xreplace({letter: meaning}) if table else sp.S.Zero
    parts: dict[int, Terms] = defaultdict(dict)
    for powers, coefficient in table.items():
        parts[powers[j] - lowest][(*powers[:j], 0, *powers[j + 1 :])] = coefficient
    return sp.Add(*(assembled(letters, part) * meaning**power for power, part in parts.items()))


class Law(NamedTuple):
    """N(mean, variance) of a letter."""

    mean: sp.Expr
    variance: sp.Expr

    def moment(self, order: int) -> sp.Expr:
        """E X^n = mean E X^{n-1} + (n - 1) variance E X^{n-2}."""
        return _moment(self, order)


@cache
def _moment(law: Law, order: int) -> sp.Expr:
    if order < 2:
        return law.mean**order
    return sp.expand(law.mean * _moment(law, order - 1) + (order - 1) * law.variance * _moment(law, order - 2))


def expectation(expression: sp.Expr, laws: Mapping[sp.Symbol, Law]) -> sp.Expr:
    """E of a polynomial in independent Gaussian letters."""
    letters, table = terms(expression)
    random = [j for j, letter in enumerate(letters) if letter in laws]
    parts: dict[tuple[int, ...], Terms] = defaultdict(dict)
    for powers, coefficient in table.items():
        parts[tuple(powers[j] for j in random)][tuple(0 if j in random else e for j, e in enumerate(powers))] = coefficient
    moments = {orders: sp.Mul(*(laws[letters[j]].moment(e) for j, e in zip(random, orders, strict=True))) for orders in parts}
    return sp.Add(*(weight * assembled(letters, parts[orders]) for orders, weight in moments.items() if weight != 0))


# ------------------------------------------------------------------------------------------------------ the chain


class Quadratic(NamedTuple):
    """-1/2 S x^2 + w x + z."""

    S: sp.Expr
    w: sp.Expr
    z: sp.Expr

    def __call__(self, at: sp.Expr) -> sp.Expr:
        return -self.S * at**2 / 2 + self.w * at + self.z

    def mean(self, law: Law) -> sp.Expr:
        """E of it."""
        return self(law.mean) - self.S * law.variance / 2


@dataclass(frozen=True)
class Step:
    """The letters of one step, and what the chain does in it.

    D length    f, g coefficients    h gain    kappa KL rate    d = e^{-rho D}    B ~ N(0, D) noise    M = -(d^2 Q_i/da^2)/D at the optimum
    K x + k policy    K_pre x + k_pre score    K_dot x + k_dot direction d mu    epsilon ~ N(0, Sigma) exploration (both 0 for mean actions)
    """

    D: sp.Symbol
    f: sp.Symbol
    g: sp.Symbol
    h: sp.Symbol
    kappa: sp.Symbol
    d: sp.Symbol
    B: sp.Symbol
    M: sp.Symbol
    K: sp.Expr
    k: sp.Expr
    K_pre: sp.Symbol
    k_pre: sp.Symbol
    K_dot: sp.Symbol
    k_dot: sp.Symbol
    epsilon: sp.Expr
    Sigma: sp.Expr

    @classmethod
    def number(cls, i: int, exploration: bool) -> Step:
        spelled = {"D": "Delta", "K_pre": "K^pre", "k_pre": "k^pre", "K_dot": "Kdot", "k_dot": "kdot"}
        step = cls(**{field.name: sp.Symbol(f"{spelled.get(field.name, field.name)}_{i}", real=True) for field in fields(cls)})
        return step if exploration else replace(step, epsilon=sp.S.Zero, Sigma=sp.S.Zero)

    def score(self, at: sp.Expr) -> sp.Expr:
        return self.K_pre * at + self.k_pre

    def mean(self, at: sp.Expr) -> sp.Expr:
        return self.K * at + self.k

    def action(self, at: sp.Expr) -> sp.Expr:
        return self.mean(at) + self.epsilon

    def tangent(self, at: sp.Expr) -> sp.Expr:
        """d mu in the direction (K_dot, k_dot)."""
        return self.K_dot * at + self.k_dot

    def move(self, at: sp.Expr, action: sp.Expr) -> sp.Expr:
        return at + (-self.f * at + self.h * action) * self.D + eta * self.g * self.B

    def cost(self, at: sp.Expr, action: sp.Expr) -> sp.Expr:
        return self.kappa * self.D * (action - self.score(at)) ** 2

    def explicit(self, at: sp.Expr, action: sp.Expr) -> sp.Expr:
        """e_i, the derivative of -lambda cost at fixed states."""
        return -2 * lam * self.kappa * self.D * self.tangent(at) * (action - self.score(at))

    def score_noise(self, at: sp.Expr) -> sp.Expr:
        """sigma_i, the derivative of log p(X_{i+1} | X_i, action noise)."""
        return self.tangent(at) * self.h * self.B / (eta * self.g)

    def departure(self, mean: sp.Expr, variance: sp.Expr) -> sp.Expr:
        """E (mu - s)^2 for a state of this mean and variance."""
        dK, dk = self.K - self.K_pre, self.k - self.k_pre
        return dK**2 * variance + (dK * mean + dk) ** 2

    @property
    def A(self) -> sp.Expr:
        return 1 - self.D * self.f + self.D * self.h * self.K

    @property
    def c(self) -> sp.Expr:
        return self.D * self.h * self.k

    @property
    def R(self) -> sp.Expr:
        return eta**2 * self.g**2 * self.D + self.h**2 * self.D**2 * self.Sigma

    def back(self, later: Quadratic) -> Quadratic:
        """V_i from V_{i+1}."""
        dK, dk, charge = self.K - self.K_pre, self.k - self.k_pre, 2 * lam * self.kappa * self.D
        pull = later.w - later.S * self.c
        return Quadratic(
            self.d * self.A**2 * later.S + charge * dK**2, self.d * self.A * pull - charge * dK * dk,
            self.d * (later.z + self.c * (later.w + pull) / 2 - later.S * self.R / 2) - charge * (dk**2 + self.Sigma) / 2)

    def action_value(self, later: Quadratic, at: sp.Expr, action: sp.Expr) -> sp.Expr:
        """d E later(X_{i+1}) - lambda cost; E p(B) = p(0) + D p''(0)/2 of a quadratic."""
        ahead = later(self.move(at, action))
        return self.d * (ahead.xreplace({self.B: sp.S.Zero}) + self.D * sp.diff(ahead, self.B, 2) / 2) - lam * self.cost(at, action)

    def best(self, later: Quadratic) -> Step:
        """This step with the action that is best before the value `later`: M a* = 2 lambda kappa s + d h (w - S (1 - D f) x)."""
        charge, push = 2 * lam * self.kappa, self.d * self.h
        K = (charge * self.K_pre - push * later.S * (1 - self.D * self.f)) / self.M
        return replace(self, K=K, k=(charge * self.k_pre + push * later.w) / self.M)

    def curvature(self, later: Quadratic) -> sp.Expr:
        """The meaning of M."""
        return 2 * lam * self.kappa + self.d * self.h**2 * self.D * later.S


@dataclass(frozen=True)
class ScalarChain:
    r"""N symbolic steps of X_{i+1} = X_i + (-f_i X_i + h_i a_i) D_i + eta g_i B_i, B_i ~ N(0, D_i), a_i = K_i X_i + k_i (+ epsilon_i).

        J = E[ e^{-rho t_N} r(X_N) ] - lambda E sum e^{-rho t_i} kappa_i D_i |a_i - s_i|^2,     s_i = K^pre_i X_i + k^pre_i

    steps : N >= 1; monomials grow about tenfold a step      exploration : actions sampled from N(mu, Sigma_i)
    Attributes are sympy expressions in the letters of `step[i]`; E is `mean`.
    Source: theory.md, section 1.   Checked: tests/test_symbolic.py::test_numbers_are_the_exact_solvers
    """

    steps: int = 1
    exploration: bool = False

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps: expected at least one step, got {self.steps}")

    @cached_property
    def step(self) -> tuple[Step, ...]:
        return tuple(Step.number(i, self.exploration) for i in range(self.steps))

    @cached_property
    def meanings(self) -> dict[sp.Symbol, sp.Expr]:
        """What the letters M, kappa and h stand for, in the order in which they can be put in: M_0 ... M_{N-1}, kappa, h."""
        out = {u.M: u.curvature(later) for u, later in zip(self.step, self.best_values[1:], strict=True)}
        out |= {u.kappa: u.h**2 / (2 * eta**2 * u.g**2) for u in self.step}
        return out | {u.h: (1 + eta**2) * u.g**2 / 2 for u in self.step}

    @cached_property
    def laws(self) -> dict[sp.Symbol, Law]:
        """Of all that is random: X_0, increments, exploration."""
        out = {sp.Symbol("X_0", real=True): Law(m_start, P_start)} | {u.B: Law(sp.S.Zero, u.D) for u in self.step}
        return out | {u.epsilon: Law(sp.S.Zero, u.Sigma) for u in self.step if self.exploration}

    def mean(self, expression: sp.Expr) -> sp.Expr:
        """E over the noise, and over X_0 where it occurs: given X_i = x for what is built on `path(i, x)`."""
        return expectation(expression, self.laws)

    def path(self, i: int, at: sp.Expr) -> tuple[sp.Expr, ...]:
        """X_i = at, X_{i+1}, ..., X_N as polynomials in the noise."""
        out = [at]
        for u in self.step[i:]:
            out.append(u.move(out[-1], u.action(out[-1])))
        return tuple(out)

    @cached_property
    def states(self) -> tuple[sp.Expr, ...]:
        """X_0 ... X_N as polynomials in X_0 and the noise."""
        return self.path(0, sp.Symbol("X_0", real=True))

    def discount(self, i: int) -> sp.Expr:
        """e^{-rho t_i}."""
        return sp.Mul(*(u.d for u in self.step[:i]))

    @property
    def reward(self) -> Quadratic:
        return Quadratic(Q, b, r0)

    def return_to_go(self, i: int, path: Sequence[sp.Expr]) -> sp.Expr:
        """G_i along X_i ... X_N, discounted to t_i."""
        out = self.reward(path[-1])
        for u, at in reversed(list(zip(self.step[i:], path[:-1], strict=True))):
            out = u.d * out - lam * u.cost(at, u.action(at))
        return out

    @cached_property
    def moments(self) -> tuple[Law, ...]:
        """Laws of X_0 ... X_N by m' = A m + c, P' = A^2 P + R."""
        out = [Law(m_start, P_start)]
        for u in self.step:
            m, P = out[-1]
            out.append(Law(u.A * m + u.c, u.A**2 * P + u.R))
        return tuple(out)

    @cached_property
    def expected_reward(self) -> sp.Expr:
        return self.reward.mean(self.moments[-1])

    @cached_property
    def path_kl(self) -> sp.Expr:
        """sum_i kappa_i D_i E(mu_i - s_i)^2, nats."""
        return sp.Add(*(u.kappa * u.D * u.departure(*law) for u, law in zip(self.step, self.moments, strict=False)))

    @cached_property
    def objective(self) -> sp.Expr:
        """J from the moments; exploration pays for its own variance."""
        costs = (u.kappa * u.D * (u.departure(*law) + u.Sigma) for u, law in zip(self.step, self.moments, strict=False))
        return self.discount(self.steps) * self.expected_reward - lam * sp.Add(*(self.discount(i) * cost for i, cost in enumerate(costs)))

    @cached_property
    def values(self) -> tuple[Quadratic, ...]:
        """V_0 ... V_N by backward recursion."""
        out = [self.reward]
        for u in reversed(self.step):
            out.append(u.back(out[-1]))
        return tuple(reversed(out))

    def value(self, i: int, at: sp.Expr = x) -> sp.Expr:
        """V_i(x)."""
        return self.values[i](at)

    def slope(self, i: int, at: sp.Expr = x) -> sp.Expr:
        """dV_i/dx."""
        return sp.diff(self.value(i), x).xreplace({x: at})

    def action_value(self, i: int, action: sp.Expr = a, at: sp.Expr = x) -> sp.Expr:
        """Q_i(x, a) = d_i E V_{i+1}(X_{i+1}) - lambda cost."""
        return self.step[i].action_value(self.values[i + 1], at, action)

    def advantage(self, i: int, action: sp.Expr = a, at: sp.Expr = x) -> sp.Expr:
        """q_i(x, a) = h (a - mu) dV/dx - lambda kappa ( (a - s)^2 - (mu - s)^2 - Sigma )."""
        u = self.step[i]
        more = (action - u.score(at)) ** 2 - (u.mean(at) - u.score(at)) ** 2 - u.Sigma
        return u.h * (action - u.mean(at)) * self.slope(i, at) - lam * u.kappa * more

    def derivative(self, expression: sp.Expr) -> sp.Expr:
        """d/dtheta in the direction (K_dot, k_dot), all parameters at once."""
        return sp.Add(*(sp.diff(expression, p) * p_dot for u in self.step for p, p_dot in ((u.K, u.K_dot), (u.k, u.k_dot))))

    @cached_property
    def best_steps(self) -> tuple[Step, ...]:
        """The steps with the optimal K_i, k_i, written with the letters M."""
        return self._optimum[0]

    @cached_property
    def best_values(self) -> tuple[Quadratic, ...]:
        """V*_0 ... V*_N."""
        return self._optimum[1]

    @cached_property
    def _optimum(self) -> tuple[tuple[Step, ...], tuple[Quadratic, ...]]:
        steps: list[Step] = []
        values = [self.reward]
        for u in reversed(self.step):
            steps.append(u.best(values[-1]))
            values.append(steps[-1].back(values[-1]))
        return tuple(reversed(steps)), tuple(reversed(values))

    def optimally(self, expression: sp.Expr) -> sp.Expr:
        """The expression at the optimal policy."""
        pairs = zip(self.step, self.best_steps, strict=True)
        return expression.xreplace({letter: formula for u, star in pairs for letter, formula in ((u.K, star.K), (u.k, star.k))})

    def at_pretrained(self, steps: Sequence[Step]) -> dict[sp.Symbol, sp.Expr]:
        """mu = s in these steps."""
        return {letter: pre for u in steps for letter, pre in ((u.K, u.K_pre), (u.k, u.k_pre))}

    def pretrained(self, expression: sp.Expr) -> sp.Expr:
        """The expression at the pre-trained policy."""
        return expression.xreplace(self.at_pretrained(self.step))


# ------------------------------------------------------------------------------------------------------ identities


@dataclass(frozen=True)
class Identity:
    """Two sides that should be the same."""

    chain: ScalarChain
    section: int
    statement: str
    left: sp.Expr
    right: sp.Expr

    @cached_property
    def difference(self) -> sp.Expr:
        """left - right as a sum of monomials; letters get their meaning one by one until nothing is left, denominators M are cleared."""
        out = sp.sympify(self.left - self.right)
        for letter, meaning in self.chain.meanings.items():
            if out.has(letter):
                out = eliminated(out, letter, meaning)
        return assembled(*terms(out))

    @property
    def holds(self) -> bool:
        return self.difference == 0

    def _repr_latex_(self) -> str:
        return rf"$\displaystyle {sp.latex(self.left)} = {sp.latex(self.right)}$"

    def __str__(self) -> str:
        return f"{'✓' if self.holds else '✗ FAILS'} {self.statement}"


@dataclass(frozen=True)
class Planted:
    """A wrong formula: not equal, but for values of the letters at which it cannot be seen (theory.md, section 16)."""

    identity: Identity
    unseen: str
    where: Mapping[sp.Symbol, sp.Expr]

    @cached_property
    def holds(self) -> bool:
        """True when it is rejected, and unseen where it is said to be."""
        return not self.identity.holds and not terms(self.identity.difference.xreplace(dict(self.where)))[1]

    def _repr_latex_(self) -> str:
        return rf"$\displaystyle {sp.latex(self.identity.left)} \neq {sp.latex(self.identity.right)}$"

    def __str__(self) -> str:
        return f"{'✓' if self.holds else '✗ FAILS'} rejected: {self.identity.statement} (unseen at {self.unseen})"


Page = list[Identity | Planted]


def joint_kl(chain: ScalarChain) -> sp.Expr:
    """KL of two dense Gaussian laws of (X_0, ..., X_N): the textbook formula, without steps, kappa or Girsanov."""

    def law(states: Sequence[sp.Expr]) -> tuple[sp.Matrix, sp.Matrix]:
        mean = sp.Matrix([assembled(*terms(chain.mean(state))) for state in states])
        second = sp.Matrix(len(states), len(states), lambda i, j: chain.mean(states[i] * states[j]))
        return mean, (second - mean * mean.T).applyfunc(lambda entry: assembled(*terms(entry)))

    def adjugate_and_det(matrix: sp.Matrix) -> tuple[sp.Matrix, sp.Expr]:
        ring_matrix = DomainMatrix.from_Matrix(matrix)
        adjugate, det = ring_matrix.adj_det()
        return adjugate.to_Matrix(), ring_matrix.domain.to_sympy(det)

    (m, C), (m_pre, C_pre) = law(chain.states), law([chain.pretrained(state) for state in chain.states])
    (_, det), (adjugate, det_pre), gap = adjugate_and_det(C), adjugate_and_det(C_pre), m - m_pre
    squared = (adjugate * C).trace() + (gap.T * adjugate * gap)[0]
    return (squared / det_pre - len(m) + sp.log(sp.cancel(det_pre / det))) / 2


def log_ratio(chain: ScalarChain) -> sp.Expr:
    """log dP_theta/dP_pre along a path of P_theta, from the logarithms of the Gaussian transition densities."""
    out = sp.S.Zero
    for u, at, then in zip(chain.step, chain.states, chain.states[1:], strict=False):
        here, pre = (at + (-u.f * at + u.h * action) * u.D for action in (u.mean(at), u.score(at)))
        out += ((then - pre) ** 2 - (then - here) ** 2) / (2 * eta**2 * u.g**2 * u.D)
    return out


def path_kl(chain: ScalarChain) -> Page:
    """Section 4: Girsanov on the chain (mean actions)."""
    here = list(zip(chain.step, chain.states, chain.moments, strict=False))
    girsanov = sp.Add(*(u.h * (u.mean(X) - u.score(X)) * u.B / (eta * u.g) + u.kappa * u.D * (u.mean(X) - u.score(X)) ** 2 for u, X, _ in here))
    xi, size = sp.symbols("xi u", real=True)
    density = sp.exp(-(xi**2) / 2) / sp.sqrt(2 * sp.pi)
    inverse = sp.integrate(sp.expand(sp.exp(-size * xi - size**2 / 2) * density), (xi, -sp.oo, sp.oo))

    def claim(statement: str, left: sp.Expr, right: sp.Expr = chain.path_kl) -> Identity:
        return Identity(chain, 4, statement, left, right)

    def sums(rate: Callable[[Step], sp.Expr]) -> sp.Expr:
        return sp.Add(*(rate(u) * u.departure(*law) for u, _, law in here))

    unit_steps = {u.D: sp.S.One for u in chain.step}
    page: Page = [
        claim("log dP/dP_pre of transition densities = sum h (mu - s) B/(eta g) + kappa D (mu - s)^2, path by path", log_ratio(chain), girsanov),
        claim("KL of the dense joint laws of X_0 ... X_N = sum kappa D E(mu - s)^2", joint_kl(chain)),
        claim("E log dP/dP_pre = sum kappa D E(mu - s)^2", chain.mean(log_ratio(chain))),
        claim("E dP_pre/dP = 1 in every step (Gaussian integral)", inverse, sp.S.One),
        Planted(claim("the sum without its time step", sums(lambda u: u.kappa)), "D = 1", unit_steps),
        Planted(claim("the variance without its time step", sums(lambda u: u.kappa * u.D**2)), "D = 1", unit_steps),
        Planted(claim("g^2/2 for kappa", sums(lambda u: u.g**2 * u.D / 2)), "eta = 1", {eta: sp.S.One}),
        Planted(claim("g^2 for kappa", sums(lambda u: u.g**2 * u.D)), "mu = s", chain.at_pretrained(chain.step))]
    if chain.steps > 1:
        of_pre = sp.Add(*(u.kappa * u.D * u.departure(*map(chain.pretrained, law)) for u, _, law in here))
        page.append(Planted(claim("states of the pre-trained chain", of_pre), "mu = s but in the last step", chain.at_pretrained(chain.step[:-1])))
    return page


def first_order(expression: sp.Expr, u: Step) -> sp.Expr:
    """lim expression/D as D -> 0 in this step, the others fixed, of what vanishes at D = 0: its derivative there."""
    return sp.diff(expression.xreplace({u.d: sp.exp(-rho * u.D)}), u.D).xreplace({u.D: sp.S.Zero})


def vanishing_step(expression: sp.Expr, u: Step) -> sp.Expr:
    """The expression at D = 0 in this step."""
    return expression.xreplace({u.d: sp.S.One, u.D: sp.S.Zero})


def value(chain: ScalarChain) -> Page:
    """Section 5: V by backward recursion, against expectations over paths."""
    N, u = chain.steps, chain.step[-1]

    def claim(statement: str, left: sp.Expr, right: sp.Expr) -> Identity:
        return Identity(chain, 5, statement, left, right)

    def residual(i: int, sign: int = -1, cost: Callable[[Step, sp.Expr], sp.Expr] = lambda u, _: u.cost(x, u.action(x))) -> sp.Expr:
        then = chain.path(i, x)[1]
        return chain.mean(chain.step[i].d * chain.value(i + 1, then) + sign * lam * cost(chain.step[i], then)) - chain.value(i)

    def stopped(i: int) -> sp.Expr:
        """What the martingale is at step i: costs so far, and V_i(X_i)."""
        paid = sp.Add(*(chain.discount(j) * v.cost(X, v.action(X)) for j, (v, X) in enumerate(zip(chain.step[:i], chain.states, strict=False))))
        return chain.mean(chain.discount(i) * chain.value(i, chain.states[i]) - lam * paid)

    V = chain.value(N)
    generator = (-u.f * x + u.h * u.mean(x)) * sp.diff(V, x) + eta**2 * u.g**2 / 2 * sp.diff(V, x, 2)
    running = lam * u.kappa * ((u.mean(x) - u.score(x)) ** 2 + u.Sigma)
    others = chain.pretrained(chain.value(0))
    return [
        *(claim(f"V_{i}(x) of the recursion = E[G_{i} | X_{i} = x] over paths", chain.value(i), chain.mean(chain.return_to_go(i, chain.path(i, x))))
          for i in range(N)),
        *(claim(f"temporal difference of step {i} has mean zero given X_{i} = x", residual(i), sp.S.Zero) for i in range(N)),
        *(claim(f"martingale: E[costs before step {i}, then V_{i}(X_{i})] = J of the moments", stopped(i), chain.objective) for i in range(N + 1)),
        claim("lim (V_{i+1} - V_i)/D = -( (-f x + h mu) V' + eta^2 g^2 V''/2 - lambda kappa (mu - s)^2 - rho V ), the PDE",
              first_order(V - chain.value(N - 1), u), -(generator - running - rho * V)),
        Planted(claim("cost added instead of subtracted", residual(N - 1, sign=1), sp.S.Zero), "lambda = 0", {lam: sp.S.Zero}),
        Planted(claim("cost at the right point", residual(N - 1, cost=lambda v, then: v.cost(then, v.action(then))), sp.S.Zero),
                "K = K_pre", {u.K: u.K_pre}),
        Planted(claim("the pre-trained policy's V", others, chain.value(0)), "mu = s", chain.at_pretrained(chain.step))]


def advantage(chain: ScalarChain) -> Page:
    """Section 6: q is the rate of Q - V, and centred (a chain with exploration)."""

    def claim(statement: str, left: sp.Expr, right: sp.Expr = sp.S.Zero) -> Identity:
        return Identity(chain, 6, statement, left, right)

    page: Page = []
    for i, u in enumerate(chain.step):
        Q_i, V_i, q, on_policy = chain.action_value(i), chain.value(i), chain.advantage(i), u.action(x)
        paths = chain.mean(chain.return_to_go(i, chain.path(i, x)))
        page += [
            claim(f"Q_{i}(x, a) at D = 0 is V_{i + 1}(x): no trace of the action", vanishing_step(Q_i, u), chain.value(i + 1)),
            claim(f"lim (Q_{i} - V_{i})/D = q_{i}, every x and a", first_order(Q_i - V_i, u), vanishing_step(q, u)),
            claim(f"E_(a ~ pi) q_{i} = 0: centred", chain.mean(q.xreplace({a: on_policy}))),
            claim(f"E_(a ~ pi) Q_{i} = E[G_{i} | X_{i} = x] over paths, at any D", chain.mean(Q_i.xreplace({a: on_policy})), paths)]
    u, q = chain.step[0], chain.advantage(0)
    steep = q + (u.g**2 - u.h) * (a - u.mean(x)) * chain.slope(0)
    rate = first_order(chain.action_value(0) - chain.value(0), u)
    page.append(Planted(claim("q with g^2 for h", rate, vanishing_step(steep, u)), "eta = 1", {eta: sp.S.One}))
    if chain.exploration:
        for statement, error in (("q without Sigma is not centred", 1), ("q with Sigma of the wrong sign is not centred", 2)):
            centre = chain.mean((q - error * lam * u.kappa * u.Sigma).xreplace({a: u.action(x)}))
            page.append(Planted(claim(statement, centre), "Sigma = 0", {u.Sigma: sp.S.Zero}))
    return page


def samples(chain: ScalarChain) -> list[tuple[str, sp.Expr]]:
    """What the estimators of section 7 compute along one path, in the direction (K_dot, k_dot), for mean actions."""
    X, now = chain.states, list(enumerate(chain.step))
    sigma = [u.score_noise(X[i]) for i, u in now]
    e = [chain.discount(i) * u.explicit(X[i], u.action(X[i])) for i, u in now]
    to_go = [chain.discount(i) * chain.return_to_go(i, X[i:]) for i in range(chain.steps + 1)]
    V = [chain.discount(i) * chain.value(i, at) for i, at in enumerate(X)]
    gain = [u.tangent(X[i]) * u.D * u.h for i, u in now]
    slope = [chain.discount(i) * chain.slope(i, at) for i, at in enumerate(X)]
    return [
        ("score function: sum sigma_i G + e_i", sp.Add(*(sigma[i] * to_go[0] + e[i] for i, _ in now))),
        ("reward-to-go: sum sigma_i G_{i+1} + e_i", sp.Add(*(sigma[i] * to_go[i + 1] + e[i] for i, _ in now))),
        ("baseline V: sum sigma_i (G_{i+1} - V_i(X_i)) + e_i", sp.Add(*(sigma[i] * (to_go[i + 1] - V[i]) + e[i] for i, _ in now))),
        ("temporal difference: sum sigma_i (V_{i+1}(X_{i+1}) - V_i(X_i)) + e_i", sp.Add(*(sigma[i] * (V[i + 1] - V[i]) + e[i] for i, _ in now))),
        ("value gradient: sum d mu h D V_{i+1}'(X_{i+1}) + e_i", sp.Add(*(gain[i] * slope[i + 1] + e[i] for i, _ in now)))]


def adjoint(chain: ScalarChain, lean: bool = False) -> sp.Expr:
    """Pathwise derivative by the adjoint p_N = r', p_i = (dX_{i+1}/dX_i) p_{i+1} - lambda dcost_i/dx; lean: the pre-trained slope, no cost."""
    p, out = chain.reward.w - chain.reward.S * chain.states[-1], sp.S.Zero
    for u, X in reversed(list(zip(chain.step, chain.states, strict=False))):
        out = u.d * (out + u.tangent(X) * u.D * u.h * p) + u.explicit(X, u.action(X))
        carried = u.d * sp.diff(u.move(x, u.score(x) if lean else u.action(x)), x) * p
        p = carried if lean else carried - lam * sp.diff(u.cost(x, u.action(x)), x).xreplace({x: X})
    return out


def stein(chain: ScalarChain, i: int) -> tuple[sp.Expr, sp.Expr]:
    """E[V_{i+1}'(X_{i+1}) | X_i = x]  and  E[V_{i+1}(X_{i+1}) B_i | X_i = x] / (eta g D)."""
    u, then = chain.step[i], chain.path(i, x)[1]
    return chain.mean(chain.slope(i + 1, then)), chain.mean(chain.value(i + 1, then) * u.B) / (eta * u.g * u.D)


def sampled_actions(chain: ScalarChain) -> Page:
    """Section 7 where actions are drawn: action noise, and the exact twin of the q form."""
    X, now = chain.states, list(enumerate(chain.step))
    gradient = chain.derivative(chain.objective)
    log_pi = [u.tangent(X[i]) * u.epsilon / u.Sigma for i, u in now]
    G = [chain.discount(i) * chain.return_to_go(i, X[i:]) for i in range(chain.steps + 1)]
    more = (chain.discount(i) * (chain.action_value(i, u.action(X[i]), X[i]) - chain.value(i, X[i])) for i, u in now)

    def claim(statement: str, sample: sp.Expr) -> Identity:
        return Identity(chain, 7, statement, chain.mean(sample), gradient)

    return [
        claim("action noise: sum grad log pi(a_i | X_i) G_i", sp.Add(*(score * G[i] for i, score in enumerate(log_pi)))),
        claim("q form: sum grad log pi(a_i | X_i) (Q_i - V_i)", sp.Add(*(score * gap for score, gap in zip(log_pi, more, strict=True)))),
        Planted(claim("action noise with G_{i+1}, the cost of the action lost", sp.Add(*(score * G[i + 1] for i, score in enumerate(log_pi)))),
                "lambda = 0", {lam: sp.S.Zero})]


def policy_gradient(chain: ScalarChain) -> Page:
    """Section 7: dJ/dtheta by differentiation of the moments, against the mean of every estimator (all parameters at once)."""
    gradient, X = chain.derivative(chain.objective), chain.states
    G = chain.return_to_go(0, X)
    sigma = sp.Add(*(u.score_noise(at) for u, at in zip(chain.step, X, strict=False)))
    e = sp.Add(*(chain.discount(i) * u.explicit(at, u.action(at)) for i, (u, at) in enumerate(zip(chain.step, X, strict=False))))
    reward = chain.discount(chain.steps) * chain.reward(X[-1])
    gaussian = {lam: sp.S.Zero}

    def claim(statement: str, left: sp.Expr, right: sp.Expr = gradient) -> Identity:
        return Identity(chain, 7, statement, left, right)

    def wrong(statement: str, sample: sp.Expr, unseen: str, where: Mapping[sp.Symbol, sp.Expr]) -> Planted:
        return Planted(claim(statement, chain.mean(sample)), unseen, where)

    def scored(weight: Callable[[Step], sp.Expr]) -> sp.Expr:
        return sp.Add(*(u.tangent(at) * weight(u) * u.B for u, at in zip(chain.step, X, strict=False))) * G + e

    page: Page = [
        *(claim(f"Stein: E[V_{i + 1}'(X_{i + 1}) | x] = E[V_{i + 1}(X_{i + 1}) B_{i} | x]/(eta g D)", *stein(chain, i)) for i in range(chain.steps)),
        *(claim(name, chain.mean(sample)) for name, sample in samples(chain)),
        claim("pathwise: the adjoint is the derivative of the return, path by path", adjoint(chain), chain.derivative(G)),
        claim("pathwise: E of the adjoint", chain.mean(adjoint(chain))),
        claim("E[ log dP/dP_pre sum sigma_i ] = d KL: k1 in the return", chain.mean(log_ratio(chain) * sigma), chain.derivative(chain.path_kl)),
        *sampled_actions(replace(chain, exploration=True)),
        wrong("(A) reward folding: the explicit derivative of the penalty forgotten", sigma * G, "lambda = 0", gaussian),
        wrong("(C) no KL gradient at all", sigma * reward, "mu = s", chain.at_pretrained(chain.step)),
        Planted(claim("k1 as a loss: E sum sigma_i", chain.mean(sigma), chain.derivative(chain.path_kl)), "mu = s", chain.at_pretrained(chain.step)),
        wrong("g for h/(eta g) in sigma", scored(lambda u: u.g), "eta = 1", {eta: sp.S.One}),
        wrong("sigma with a time step too few", scored(lambda u: u.h / (eta * u.g * u.D)), "D = 1", {u.D: sp.S.One for u in chain.step})]
    if chain.steps > 1:
        page += [
            wrong("(B) KL as a loss on detached states: costs not in the return", sigma * reward + e, "mu = s", chain.at_pretrained(chain.step)),
            wrong("lean adjoint taken for the gradient", adjoint(chain, lean=True), "K = K_pre: a shift", {u.K: u.K_pre for u in chain.step})]
    return page


def optimum(chain: ScalarChain) -> Page:
    """Section 9 (i): the LQ recursion, by completing the square, by differentiation, and by the gradient of the whole chain.

    The last step, where V*_N is any quadratic, is the induction step for all the others; the whole gradient is expanded for N <= 2
    only (monomials grow too fast).
    """
    u, star, later, V = chain.step[-1], chain.best_steps[-1], chain.best_values[-1], chain.best_values[-2]
    Q_last, best, slope = u.action_value(later, x, a), star.mean(x), sp.diff(later(x), x)
    ahead = u.d * chain.mean(slope.xreplace({x: u.move(x, best)}))
    small = u.score(x) + u.h * slope / (2 * lam * u.kappa)
    limit = vanishing_step(best.xreplace({u.M: u.curvature(later)}), u)

    def claim(statement: str, left: sp.Expr, right: sp.Expr = sp.S.Zero) -> Identity:
        return Identity(chain, 9, statement, left, right)

    whole = [claim("dJ = 0 at K*, k*, in every direction", chain.optimally(chain.derivative(chain.objective)))] if chain.steps <= 2 else []
    return [
        claim("completing the square: Q*_i(x, a) = V*_i(x) - D M (a - a*)^2/2", Q_last, V(x) - u.D * u.M * (a - best) ** 2 / 2),
        claim("dQ*_i/da = 0 at a* = [ 2 lambda kappa s + h (w - S (1 - D f) x) ]/M", sp.diff(Q_last, a).xreplace({a: best})),
        claim("2 lambda kappa (a* - s) = h E[ V*_{i+1}'(X_{i+1}) | x ]", 2 * lam * u.kappa * (best - u.score(x)), u.h * ahead),
        *whole,
        claim("lim a* = s + h/(2 lambda kappa) V' as D -> 0", limit, small),
        Planted(claim("the continuous optimum on the chain", small, best), "D = 0", {u.D: sp.S.Zero, u.d: sp.S.One}),
        Planted(claim("a* = s + V'/lambda as D -> 0", limit, u.score(x) + slope / lam), "eta = 1", {eta: sp.S.One}),
        Planted(claim("lambda for 1/lambda", limit, u.score(x) + lam * u.h * slope / (2 * u.kappa)), "lambda = 1", {lam: sp.S.One})]


SECTIONS: dict[str, Callable[[ScalarChain], Page]] = {
    "4  path KL: Girsanov on the chain": path_kl,
    "5  value: the martingale and its PDE": value,
    "6  advantage: the rate q, of sampled actions": lambda chain: advantage(replace(chain, exploration=True)),
    "7  policy gradient: one gradient, many estimators": policy_gradient,
    "9  optimum: the linear-quadratic recursion": optimum}


# ---------------------------------------------------------------------------------------------------------- numbers


def numbers(problem: Problem, policy: Policy, grid: TimeGrid) -> dict[sp.Symbol, sp.Float]:
    """Every letter of ScalarChain(grid.steps, exploration) as a number of 40 digits (but x and a): those that a problem states, then meanings.

    Assumes d = 1, Gaussian data, a policy affine in x, an at most quadratic reward, eta > 0, no entropy weight (ValueError otherwise).
    Source: theory.md, section 1.   Checked: tests/test_symbolic.py::test_numbers_are_the_exact_solvers
    """
    if problem.dim != 1 or not applies(problem, policy, grid) or problem.entropy_weight:
        raise ValueError(f"problem: expected dimension 1, Gaussian data, an affine policy, a quadratic reward and no entropy weight, got dimension "
                         f"{problem.dim}, {type(problem.data).__name__}, {type(policy).__name__}, {type(problem.reward).__name__}, "
                         f"entropy_weight {problem.entropy_weight:g}")
    problem.require_path_kl()
    co, parts, spread = problem.coefficients(grid), policy.parts(grid), policy.exploration_cov(grid)
    start, r = problem.start_law, problem.reward.quadratic(1)
    chain = ScalarChain(grid.steps, exploration=spread is not None)
    stated = {eta: problem.eta, lam: problem.kl_weight, rho: problem.discount, m_start: start.mean[0], P_start: start.cov[0, 0],
              Q: r.matrix[0, 0], b: r.vector[0], r0: r.constant}
    for i, u in enumerate(chain.step):
        K_pre, k_pre = problem.affine_score(float(grid.times[i]))
        stated |= {u.D: co.dt[i], u.f: co.f[i], u.K: parts.K[i, 0, 0], u.k: parts.k[i, 0], u.K_pre: K_pre[0, 0], u.k_pre: k_pre[0]}
        stated |= {u.Sigma: spread[i, 0, 0]} if spread is not None else {}
    out = {letter: sp.Float(number, DIGITS) for letter, number in stated.items()}
    for u, g2 in zip(chain.step, co.g2, strict=True):
        out |= {u.g: sp.sqrt(sp.Float(g2, DIGITS)), u.d: sp.exp(-out[rho] * out[u.D])}
    for letter, meaning in reversed(chain.meanings.items()):
        out[letter] = meaning.xreplace(out)
    return out


def substitute(expression: sp.Expr, values: Mapping[sp.Symbol, sp.Expr | float]) -> float:
    """The number that an expression is; ValueError where a letter has no value."""
    out = sp.sympify(expression).xreplace({letter: sp.Float(value, DIGITS) for letter, value in values.items()})
    if missing := sorted(map(str, out.free_symbols)):
        raise ValueError(f"values: expected a number for every letter, got none for {', '.join(missing)}")
    return float(out)


@dataclass(frozen=True)
class Options:
    """The identities of the scalar chain, derived."""

    steps: int = 2
    """Steps of the chain: 1 takes two seconds, 2 twenty, 3 two minutes."""


def main(options: Options) -> int:
    """Print the page; 1 if anything on it fails."""
    print(f"Identities of the scalar Gaussian chain of {options.steps} steps, derived with symbols (sections of theory.md)")
    held = True
    for title, section in SECTIONS.items():
        print(f"\n{title}")
        for row in section(ScalarChain(options.steps)):
            held = held and row.holds
            print(f"  {row}", flush=True)
    print("\nAll hold." if held else "\nSomething FAILS.")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
