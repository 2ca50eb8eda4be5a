r"""The compiled chain beside its peers, in path-steps per core-second: committed rows of one run on one pinned core (benchmarks/engine.py).

a: W1, VP, Gaussian data, 1000 steps, d = 1, 2, 8: million path-steps per core-second, every version's law checked against the exact one to
5.5 standard errors before it is timed. b: how much faster than each peer, or slower: two C++ loops with the same counter-based noise and
one with a faster lane generator, NumPy, torch, torchsde, jax and diffrax; bars reach over d = 1, 2, 8.

Expected:
    C++ Philox, float32, d = 1        2.03 +- 0.01
    C++ Philox, float64, d = 8        1.814 +- 0.001
    C++ lanes, float32, d = 1         0.746 +- 0.001
    torchsde, float32, d = 2          56.62 +- 0.01
    NumPy, float64, d = 1             5.108 +- 0.001
    jax scan, float32, d = 2          6.452 +- 0.001
    diffrax, float32, d = 1           5.437 +- 0.001
    largest z of a law                0 +- 5.5
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from ctrl.theorems.style import BLUE, ORANGE

from paper_figures.house import look, page, publish

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = Path(__file__).stem
ROWS = Path(__file__).parents[1] / "benchmarks" / "engine" / "engine.csv"
OURS = "ctrl.simulate"
PEERS = (("C++ lanes", 32), ("C++ lanes", 64), ("C++ Philox", 64), ("C++ Philox", 32), ("torch eager", 32), ("NumPy", 64), ("jax scan", 32),
         ("diffrax", 32), ("torchsde, tree sized to dt", 32), ("torchsde", 32))
DIMS = (1, 2, 8)


def rows(quick: bool) -> pd.DataFrame:
    """dim, version, bits, rate, largest_z of W1's diagonal chains, and the ratio of our rate at as many bits; the faster C++ Philox is taken."""
    found = pd.read_csv(ROWS)
    found = found[found.workload.isin([f"W1 d={d}" for d in DIMS])]
    found = found.assign(dim=found.workload.str.removeprefix("W1 d=").astype(int), version=found.version.replace("C++ Philox, wide", "C++ Philox"))
    best = found.loc[found.groupby(["dim", "version", "bits"], sort=False).rate.idxmax()]
    ours = best[best.version == OURS].set_index(["dim", "bits"]).rate
    ratio = [ours[d, bits] / rate for d, bits, rate in zip(best.dim, best.bits, best.rate, strict=True)]
    return best.assign(ratio=ratio)[["dim", "version", "bits", "rate", "ratio", "largest_z"]].reset_index(drop=True)


def measured(rows: pd.DataFrame) -> dict[str, float]:
    """Ratios of rates at as many bits, and the worst law."""
    ratio = rows.set_index(["version", "bits", "dim"]).ratio
    asked = (("C++ Philox", 32, 1), ("C++ Philox", 64, 8), ("C++ lanes", 32, 1), ("torchsde", 32, 2), ("NumPy", 64, 1), ("jax scan", 32, 2),
             ("diffrax", 32, 1))
    return {**{f"{version}, float{bits}, d = {d}": float(ratio[version, bits, d]) for version, bits, d in asked},
            "largest z of a law": float(rows.largest_z.max())}


def draw(rows: pd.DataFrame) -> Figure:
    """Rates over d, and ratios."""
    with page(2, 2.6, ratios=(1, 1.15)) as (figure, (left, right)):
        shown = ((OURS, 32), ("C++ Philox", 32), ("C++ lanes", 32), ("torch eager", 32), ("jax scan", 32), ("torchsde", 32))
        for j, (version, bits) in enumerate(shown):
            mine = rows[(rows.version == version) & (rows.bits == bits)]
            left.loglog(mine.dim, mine.rate, **look(j), label=version)
        left.set(xlabel="dimensions d", ylabel="million path-steps / core-second", title="W1, float32", ylim=(None, 3e4))
        left.set_xticks(DIMS, [str(d) for d in DIMS])
        left.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        left.legend(loc="upper right", ncols=2)
        for k, (version, bits) in enumerate(PEERS):
            mine = rows[(rows.version == version) & (rows.bits == bits)].ratio
            colour, marker = (ORANGE, "s") if "C++" in version else (BLUE, "o")
            right.plot([mine.min(), mine.max()], [k, k], color=colour, lw=2.5, alpha=0.5, solid_capstyle="butt")
            right.plot(mine, [k] * len(mine), marker, color=colour)
            right.text(1.15 * max(mine.max(), 1), k, f"{mine.min():.2g}-{mine.max():.2g}", va="center", fontsize=7)
        right.axvline(1, color="black", lw=0.8, ls="--")
        right.set(xscale="log", xlabel="our rate / peer's rate, d = 1, 2, 8", title="how much faster", xlim=(0.5, 150))
        right.set_xticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        right.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
        right.set_yticks(range(len(PEERS)), [f"{version}, {bits} bit" for version, bits in PEERS])
    return figure


def main(out: Path, quick: bool) -> None:
    publish(NAME, __doc__, rows(quick), measured, draw, out)
