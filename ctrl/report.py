"""The report of `ctrl verify`: the printed table, one self-contained page, and the table of the smallest planted errors that the checks see."""

from __future__ import annotations

import csv
import inspect
import io
import math
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from ctrl.evidence import FALSE_ALARM, MISS
from ctrl.files import embedded, kept, write_text
from ctrl.theorems import style
from ctrl.theorems.verdict import Theorem, Verdict

RESOLUTION = (
    r"\mathrm{exact:}\quad \varepsilon\, |G| = \mathrm{tolerance}",
    r"\mathrm{Monte\ Carlo:}\quad \varepsilon\, |G| = s \left( (1 - \varepsilon)\, \mathrm{se}_{\mathrm{right}}"
    r" + \varepsilon\, \mathrm{se}_{\mathrm{wrong}} \right)")
COLUMNS = ("theorem", "problem", "planted", "by", "measured", "expected", "tolerance", "z", "standard_error", "right_error", "resolution", "caught")
WIDTHS = (("theorem", 15), ("problem", 16), ("check", 11), ("measured", 12), ("expected", 12), ("tol. or z", 9), ("verdict", 7), ("sec.", 6))
KINDS = {"exact": "identity", "monte_carlo": "Monte Carlo", "limit": "order", "planted": "planted", "skipped": "skipped"}


# ---- the printed table -----------------------------------------------------------------------------------------------------


def header(theorem: str = "theorem", problem: str = "problem") -> str:
    """The line above `line`'s, with names for its first two columns."""
    names = (theorem, problem, *(name for name, _ in WIDTHS[2:]))
    return " ".join(f"{name:<{width}}" for name, (_, width) in zip(names, WIDTHS, strict=True)) + " what"


def line(row: Verdict, width: int) -> str:
    """One verdict, cut at the terminal's width but never before the verdict."""
    def number(x: float | None, form: str) -> str:
        return "-" if x is None else format(x, form)

    said = "skipped" if row.holds is None else "ok" if row.holds else "FAIL"
    if row.check == "planted" and row.holds:
        said = "caught"
    bound = number(row.tolerance, ".2g") if row.z is None else f"z {row.z:+.2f}" if abs(row.z) < 1e3 else f"z {row.z:+.0e}"
    cells = (row.theorem, row.problem, row.check, number(row.measured, ".6g"), number(row.expected, ".6g"), bound, said, f"{row.seconds:.2f}")
    text = " ".join(f"{cell:<{size}}" for cell, (_, size) in zip(cells, WIDTHS, strict=True)) + " " + row.reason
    width = max(width, len(header()))  # the verdict always shows
    return text if len(text) <= width else text[: width - 3] + "..."


def timed(rows: Iterator[Verdict]) -> Iterator[Verdict]:
    """Each verdict with the seconds that it took."""
    while True:
        start = time.perf_counter()
        row = next(rows, None)
        if row is None:
            return
        yield replace(row, seconds=round(time.perf_counter() - start, 4))


# ---- the table of resolutions ----------------------------------------------------------------------------------------------


def write_sensitivity(path: Path, rows: Sequence[Verdict]) -> None:
    """A line per planted error: what verdicts.json has no key for, as CSV.

    Source: theory.md, section 0.   Checked: tests/test_report.py::test_sensitivity_table_round_trips
    """
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(_cells(row) for row in rows if row.check == "planted")
    write_text(path, text.getvalue())


@lru_cache(maxsize=4096)
def _cells(row: Verdict) -> tuple[Any, ...]:
    error = None if row.z is None or row.measured is None or row.expected is None else abs(row.measured - row.expected) / abs(row.z)
    return (row.theorem, row.problem, row.record()["reason"], "exact" if row.z is None else "monte_carlo", row.measured,
            row.expected, row.tolerance, row.z, error, row.right_error, row.resolution, row.holds)


def right_errors(path: Path) -> dict[tuple[str, str, str], float]:
    """The right formulas' standard errors by (theorem, problem, reason), from a table written earlier; empty without one."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        return {(line["theorem"], line["problem"], line["planted"]): float(line["right_error"])
                for line in csv.DictReader(file) if line["right_error"]}


# ---- numbers, formulas and pictures in HTML --------------------------------------------------------------------------------


def number(x: float | None, digits: int = 6) -> Any:
    """A number as a reader writes it: 0.00123, or 1.2 x 10^-9 with the exponent raised; nothing for None."""
    from markupsafe import Markup

    if x is None:
        return ""
    text = f"{x:.{digits}g}".replace("-", "\N{MINUS SIGN}")
    mantissa, e, power = text.partition("e")
    if not e:
        return Markup(text)
    power = power.lstrip("+0") if power.startswith("+") else "\N{MINUS SIGN}" + power.lstrip("\N{MINUS SIGN}0")
    return Markup(f"{mantissa}&thinsp;×&thinsp;10<sup>{power}</sup>")


def share(x: float | None) -> Any:
    """A resolution: per cent from 0.1 % on, a power of ten below."""
    if x is None:
        return ""
    if x > 1:
        return ">\N{NO-BREAK SPACE}100\N{NO-BREAK SPACE}%" if math.isfinite(x) else "never"
    return f"{100 * x:.2g}\N{NO-BREAK SPACE}%" if x >= 0.001 else number(x, 2)


@lru_cache(maxsize=256)
def formula(source: str) -> Any:
    """A formula in matplotlib's mathtext as an inline SVG in the colour of the text, its source as the spoken label."""
    from markupsafe import Markup

    return Markup(kept(outlined_formula, source, needs=("matplotlib", "markupsafe")))


def outlined_formula(source: str) -> str:
    """The SVG of a formula, whose parsing takes a thirtieth of a second.

    Source: matplotlib.mathtext.   Checked: tests/test_report.py::test_a_formula_is_spoken_by_its_source
    """
    from markupsafe import Markup
    from matplotlib.font_manager import FontProperties
    from matplotlib.path import Path as Outline
    from matplotlib.textpath import TextPath

    em = 100
    outline = TextPath((0, 0), f"${source}$", size=em, prop=FontProperties(math_fontfamily="stix"))
    points, codes = np.round(outline.vertices * [1, -1]).astype(int).tolist(), outline.codes.tolist()
    letters = {Outline.MOVETO: "M", Outline.LINETO: "L", Outline.CURVE3: "Q", Outline.CURVE4: "C", Outline.CLOSEPOLY: "Z"}
    # A curve's code stands at each of its points: the letter is written once, at the first.
    sizes = {Outline.CURVE3: 2, Outline.CURVE4: 3}
    parts, k = [], 0
    while k < len(codes):
        size = sizes.get(codes[k], 1)
        parts.append(letters[codes[k]] + (" ".join(f"{x} {y}" for x, y in points[k : k + size]) if codes[k] != Outline.CLOSEPOLY else ""))
        k += size
    x, y = zip(*(point for point, code in zip(points, codes, strict=True) if code != Outline.CLOSEPOLY), strict=True)
    left, top, width, height = min(x) - 4, min(y) - 4, max(x) - min(x) + 8, max(y) - min(y) + 8
    return Markup('<svg class="formula" role="img" aria-label="{}" style="--w:{}em" viewBox="{} {} {} {}"><path d="{}"/></svg>').format(
        source, f"{width / em:.2f}", left, top, width, height, "".join(parts))


def resolutions(rows: Sequence[Verdict]) -> bytes:
    """A picture of all resolutions, a dot per planted error: PNG, empty without any."""
    planted = [(row, row.resolution) for row in rows if row.resolution is not None and 0 < row.resolution < math.inf]
    if not planted:
        return b""
    names = list(dict.fromkeys(row.theorem for row, _ in planted))
    title = "The smallest share of each planted error that its check still sees"
    with style.panels(1, title, width=8.5, height=1.3 + 0.34 * len(names)) as (figure, (ax,)):
        for sampled, label, marker, colour in ((False, "exact", "o", style.BLUE), (True, "Monte Carlo", "s", style.ORANGE)):
            chosen = [(names.index(row.theorem), x) for row, x in planted if (row.z is not None) == sampled]
            # Dots of one theorem in five rows, so that equal ones show.
            heights = [level + (0.12 if sampled else -0.12) + 0.06 * (j % 5 - 2) for j, (level, _) in enumerate(chosen)]
            ax.plot([x for _, x in chosen], heights, marker, color=colour, markersize=4, markeredgecolor="black", markeredgewidth=0.4,
                    label=f"against {label} checks")
        ax.axvline(1.0, color="black", linestyle="--", linewidth=1)
        ax.set(xscale="log", xlabel=f"share of the error caught with probability {1 - MISS:g} (dashed: the full error)")
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        figure.legend(loc="outside lower right", ncols=2)
        return style.png(figure)


# ---- what the page is made of ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A verdict as a line of a table: its words, and the class that gives them their look."""

    row: Verdict

    @property
    def said(self) -> str:
        if self.row.holds is None:
            return "skipped"
        if not self.row.holds:
            return "FAILED"
        return "caught" if self.row.check == "planted" else "holds"

    @property
    def kind(self) -> str:
        return KINDS[self.row.check]

    @property
    def bound(self) -> Any:
        if self.row.z is None:
            return number(self.row.tolerance, 2)
        return f"z = {self.row.z:+.1f}".replace("-", "\N{MINUS SIGN}") if abs(self.row.z) < 1e4 else f"|z| = {abs(self.row.z):.0e}"

    @property
    def by(self) -> str:
        how = "exact check" if self.row.z is None else f"Monte Carlo, |z| = {abs(self.row.z):.3g}"
        return how if self.row.holds else f"missed ({how})"

    @property
    def what(self) -> str:
        """The reason without what the table says in columns of its own."""
        return self.row.reason.removeprefix("planted: ").removesuffix(" was NOT caught")

    @property
    def error(self) -> str:
        """The planted error's name: the reason without the eta at which it was tried."""
        return re.sub(r"^(eta|η) = [\d.]+: ", "", self.what)


@dataclass(frozen=True)
class Part:
    """The lines of one theorem on one problem, failures first."""

    theorem: str
    problem: str
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, theorem: str, problem: str, rows: Sequence[Verdict]) -> Part:
        return cls(theorem, problem, tuple(Line(row) for row in sorted(rows, key=lambda row: row.holds is not False)))

    @property
    def anchor(self) -> str:
        return f"{self.theorem}--{self.problem}"

    def count(self, said: str) -> int:
        return sum(line.said == said for line in self.lines)

    @property
    def seconds(self) -> float:
        return sum(line.row.seconds for line in self.lines)


@dataclass(frozen=True)
class Planted:
    """One planted error wherever it was tried, with its closest call: the try of the coarsest resolution."""

    name: str
    lines: tuple[Line, ...]

    @property
    def caught(self) -> int:
        return sum(line.row.holds is True for line in self.lines)

    @property
    def closest(self) -> Line:
        return max(self.lines, key=lambda line: (line.row.holds is False, line.row.resolution or 0.0))

    @property
    def finest(self) -> float | None:
        return min((line.row.resolution for line in self.lines if line.row.resolution is not None), default=None)


@dataclass(frozen=True)
class Section:
    """A theorem of the page: what it says, what it looks like, and its verdicts by problem."""

    name: str
    theorem: Theorem | None
    png: bytes
    parts: tuple[Part, ...]

    @cached_property
    def formulas(self) -> list[Any]:
        return [formula(source) for source in self.theorem.formulas] if self.theorem else []

    @property
    def statement(self) -> str:
        return self.theorem.statement if self.theorem else ""

    @property
    def caption(self) -> str:
        return " ".join((inspect.getdoc(self.theorem.figure) or "").split()) if self.theorem else ""

    @property
    def picture(self) -> str:
        return embedded(self.png) if self.png else ""

    def part(self, problem: str) -> Part | None:
        return next((part for part in self.parts if part.problem == problem), None)

    def count(self, said: str) -> int:
        return sum(part.count(said) for part in self.parts)

    @property
    def seconds(self) -> float:
        return sum(part.seconds for part in self.parts)

    @cached_property
    def planted(self) -> tuple[Planted, ...]:
        """By name, those missed first, then from the hardest to see to the easiest."""
        groups: dict[str, list[Line]] = {}
        for part in self.parts:
            for line in part.lines:
                if line.row.check == "planted":
                    groups.setdefault(line.error, []).append(line)
        found = [Planted(name, tuple(lines)) for name, lines in groups.items()]
        return tuple(sorted(found, key=lambda p: (p.caught == len(p.lines), -(p.closest.row.resolution or 0.0))))


def sections(rows: Sequence[Verdict], theorems: Sequence[Theorem], pictures: Mapping[str, bytes]) -> list[Section]:
    """One per theorem that has verdicts, in the order of `theorems`; those of other names first, as in the table on screen."""
    known = {theorem.name: theorem for theorem in theorems}
    names = dict.fromkeys([row.theorem for row in rows if row.theorem not in known] + list(known))
    out = []
    for name in names:
        mine = [row for row in rows if row.theorem == name]
        parts = [Part.of(name, problem, [row for row in mine if row.problem == problem]) for problem in dict.fromkeys(row.problem for row in mine)]
        if parts:
            out.append(Section(name, known.get(name), pictures.get(name, b""), tuple(parts)))
    return out


def prepare(theorems: Sequence[Theorem]) -> None:
    """What the page takes long for whatever the verdicts are, ahead of time: its formulas, its template, and what its pictures are drawn with."""
    import matplotlib.backends.backend_agg  # noqa: F401

    _template()
    for source in (*RESOLUTION, *(source for theorem in theorems for source in theorem.formulas)):
        formula(source)


@cache
def _template() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    engine = Environment(loader=PackageLoader("ctrl"), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    engine.filters |= {"number": number, "share": share}
    return engine.get_template("report.html")


def page(rows: Sequence[Verdict], theorems: Sequence[Theorem], pictures: Mapping[str, bytes], facts: Mapping[str, str]) -> str:
    """The report as one HTML page that needs no network: verdicts, statements, figures, planted errors and their resolutions.

    pictures : PNG by theorem name;  facts : what is said of the run, in order (machine, versions, seed, time)
    Source: theory.md, section 0.   Checked: tests/test_report.py::test_page_shows_every_verdict
    """
    found = sections(rows, theorems, pictures)
    lines = [line for section in found for part in section.parts for line in part.lines]
    sampled = sum(row.check == "monte_carlo" for row in rows)
    overview = resolutions(rows)
    return _template().render(
        sections=found, facts=facts, problems=list(dict.fromkeys(row.problem for row in rows)),
        failed=[line for line in lines if line.said == "FAILED"], said=Counter(line.said for line in lines),
        planted=[line for line in lines if line.row.check == "planted" and line.row.holds is not None],
        dull=[line for line in lines if (line.row.resolution or 0) > 1],
        sampled=sampled, false_alarm=FALSE_ALARM, any_false_alarm=sampled * FALSE_ALARM, sees=1 - MISS,
        overview=embedded(overview) if overview else "", resolution_formulas=[formula(source) for source in RESOLUTION])
