"""What is kept between processes is what would be made, and is made again when anything it depends on has changed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from ctrl import files, report, zoo

CODE = """
calls = []


def made(x):
    calls.append(x)
    return [x / 3, {"of": str(x)}]
"""


def module(path, code):
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("kept_module", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CACHE", tmp_path / "cache")
    return tmp_path / "cache"


def test_what_is_kept_is_what_would_be_made(tmp_path, cache, monkeypatch):
    """To the last bit; planted: other arguments, other code, another version, half a file."""
    one = module(tmp_path / "one.py", CODE)
    for _ in range(2):
        assert files.kept(one.made, 0.7, needs=("numpy",)) == [0.7 / 3, {"of": "0.7"}]
    assert one.calls == [0.7]
    files.kept(one.made, 0.8, needs=("numpy",))
    assert one.calls == [0.7, 0.8]
    two = module(tmp_path / "two.py", CODE.replace("/ 3", "/ 4"))
    assert files.kept(two.made, 0.7, needs=("numpy",))[0] == 0.7 / 4
    monkeypatch.setattr(files, "version", lambda name: "another")
    files.kept(one.made, 0.7, needs=("numpy",))
    assert one.calls == [0.7, 0.8, 0.7]
    for spoilt in ("", '{"key', "null", "[]", "{}", '"text"', '{"key": "another", "made": 1}'):
        for path in cache.iterdir():
            path.write_text(spoilt)
        assert files.kept(one.made, 0.7, needs=("numpy",)) == [0.7 / 3, {"of": "0.7"}]
    assert one.calls[3:] == [0.7] * 7


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path, cache):
    cache.write_text("a file in the place of the folder")
    one = module(tmp_path / "one.py", CODE)
    for _ in range(2):
        assert files.kept(one.made, 0.7, needs=("numpy",))[0] == 0.7 / 3
    assert one.calls == [0.7, 0.7]


def test_without_its_source_nothing_is_kept(cache):
    """As where a package is compiled, or defined at a prompt."""
    made = {}
    exec(CODE, made)
    for _ in range(2):
        assert files.kept(made["made"], 0.7, needs=("numpy",))[0] == 0.7 / 3
    assert made["calls"] == [0.7, 0.7] and not cache.exists()


def test_without_a_home_or_versions_nothing_is_kept(tmp_path, monkeypatch):
    """As where a user has no entry, or a package no metadata."""
    one = module(tmp_path / "one.py", CODE)
    assert files.kept(one.made, 0.7, needs=("no-such-package",))[0] == 0.7 / 3
    monkeypatch.setattr(files, "CACHE", Path("~no-such-user/cache"))
    assert files.kept(one.made, 0.7, needs=("numpy",))[0] == 0.7 / 3 and one.calls == [0.7, 0.7]


def test_digits_and_formulas_are_the_same_from_the_cache(cache):
    """Fitted here and read back."""
    fresh = zoo.digit_classes.__wrapped__(1, 2)
    again = zoo.digit_classes.__wrapped__(1, 2)
    assert len(list(cache.glob("fitted_digits-*.json"))) == 1 and (fresh[0] == again[0]).all()
    for one, two in zip(fresh[1], again[1], strict=True):
        assert (one.weights == two.weights).all() and (one.means == two.means).all() and (one.covs == two.covs).all()
    source = r"a < \frac{1}{2}"
    assert report.formula.__wrapped__(source) == report.formula.__wrapped__(source) == report.outlined_formula(source)
