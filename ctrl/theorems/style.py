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
MINOR = 1e5  # from end to end of a logarithmic axis: beyond, ticks between powers of ten are a blur
RAISED = str.maketrans("0123456789-", "⁰¹²³⁴⁵⁶⁷⁸⁹⁻")
COMPRESSION = 3  # of zlib: a third of the time of the usual 6, a tenth more bytes
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
    from matplotlib.ticker import NullLocator

    ax.set_xticks(at, labels)
    ax.xaxis.set_minor_locator(NullLocator())


def png(figure: Figure) -> bytes:
    """The figure as a PNG under the house style."""
    import matplotlib

    buffer = BytesIO()
    with matplotlib.rc_context(RC):
        _spare_ticks(figure)
        # Laid out here, as savefig would draw everything once more to do so.
        figure.set_dpi(RC["savefig.dpi"])
        if (layout := figure.get_layout_engine()) is not None:
            layout.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(buffer, format="png", pil_kwargs={"compress_level": COMPRESSION})
    return buffer.getvalue()


def _spare_ticks(figure: Figure) -> None:
    """Labels of logarithmic axes in letters, 2×10⁻³, and no minor ticks over many decades: formulas and ticks would take most of a picture's time."""
    from matplotlib.ticker import LogFormatterSciNotation, NullLocator

    class Written(LogFormatterSciNotation):
        def __call__(self, x: float, pos: int | None = None) -> str:
            text = super().__call__(x, pos).removeprefix(r"$\mathdefault{").removesuffix("}$").replace(r"\times", "×")
            mantissa, _, power = text.partition("^{")
            return mantissa + power.removesuffix("}").translate(RAISED)

    for axis in (axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis) if axis.get_scale() == "log"):
        if type(axis.get_major_formatter()) is LogFormatterSciNotation:
            axis.set_major_formatter(Written())
        if type(axis.get_minor_formatter()) is LogFormatterSciNotation:
            axis.set_minor_formatter(Written(labelOnlyBase=False))
        low, high = sorted(axis.get_view_interval())
        if high > MINOR * low:
            axis.set_minor_locator(NullLocator())
