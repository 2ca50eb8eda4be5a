"""The page of `ctrl verify`: complete, self-contained, failures first; and the table of resolutions beside it."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from ctrl import report
from ctrl.theorems.verdict import Theorem, Verdict
from ctrl.verify import THEOREMS

PNG = b"\x89PNG\r\n\x1a\n"


class Said(Theorem):
    """A theorem that is only written about."""

    name = "said"
    statement = "1 < 2 & so on"
    formulas = (r"\frac{1}{2} \leq \int_0^1 x\, dx",)

    def checks(self, case):
        raise NotImplementedError

    def figure(self, case):
        """What was said, in a picture."""
        raise NotImplementedError


def row(check="exact", holds=True, reason="why", problem="p", theorem="said", z=None, measured=1.5, **other):
    numbers = (None, None, None) if check == "skipped" else (measured, 1.0, 1e-9 if z is None else 0.061)
    return Verdict(theorem, problem, check, *numbers, z, holds, reason, 0.25, **other)


ROWS = [
    row(), row("monte_carlo", z=1.2, reason="mean < 3"), row("limit", reason="order 1"), row("skipped", None, "d = 1"),
    row("planted", reason="planted: eta = 0.5: a"), row("planted", reason="planted: a", problem="q", z=40.1),
    row("planted", reason="planted: b", problem="q")]
FAILED = [
    row(reason="fine"), row("exact", False, "broken <b>: measured 1.5 against 1"),
    row("planted", False, "planted: c was NOT caught", measured=1.0)]


class Outline(HTMLParser):
    """Ids, links, sources and tags of a page; it must be well nested."""

    VOID = ("meta", "img", "br", "path")

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.sources, self.open, self.details = [], [], [], [], {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.ids += [given["id"]] if "id" in given else []
        self.links += [given["href"]] if tag == "a" else []
        self.sources += [given[name] for name in ("src", "data", "srcset", "poster", "action") if name in given]
        assert tag not in ("link", "iframe", "object", "base")
        if tag == "details":
            self.details[given["id"]] = "open" in given
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        assert tag in self.VOID

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def page(rows, pictures=None):
    return report.page(rows, [Said()], pictures or {}, {"seed": "3", "machine": "one <core>"})


def test_page_shows_every_verdict():
    text = page(ROWS, {"said": PNG})
    outline = Outline(text)
    assert "All 6 verdicts hold" in text and "3 of 3 planted errors were caught" in text and "1 check was skipped" in text
    for words in ("why", "mean &lt; 3", "order 1", "d = 1", "1 &lt; 2 &amp; so on", "one &lt;core&gt;", "What was said, in a picture."):
        assert words in text
    assert set(outline.details) == {"said--p", "said--q"} and not any(outline.details.values())
    assert "FAILED" not in text.replace('== "FAILED"', "") and 'role="alert"' not in text


def test_page_needs_no_network():
    """Nothing is loaded from anywhere: pictures are data, links lead inside, beside the page, or to the paper."""
    text = page(ROWS, {"said": PNG})
    outline = Outline(text)
    assert len(outline.sources) == 2 and all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert not re.search(r"@import|url\(|fetch|XMLHttp|import\(|integrity", text)
    inside = [link[1:] for link in outline.links if link.startswith("#")]
    assert len(inside) == 6 and set(inside) <= set(outline.ids) and len(set(outline.ids)) == len(outline.ids)
    assert {link for link in outline.links if not link.startswith("#")} == {
        "verdicts.json", "sensitivity.csv", "run.json", "https://arxiv.org/abs/2409.08400"}
    assert "prefers-color-scheme: dark" in text and "currentColor" in text and "width=device-width" in text


def test_failures_come_first():
    text = page(ROWS + FAILED)
    outline = Outline(text)
    assert "2 of 9 verdicts failed" in text and "FAILED: 7 of 9" in text and 'role="alert"' in text
    assert outline.details == {"said--p": True, "said--q": False}
    alarm = text[text.index('role="alert"'):text.index('id="verdicts"')]
    assert "broken &lt;b&gt;" in alarm and ">c<" not in alarm and ": c</li>" in alarm
    part = text[text.index('<details id="said--p"'):text.index('<details id="said--q"')]
    assert part.index("broken") < part.index("why") and part.index(">c<") < part.index("why")
    assert "missed (exact check)" in text and "0 of 1" in text


def test_planted_errors_are_one_line_each_with_their_closest_call():
    section, = report.sections(ROWS, [Said()], {})
    assert [(p.name, p.caught, len(p.lines)) for p in section.planted] == [("a", 2, 2), ("b", 1, 1)]
    closest = section.planted[0].closest.row
    assert closest.problem == "q" and closest.resolution == pytest.approx(0.2, abs=0.01) and section.planted[0].finest == pytest.approx(2e-9)
    missed, = (p for p in report.sections([*ROWS, row("planted", False, "planted: a", measured=1.0)], [Said()], {})[0].planted if p.name == "a")
    assert missed.closest.row.holds is False and missed.caught == 2


def test_theorems_of_other_names_are_shown_too():
    """Rows resumed from a run with other theorems: no statement, but all their verdicts."""
    text = page([row(theorem="older"), *ROWS])
    assert text.index('<section id="older">') < text.index('<section id="said">')


@pytest.mark.parametrize("theorem", THEOREMS, ids=lambda theorem: theorem.name)
def test_every_statement_is_typeset(theorem):
    assert 1 <= len(theorem.formulas) <= 4 and theorem.statement
    for source in theorem.formulas:
        svg = report.formula(source)
        assert svg.startswith('<svg class="formula" role="img"') and svg.count("M") > 5
        left, top, width, height = map(int, re.search(r'viewBox="(-?\d+) (-?\d+) (\d+) (\d+)"', svg).groups())
        x, y = zip(*((int(a), int(b)) for a, b in re.findall(r"(-?\d+) (-?\d+)", svg[svg.index(' d="'):])), strict=True)
        assert left <= min(x) and max(x) <= left + width and top <= min(y) and max(y) <= top + height


def test_a_formula_is_spoken_by_its_source():
    assert r'aria-label="a &lt; \frac{1}{2}"' in report.formula(r"a < \frac{1}{2}")


def test_numbers():
    assert report.number(None) == "" and report.number(-0.5) == "\N{MINUS SIGN}0.5" and report.number(123456.7) == "123457"
    assert report.number(1.24e-9, 2) == "1.2&thinsp;×&thinsp;10<sup>\N{MINUS SIGN}9</sup>"
    assert report.number(-3e20) == "\N{MINUS SIGN}3&thinsp;×&thinsp;10<sup>20</sup>"
    assert report.share(0.034) == "3.4\N{NO-BREAK SPACE}%" and report.share(2e-5).startswith("2&thinsp;") and report.share(None) == ""
    assert report.share(1.5).startswith(">") and report.share(float("inf")) == "never"


def test_sensitivity_table_round_trips(tmp_path):
    """A line per planted error; the numbers that verdicts.json has no key for come back to the last bit."""
    path = tmp_path / "sensitivity.csv"
    assert report.right_errors(path) == {}
    rows = [*ROWS, row("planted", reason="planted: d, with a comma", z=9.0, right_error=1 / 3)]
    report.write_sensitivity(path, rows)
    assert report.right_errors(path) == {("said", "p", "planted: d, with a comma"): 1 / 3}
    lines = list(csv.DictReader(path.open(newline="")))
    planted = [r for r in rows if r.check == "planted"]
    assert [line["planted"] for line in lines] == [r.reason for r in planted]
    assert [float(line["resolution"]) for line in lines] == [r.resolution for r in planted]
    assert [line["by"] for line in lines] == ["exact", "monte_carlo", "exact", "monte_carlo"] and {line["caught"] for line in lines} == {"True"}
    assert replace(rows[-1], right_error=None).resolution != rows[-1].resolution


def test_resolutions_draw():
    assert report.resolutions(ROWS).startswith(PNG) and report.resolutions(ROWS[:4]) == b""


def test_the_template_is_part_of_the_package():
    assert "<!doctype html>" in (files("ctrl") / "templates" / "report.html").read_text()
