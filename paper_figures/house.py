"""What all figures share: the page, the numbers that a docstring expects, and the files of a figure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import pandas as pd
from ctrl.files import writable, write_text
from ctrl.theorems.style import COLOURS, LINES, MARKERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, SINGLE = 6.75, 3.25  # inches: a page of two columns, and one of them
STYLE = Path(__file__).with_name("house.mplstyle")
OUT = Path(__file__).with_name("out")
EXPECTED = re.compile(r"^ {4}(\S.*?) {2,}(-?[\d.]+(?:e[-+]?\d+)?) \+- ([\d.]+(?:e[-+]?\d+)?)$", re.MULTILINE)


@dataclass(frozen=True)
class Expected:
    """A line of a figure's docstring, "    NAME   NUMBER +- TOLERANCE"."""

    number: float
    tolerance: float

    def met(self, measured: float) -> bool:
        return abs(measured - self.number) <= self.tolerance


def expected(docstring: str | None) -> dict[str, Expected]:
    """What a docstring expects, by name."""
    return {name: Expected(float(number), float(tolerance)) for name, number, tolerance in EXPECTED.findall(docstring or "")}


def unmet(docstring: str | None, measured: Mapping[str, float]) -> list[str]:
    """What is not as the docstring says: numbers outside of their tolerance, and numbers that one side lacks; empty where all is well."""
    wanted = expected(docstring)
    said = [f"{name}: measured {measured[name]:.6g}, expected {e.number:g} +- {e.tolerance:g}" for name, e in wanted.items()
            if name in measured and not e.met(measured[name])]
    return said + [f"{name}: {'not measured' if name in wanted else 'not expected'}" for name in wanted.keys() ^ measured.keys()]


@contextmanager
def page(columns: int, height: float, width: float = WIDE, ratios: Sequence[float] | None = None) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of panels in a row, lettered a, b, ...; nothing global changes."""
    from matplotlib.figure import Figure as New

    with matplotlib.rc_context(fname=STYLE):
        figure = New(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(1, columns, squeeze=False, width_ratios=ratios)[0])
        yield figure, axes
        lettered(axes)


def lettered(axes: Sequence[Axes]) -> None:
    """a, b, ... before the titles, where there is more than one panel."""
    for letter, ax in zip("abcdefgh", axes if len(axes) > 1 else [], strict=False):
        ax.set_title(rf"$\bf{{{letter}}}$  {ax.get_title(loc='left')}", loc="left")


def look(index: int, points: bool = True) -> dict[str, Any]:
    """Colour, line and marker number `index`: each of the three tells curves apart, so that grey does, too."""
    style = {"color": COLOURS[index], "linestyle": LINES[index]}
    return style | ({"marker": MARKERS[index]} if points else {})


def ticks(ax: Axes, at: Sequence[float], labels: Sequence[str] | None = None) -> None:
    """Ticks on x at the points themselves, without minor ones."""
    ax.set_xticks(list(at), [f"{x:g}" for x in at] if labels is None else list(labels))
    ax.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)


def publish(name: str, docstring: str | None, rows: pd.DataFrame, measured: Callable[[pd.DataFrame], dict[str, float]],
            draw: Callable[[pd.DataFrame], Figure], out: Path) -> None:
    """NAME.csv, then NAME.png and NAME.pdf; ValueError, and no picture, where the rows are not what the docstring says.

    No file holds a date, so that the same rows give the same bytes; fonts are embedded.
    """
    write_text(writable(out) / f"{name}.csv", rows.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
    if wrong := unmet(docstring, measured(rows)):
        raise ValueError(f"{name}: expected the numbers of its docstring, got {'; '.join(wrong)}")
    figure = draw(rows)
    with matplotlib.rc_context(fname=STYLE):
        figure.savefig(out / f"{name}.png", metadata={"Software": None})
        figure.savefig(out / f"{name}.pdf", metadata={"CreationDate": None, "Producer": None, "Creator": None})


def finished(name: str, out: Path) -> bool:
    """All three files are there, the pictures last."""
    return all((out / f"{name}.{kind}").exists() for kind in ("csv", "png", "pdf"))
