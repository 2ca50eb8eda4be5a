"""Noise: known answers, an independent NumPy specification, invariances, quadrature, and statistical quality.

Statistical tests have a false-alarm rate of 1e-6 each (shared among their statistics) and say the smallest error that they
catch with probability 0.99 (8 standard errors); each rejects a planted error of the kind it is for.
"""

from __future__ import annotations

import types

import ctrl
import numpy as np
import pytest
from ctrl import Gaussian, Noise, TimeGrid
from ctrl.kernels import normals
from ctrl.noise import ArrayNoise, CoarsenedNoise
from scipy import stats

Z = stats.norm.isf(0.5e-6)

# kat_vectors of Random123, "philox4x32 10": counter, key, answer
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


# ---- specification: NumPy, written from the formulas, sharing nothing with the kernels ------------------------------------
def spec_words(seed, path, group, lane):
    """Philox4x32-10 of counter (path, group, lane) under the key `seed`; arrays of Python ints in uint64."""
    low = np.uint64(0xFFFFFFFF)
    c = [path & low, path >> np.uint64(32), np.full_like(path, group), np.full_like(path, lane)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), b & low, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), a & low]
        k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
    return c


def spec_box_muller(wa, wb):
    """Extended precision; the angle is reduced to [-pi/4, pi/4] exactly, log u near 1 is log1p."""
    wide = np.longdouble
    u, v = (wa.astype(wide) + wide(0.5)) / wide(2) ** 32, (wb.astype(wide) + wide(0.5)) / wide(2) ** 32
    radius = np.sqrt(-2 * np.log1p(u - 1))
    turn = np.rint(4 * v)
    x = 2 * wide("3.14159265358979323846264338327950288") * (v - turn / 4)
    cos, sin, q = np.cos(x), np.sin(x), turn.astype(int) % 4
    return radius * np.choose(q, [cos, -sin, -cos, sin]), radius * np.choose(q, [sin, cos, -sin, -cos])


def spec_normals(seed, paths, stream, steps, dim):
    out = np.empty((len(paths), steps, dim), np.longdouble)
    for m in range(-(-steps // 4)):
        for j in range(dim):
            w = spec_words(seed, paths, m, j | stream << 28)
            four = [*spec_box_muller(w[0], w[1]), *spec_box_muller(w[2], w[3])]
            for r in range(min(4, steps - 4 * m)):
                out[:, 4 * m + r, j] = four[r]
    return out


def ulps(got, expected):
    return float(np.max(np.abs(got - expected) / np.spacing(np.abs(expected).astype(got.dtype))))


# ---- words and normals -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    c, k = [int(w, 16) for w in counter.split()], [int(w, 16) for w in key.split()]
    out = np.empty((1, 4), np.uint32)
    seed, path = np.uint64(k[0] | k[1] << 32), np.uint64(c[0] | c[1] << 32)
    normals.fill_words(seed, path, np.uint64(2**64 - 1), np.uint32(c[2]), np.uint32(c[3]), out)
    assert [f"{w:08x}" for w in out[0]] == answer.split()
    spec = spec_words(int(seed), np.array([path]), c[2], c[3])
    assert [f"{int(w[0]):08x}" for w in spec] == answer.split()


@pytest.mark.parametrize("first", [0, 2**32 - 300])
def test_specification(first):
    seed, paths = 0x0123456789ABCDEF, 20_000
    noise = Noise(seed, paths, first=first)
    index = np.arange(first, first + paths, dtype=np.uint64)
    out = np.empty((paths, 4), np.uint32)
    normals.fill_words(np.uint64(seed), np.uint64(first), np.uint64(2**64 - 1), np.uint32(3), np.uint32(5), out)
    assert np.array_equal(out, np.stack(spec_words(seed, index, 3, 5), axis=1))
    for stream, got in ((normals.STEP, noise.steps(6, 3)), (normals.START, noise.start(2)[:, None]),
                        (normals.ACTION, noise.actions(5, 2))):
        expected = spec_normals(seed, index, stream, *got.shape[1:])
        assert ulps(got, expected) < 4
        single = np.empty(got.shape, np.float32)
        normals.fill_normals(np.uint64(seed), np.uint64(first), 0, stream, single)
        assert ulps(single, expected) < 6


def test_extreme_words():
    """The ends of both uniforms, and the octant borders: no NaN, no infinity, full relative accuracy."""
    edges = np.array([0, 1, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 3037000499, 3037000500, 2**32 - 2, 2**32 - 1])
    wa, wb = (w.ravel() for w in np.meshgrid(edges, edges))
    rows = np.stack([np.resize(wa, normals.LANES), np.resize(wb, normals.LANES)]).astype(np.uint32)
    expected = spec_box_muller(*rows)
    for compiled, dtype in ((normals.box_muller_64, np.float64), (normals.box_muller_32, np.float32)):
        got = np.empty((2, normals.LANES), dtype)
        compiled(rows.ravel(), normals.ROW_0, normals.ROW_1, got.ravel(), normals.ROW_0, normals.ROW_1)
        assert np.all(np.isfinite(got))
        assert max(ulps(got[0], expected[0]), ulps(got[1], expected[1])) < 4


# ---- invariances -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("antithetic", [False, True])
def test_slices_are_windows(antithetic):
    noise = Noise(7, 1030, antithetic)
    whole = noise.start(2), noise.steps(9, 2), noise.actions(3, 2), noise.component([0.2, 0.3, 0.5])
    for cuts in ([0, 2, 258, 1030], [0, 256, 512, 1028, 1030]):
        parts = [noise[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        pieces = [(p.start(2), p.steps(9, 2), p.actions(3, 2), p.component([0.2, 0.3, 0.5])) for p in parts]
        for kind in range(4):
            assert np.array_equal(np.concatenate([p[kind] for p in pieces]), whole[kind])


def test_number_depends_on_its_coordinates_alone():
    noise = Noise(7, 300)
    assert np.array_equal(noise.steps(9, 5)[:, :6, :2], noise.steps(6, 2))
    assert np.array_equal(Noise(7, 100_000).steps(2, 1)[:300], noise.steps(2, 1))
    streams = noise.start(1), noise.steps(1, 1)[:, 0], noise.actions(1, 1)[:, 0], Noise(8, 300).start(1)
    assert len({tuple(s.ravel()) for s in streams}) == 4


def test_antithetic():
    noise, plain = Noise(7, 514, antithetic=True), Noise(7, 514)
    assert (noise.group, plain.group, plain.weights) == (2, 1, None)
    for drawn, free in ((noise.start(3), plain.start(3)), (noise.steps(5, 2), plain.steps(5, 2)), (noise.actions(5, 2), plain.actions(5, 2))):
        assert np.array_equal(drawn[::2], free[::2])
        assert np.array_equal(drawn[1::2], -drawn[::2])
    half = noise.component([0.5, 0.5])
    assert np.array_equal(half[1::2], 1 - half[::2])


def test_coarsening_adds_increments():
    fine = TimeGrid(np.array([0, 0.1, 0.15, 0.4, 0.6, 0.7, 1.0]))
    noise, coarse = Noise(3, 400), fine.coarsened(3)
    thin = noise.coarsened(fine, 3)
    for draw in ("steps", "actions"):
        increments = np.sqrt(fine.dt)[:, None] * getattr(noise, draw)(6, 2)
        expected = increments.reshape(400, 2, 3, 2).sum(axis=2) / np.sqrt(coarse.dt)[:, None]
        assert np.allclose(getattr(thin, draw)(2, 2), expected, rtol=0, atol=1e-14)
        assert np.array_equal(getattr(thin[100:200], draw)(2, 2), getattr(thin, draw)(2, 2)[100:200])
    assert np.array_equal(thin.start(2), noise.start(2))
    assert np.array_equal(thin.component([0.5, 0.5]), noise.component([0.5, 0.5]))


# ---- quadrature ------------------------------------------------------------------------------------------------------------
def case(dim=1, eta=1.0, explores=False, components=None):
    """As much of a problem and a policy as quadrature asks for."""
    law = Gaussian(np.zeros(dim), np.eye(dim)) if components is None else types.SimpleNamespace(weights=np.array(components))
    problem = types.SimpleNamespace(dim=dim, eta=eta, start_law=law)
    factor = np.eye(dim) if explores else None
    return problem, types.SimpleNamespace(exploration_factor=lambda grid: factor), TimeGrid.uniform(2, 1.0)


def variables(noise, grid, dim):
    parts = [noise.start(dim)[:, None], noise.steps(grid.steps, dim), noise.actions(grid.steps, dim)]
    return np.concatenate(parts, axis=1).reshape(noise.paths, -1)


def moment(*powers):
    """E prod xi_v^power_v."""
    return float(np.prod([0 if p % 2 else np.prod(np.arange(p - 1, 0, -2.0)) for p in powers]))


def test_signs_integrate_cubics():
    problem, policy, grid = case(dim=2, explores=True)
    noise = Noise.signs(problem, policy, grid)
    x = variables(noise, grid, 2)
    assert noise.paths == 2**10 and noise.group == 1 and np.ptp(noise.weights) == 0
    rng = np.random.default_rng(0)
    for _ in range(50):
        powers = rng.integers(0, 4, size=10)
        assert noise.weights @ np.prod(x**powers, axis=1) == pytest.approx(moment(*powers), abs=1e-14)
    assert noise.weights @ x[:, 3] ** 4 != pytest.approx(moment(4))


@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 6])
def test_gauss_hermite_degree(nodes):
    problem, policy, grid = case()
    noise = Noise.gauss_hermite(problem, policy, grid, nodes=nodes)
    x = variables(noise, grid, 1)[:, :3]
    assert noise.paths == nodes**3
    for power in range(2 * nodes):
        for v in range(3):
            assert noise.weights @ x[:, v] ** power == pytest.approx(moment(power), rel=1e-12, abs=1e-12)
    assert noise.weights @ x[:, 1] ** (2 * nodes) != pytest.approx(moment(2 * nodes), rel=1e-3)


def test_quadrature_asks_for_what_matters():
    still, policy, grid = case(eta=0.0)
    noise = Noise.signs(still, policy, grid)
    assert noise.paths == 2 and not noise.steps(2, 1).any() and not noise.actions(2, 1).any()
    mixed, policy, grid = case(components=[0.25, 0.75])
    noise = Noise.signs(mixed, policy, grid)
    component = noise.component([0.25, 0.75])
    assert noise.paths == 2 * 2**3
    assert noise.weights @ component == pytest.approx(0.75, abs=1e-15)
    assert noise.weights @ (component * noise.start(1)[:, 0] ** 2) == pytest.approx(0.75, abs=1e-15)
    part = noise[3:11]
    assert np.array_equal(part.steps(2, 1), noise.steps(2, 1)[3:11]) and np.array_equal(part.weights, noise.weights[3:11])


# ---- quality: 2^20 normals a test; z statistics of exact variance ----------------------------------------------------------
COUNT = 2**20
FAULTS = {
    "scaled by 1.01": lambda x: 1.01 * x,
    "shifted by .01": lambda x: x + 0.01,
    "uniform, not normal": lambda x: (stats.norm.cdf(x) - 0.5) * np.sqrt(12),
}


def moment_z(x):
    """z of the first four Hermite means: each catches an error of 8 sqrt(k! / 2^20), .008 to .038."""
    he = [x, x**2 - 1, x**3 - 3 * x, x**4 - 6 * x**2 + 3]
    return [float(h.mean() / np.sqrt(f / x.size)) for h, f in zip(he, (1, 2, 6, 24), strict=True)]


def test_moments_and_law():
    """Kolmogorov-Smirnov at 1e-6 catches a distance of about .004."""
    x = Noise(11, COUNT // 16).steps(8, 2).ravel()
    assert np.max(np.abs(moment_z(x))) < stats.norm.isf(0.5e-6 / 4)
    assert stats.kstest(x, "norm").pvalue > 1e-6
    for name, plant in FAULTS.items():
        assert np.max(np.abs(moment_z(plant(x)))) > Z, name
    assert stats.kstest(FAULTS["shifted by .01"](x), "norm").pvalue < 1e-6


def correlations_z(x):
    """z of correlations between neighbours along paths, steps and coordinates, and of their squares; x (n, k, d)."""
    out = []
    for y in (x, (x**2 - 1) / np.sqrt(2)):
        pairs = [(y[:-lag], y[lag:]) for lag in (1, 2, 8, 256)]
        pairs += [(y[:, :-lag], y[:, lag:]) for lag in (1, 2, 3, 4)] + [(y[..., :-1], y[..., 1:])]
        out += [float((a * b).sum() / np.sqrt(a.size)) for a, b in pairs]
    return np.array(out)


def test_no_correlation():
    """18 correlations; each catches .008 to .011 (8 standard errors of 1/sqrt(2^20) to 1/sqrt(2^19))."""
    x = Noise(12, COUNT // 32).steps(8, 4)
    bound = stats.norm.isf(0.5e-6 / 18)
    assert np.max(np.abs(correlations_z(x))) < bound
    stuck = x.copy()
    stuck[:, 5] = stuck[:, 4]  # one word used twice
    assert np.max(np.abs(correlations_z(stuck))) > bound
    lanes = x.copy()
    lanes[8::16] = lanes[:-8:16]  # a lane counter that wraps
    assert np.max(np.abs(correlations_z(lanes))) > bound
    radius = x.copy()
    radius[:, 1::2] = np.sign(x[:, 1::2]) * np.abs(x[:, ::2])  # dependent, uncorrelated: only the squares see it
    assert np.max(np.abs(correlations_z(radius))) > bound


def test_streams_and_seeds_are_independent():
    """Each correlation catches .016 (8 / sqrt(2^18))."""
    n = 2**18
    draws = [Noise(5, n).start(1)[:, 0], Noise(5, n).steps(1, 1)[:, 0, 0], Noise(5, n).actions(1, 1)[:, 0, 0],
             Noise(6, n).start(1)[:, 0], Noise(5 + 2**32, n).start(1)[:, 0]]
    z = np.array([draws[i] @ draws[j] / np.sqrt(n) for i in range(5) for j in range(i)])
    assert np.max(np.abs(z)) < stats.norm.isf(0.5e-6 / z.size)
    assert abs(draws[0] @ (0.98 * draws[1] + 0.2 * draws[0])) / np.sqrt(n) > Z


def test_components_have_their_weights():
    """z of each frequency catches an error of 8 sqrt(w (1-w) / 2^18), at most .008."""
    n, weights = 2**18, np.array([0.1, 0.2, 0.7])
    for antithetic in (False, True):
        drawn = Noise(9, n, antithetic).component(weights)
        pairs = np.stack([drawn[::2] == m for m in range(3)]) * 0.5 + np.stack([drawn[1::2] == m for m in range(3)]) * 0.5
        z = (pairs.mean(axis=1) - weights) / (pairs.std(axis=1) / np.sqrt(n / 2))
        assert np.max(np.abs(z)) < stats.norm.isf(0.5e-6 / 3)
        wrong = np.array([0.12, 0.18, 0.7])
        assert np.max(np.abs((pairs.mean(axis=1) - wrong) / (pairs.std(axis=1) / np.sqrt(n / 2)))) > Z


# ---- errors ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("make", "message"), [
    (lambda: Noise(-1, 10), r"seed: expected an integer in \[0, 2\^64\), got -1"),
    (lambda: Noise(2**64, 10), "seed: expected"),
    (lambda: Noise(1.5, 10), "seed: expected"),
    (lambda: Noise(0, 0), "paths: expected an integer >= 1, got 0"),
    (lambda: Noise(0, 3, antithetic=True), "paths: expected whole antithetic pairs"),
    (lambda: Noise(0, 4, antithetic=True)[1:3], "expected even bounds"),
    (lambda: Noise(0, 4)[5:9], "non-empty slice"),
    (lambda: Noise(0, 4)[2], "expected a slice of paths, got 2"),
    (lambda: Noise(0, 4).steps(0, 1), "k: expected an integer >= 1, got 0"),
    (lambda: Noise(0, 4).coarsened(TimeGrid.uniform(6, 1.0), 4), "factor: expected a divisor of the fine grid's 6 steps, got 4"),
    (lambda: CoarsenedNoise(Noise(0, 4), TimeGrid.uniform(6, 1.0), 2).steps(6, 1), "k: expected the coarse grid's 3 steps"),
    (lambda: Noise.gauss_hermite(*case(dim=3, explores=True), nodes=4), r"4\^15 .*reduce the steps"),
    (lambda: Noise.signs(*case()).steps(3, 1), "expected the rule's"),
])
def test_errors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_any_64_bit_seed_runs():
    assert np.all(np.isfinite(Noise(2**64 - 1, 5).steps(3, 1)))


# ------------------------------------------------------------------------------------------- arrays, cross rules, Sobol points, choices


def small_chain(sampled=False, start="prior"):
    problem = ctrl.zoo.gaussian_pull_2d(0.7)
    policy = ctrl.BasisPolicy.shift(problem, [0.1, 0.2], 0.3 * np.eye(2) if sampled else None)
    return problem, policy, problem.grid(3)


def all_normals(noise, sampled):
    parts = [noise.start(2), noise.steps(3, 2).reshape(noise.paths, -1)]
    return np.concatenate(parts + ([noise.actions(3, 2).reshape(noise.paths, -1)] if sampled else []), axis=1)


@pytest.mark.parametrize("sampled", [False, True])
def test_cross_integrates_cubics_in_all_variables_together(sampled):
    """1, y, yy', yyy' to rounding; the fourth moments are those of another law (planted)."""
    noise = Noise.cross(*small_chain(sampled))
    y, w = all_normals(noise, sampled), noise.weights
    assert noise.paths == 2 * y.shape[1] == 2 * (8 + 6 * sampled) and abs(w.sum() - 1) < 1e-14
    np.testing.assert_allclose(w @ y, 0, atol=1e-14)
    np.testing.assert_allclose(np.einsum("n,na,nb->ab", w, y, y), np.eye(y.shape[1]), atol=1e-13)
    np.testing.assert_allclose(np.einsum("n,na,nb,nc->abc", w, y, y, y), 0, atol=1e-13)
    fourth = np.einsum("n,na,nb->ab", w, y**2, y**2)
    assert fourth[0, 0] > 3.5 and fourth[0, 1] == 0


def test_array_noise_is_sliced_and_says_what_it_lacks():
    noise = Noise.cross(*small_chain())
    part = noise[2:5]
    assert part.paths == 3 and np.array_equal(part.start(2), noise.start(2)[2:5]) and np.array_equal(part.weights, noise.weights[2:5])
    for ask in (lambda: noise.actions(3, 2), lambda: noise.component([1.0]), lambda: noise.choice([1.0]), lambda: noise.steps(4, 2)):
        with pytest.raises(ValueError, match="noise: expected"):
            ask()


def test_array_noise_says_what_it_expects():
    start, steps = np.zeros((4, 2)), np.zeros((4, 3, 2))
    for given, message in (({"weights": np.ones(3)}, "weights"), ({"group": 3}, "group"), ({"group": 2, "weights": np.ones(4)}, "group"),
                           ({"action_normals": np.zeros((4, 2, 2))}, "action_normals")):
        with pytest.raises(ValueError, match=message):
            ArrayNoise(start, steps, **given)
    with pytest.raises(ValueError, match="step_normals"):
        ArrayNoise(start, steps[:3])
    assert ArrayNoise(start, steps, group=2).group == 2


def test_sobol_replicates_are_unbiased_and_narrow():
    """Every coordinate of every replicate: uniform in each of its 64 cells; means of y and y^2 far closer than 64 independent ones."""
    noise = Noise.sobol(*small_chain(sampled=True), seed=5, points=64, replicates=20)
    y = all_normals(noise, True).reshape(20, 64, -1)
    cells = np.floor(stats.norm.cdf(y) * 64).astype(int)
    assert np.array_equal(np.sort(cells, axis=1), np.broadcast_to(np.arange(64)[None, :, None], cells.shape))
    assert np.all(y.mean(axis=1).std(axis=0) < 0.3 / 8) and np.all((y**2).mean(axis=1).std(axis=0) < 0.5 * np.sqrt(2) / 8)
    first = y[:, 0].ravel()  # one path of each replicate: independent normals
    assert stats.kstest(first, "norm").pvalue > 1e-6
    assert not np.array_equal(y[0], y[1]) and noise.group == 64 and noise.weights is None
    assert np.any(np.sort(np.floor(stats.norm.cdf(y**2 - 1) * 64).astype(int), axis=1) != np.arange(64)[None, :, None])  # planted: not normal


def test_sobol_slices_are_windows():
    noise = Noise.sobol(*small_chain(sampled=True), seed=5, points=32, replicates=3)
    for begin, end in ((0, 96), (0, 10), (10, 40), (31, 65), (64, 96)):
        part = noise[begin:end]
        np.testing.assert_array_equal(all_normals(part, True), all_normals(noise, True)[begin:end])
        np.testing.assert_array_equal(part.component([0.3, 0.7]), noise.component([0.3, 0.7])[begin:end])
        np.testing.assert_array_equal(part[1:5].choice([0.5, 0.5]), noise.choice([0.5, 0.5])[begin + 1 : begin + 5])


@pytest.mark.parametrize(("points", "replicates", "message"), [(48, 4, "points"), (1, 4, "points"), (64, 1, "replicates")])
def test_sobol_says_what_it_expects(points, replicates, message):
    with pytest.raises(ValueError, match=message):
        Noise.sobol(*small_chain(), seed=0, points=points, replicates=replicates)
    with pytest.raises(ValueError, match="exploration"):
        Noise.sobol(*small_chain(), seed=0, points=64).actions(3, 2)
    with pytest.raises(ValueError, match="shape"):
        Noise.sobol(*small_chain(), seed=0, points=64).steps(4, 2)


@pytest.mark.parametrize("make", [lambda: Noise(3, 2**15), lambda: Noise.sobol(*small_chain(), seed=3, points=2**11, replicates=16)])
def test_choices_have_their_probabilities_and_nothing_to_do_with_components(make):
    """Counts of the joint table, chi-square at 1e-6; a choice that is the component itself fails it (planted)."""
    noise, odds, weights = make(), np.array([0.2, 0.5, 0.3]), np.array([0.4, 0.6])
    expected = noise.paths * np.outer(odds, weights)

    def distance(choice):
        table = np.zeros_like(expected)
        np.add.at(table, (choice, noise.component(weights)), 1)
        return np.sum((table - expected) ** 2 / expected)

    limit = stats.chi2.isf(1e-6, 5)
    assert distance(noise.choice(odds)) < limit < distance(noise.component(odds))


def test_antithetic_partners_share_their_choice():
    steps = Noise(3, 1000, antithetic=True).choice(np.full(5, 0.2))
    assert np.array_equal(steps[0::2], steps[1::2]) and len(set(steps)) == 5


def test_choices_of_a_rule_are_a_product():
    """Weights p_k w_j, every pattern with every choice; of a whole rule only, and asked with the same weights."""
    signs, odds = Noise.signs(*small_chain()), np.array([0.2, 0.5, 0.3])
    rule = signs.choosing(odds)
    assert rule.paths == 3 * signs.paths and abs(rule.weights.sum() - 1) < 1e-12
    for k in range(3):
        at = rule.choice(odds) == k
        np.testing.assert_allclose(rule.weights[at], odds[k] * signs.weights, rtol=1e-14)
        np.testing.assert_array_equal(rule.start(2)[at], signs.start(2))
    for ask in (lambda: signs.choice(odds), lambda: rule.choice(odds[::-1]), lambda: rule.choosing(odds), lambda: signs[:8].choosing(odds)):
        with pytest.raises(ValueError, match="noise|weights"):
            ask()
