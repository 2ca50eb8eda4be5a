"""Notebooks: what is committed is what their sources say, with pictures and without errors; the disagreement of an edit is seen."""

from __future__ import annotations

import copy

import nbformat
import pytest
from notebooks import build


@pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.stem)
def test_notebook_is_its_source_with_outputs(source):
    """python -m notebooks.build NAME writes it."""
    target = source.with_suffix(".ipynb")
    assert not build.faults(nbformat.read(target, as_version=4), build.read(source))
    assert target.stat().st_size < 400_000


@pytest.mark.parametrize("source", build.sources(), ids=lambda source: source.stem)
def test_every_notebook_has_its_parts(source):
    """A title, QUICK, a picture within the first cells, three exercises, asserts at the end."""
    cells = build.read(source).cells
    text = "\n".join(cell.source for cell in cells)
    assert cells[0].source.startswith("# ") and "QUICK = " in cells[1].source
    assert all(f"\n{k}. " in text.partition("## Exercises")[2] for k in (1, 2, 3)) and text.count("*Hint:*") >= 3
    assert "assert " in cells[-1].source
    outputs = [out for cell in nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells[:5] for out in cell.get("outputs", [])]
    assert any("image/png" in out.data for out in outputs if out.output_type == "display_data")


def test_a_planted_edit_is_seen():
    source = build.read(build.sources()[0])
    notebook = nbformat.read(build.sources()[0].with_suffix(".ipynb"), as_version=4)
    code = [k for k, cell in enumerate(notebook.cells) if cell.cell_type == "code"]

    def edited(edit):
        other = copy.deepcopy(notebook)
        edit(other.cells)
        return build.faults(other, source)

    def failed(cells):
        cells[code[0]].outputs = [nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])]

    assert not edited(lambda cells: None)
    assert edited(lambda cells: cells[code[0]].update(source=cells[code[0]].source + "\nN = 6")) == [f"cell {code[0]}: differs from the source"]
    assert edited(lambda cells: cells.pop())
    assert edited(lambda cells: cells[code[0]].update(execution_count=None)) == [f"{notebook.cells[code[0]].id}: not executed"]
    assert edited(failed) == [f"{notebook.cells[code[0]].id}: an error"]
    assert edited(lambda cells: [cells[k].update(outputs=[]) for k in code]) == ["no picture"]


def test_a_notebook_that_fails_is_not_written():
    """Execution stops at an error, and leaves out the cells for readers."""
    cells = [nbformat.v4.new_code_cell("0 / 0", metadata={"tags": [build.FOR_READERS]}), nbformat.v4.new_code_cell("1 / 0")]
    assert build.executed(nbformat.v4.new_notebook(cells=cells[:1])).cells[0].execution_count is None
    with pytest.raises(Exception, match="1 / 0"):
        build.executed(nbformat.v4.new_notebook(cells=cells))
