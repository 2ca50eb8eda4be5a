"""The race of algorithms: its class of diagonal policies, its table, and a short run that resumes."""

from __future__ import annotations

import ctrl
import numpy as np
import pandas as pd
from analysis import regret
from ctrl import exact


def test_the_diagonal_basis_is_linear_and_its_adjoint_is_right():
    problem, policy, grid = regret.Course(ctrl.zoo.gaussian_8d, diagonal=True).set(3)
    basis, rng = policy.basis, np.random.default_rng(0)
    theta, K, k = rng.standard_normal(32), rng.standard_normal((8, 8)), rng.standard_normal(8)
    W, w = basis.apply(0.6, theta)
    assert np.count_nonzero(W - np.diag(np.diag(W))) == 0
    np.testing.assert_allclose(np.sum(W * K) + w @ k, basis.adjoint(0.6, K, k) @ theta)
    x, u = rng.standard_normal((2, 5, 8))
    np.testing.assert_allclose(basis.vjp(0.6, x, u), basis.adjoint(0.6, u[:, :, None] * x[:, None, :], u))
    at = policy.with_theta(0.1 * theta)
    up, down = (exact.evaluate(problem, at.with_theta(at.theta + s * 1e-5 * theta), grid).objective for s in (1, -1))
    np.testing.assert_allclose(exact.evaluate(problem, at, grid).gradient.theta @ theta, (up - down) / 2e-5, rtol=1e-6)


def test_the_table_says_when_one_percent_is_kept():
    row = {"course": "c", "algorithm": "a", "step": 0.1, "of_class": 0.2, "within": [2.0, 0.1, 0.01], "queries": [0, 5, 10],
           "evaluations": [0, 50, 100], "seconds": [0.0, 0.1, 0.2], "reached": 2}
    lost = {**row, "within": [2.0, None, None], "reached": None}
    one = regret.table(pd.DataFrame([row]), {"c": 0.02}).iloc[0]
    assert one["queries to 1 %"] == 10 and one["seconds to 1 %"] == 0.2
    assert np.isclose(one["left (%)"], 0.5) and np.isclose(one["tilt (%)"], 1.0)
    two = regret.table(pd.DataFrame([lost, lost, row]), {"c": 0.0}).iloc[0]
    assert np.isinf(two["queries to 1 %"]) and two["lost seeds"] == 2 and one["lost seeds"] == 0
    assert list(regret.shares([2.0, None])) == [1.0, np.inf]


def test_a_step_is_kept_where_its_regret_is():
    def rows(last):
        return pd.DataFrame([{"algorithm": name, "N": n, "factor": f, "step": f, "share": share * (1 if f == 1 else 2)}
                             for name in regret.ALGORITHMS for n, share in ((10, 0.02), (1000, last)) for f in regret.FACTORS])

    assert regret.transferred(rows(0.03)).keeps.all() and not regret.transferred(rows(0.3)).keeps.any()


def test_a_race_resumes_and_is_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(regret, "ALGORITHMS", {name: regret.ALGORITHMS[name] for name in ("Pathwise", "RewardWeighted")})
    study = regret.Study(out=tmp_path, quick=True)
    rows = regret.main(study)
    assert len(rows) == 6 and (tmp_path / "gaussian_pull_2d.png").stat().st_size > 10_000
    text = (tmp_path / "table.txt").read_text()
    assert "Pathwise" in text and "keeps" in text
    monkeypatch.setattr(regret, "raced", None)                                # nothing is left to compute
    monkeypatch.setattr(regret, "found", None)
    assert regret.main(study).equals(rows)
