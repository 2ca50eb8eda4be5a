"""One look for every figure: colour-blind safe (Okabe and Ito), readable in grey, no global state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, PURPLE, SKY, YELLOW, GREY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#666666")
COLOURS = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)
MARKERS = ("o", "s", "^", "D", "v", "P")
LINES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)))

RC: dict[str, Any] = {
    "font.size": 9, "axes.titlesize": 10, "axes.labelsize": 9, "legend.fontsize": 8, "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "grid.linewidth": 0.6, "lines.linewidth": 1.6,
    "lines.markersize": 4.5, "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 160, "mathtext.fontset": "dejavusans",
    "axes.titley": 1.0,  # where it would be anyway, without measuring every tick label for it
}


@contextmanager
def panels(count: int, title: str, width: float = 4.0, height: float = 3.3) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure with `count` panels in a row under one title; no pyplot, so nothing global changes."""
    import matplotlib
    from matplotlib.figure import Figure as NewFigure

    with matplotlib.rc_context(RC):
        figure = NewFigure(figsize=(width * count, height), layout="constrained")
        axes = [figure.add_subplot(1, count, j + 1) for j in range(count)]
        figure.suptitle(title, fontsize=11)
        yield figure, axes


def order_line(ax: Axes, x: Any, y: Any, label: str, index: int) -> None:
    """A log-log error curve with its fitted slope in the legend."""
    from ctrl.evidence import fitted_order

    slope = fitted_order(np.asarray(x), np.asarray(y)).slope
    ax.loglog(x, y, marker=MARKERS[index], linestyle=LINES[index], color=COLOURS[index], label=f"{label}: order {slope:.2f}")
    log_ticks(ax, x, [f"{v:.2g}" for v in x])


def log_ticks(ax: Axes, at: Any, labels: list[str]) -> None:
    """Ticks on x where the points are, in the place of crowded minor labels."""
    ax.set_xticks(at, labels)
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def png(figure: Figure) -> bytes:
    """The figure as a PNG under the house style."""
    import matplotlib

    buffer = BytesIO()
    with matplotlib.rc_context(RC):
        # Laid out here, as savefig would draw everything once more to do so.
        figure.set_dpi(RC["savefig.dpi"])
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(buffer, format="png")
    return buffer.getvalue()
