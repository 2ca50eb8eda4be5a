"""Notebooks from their sources: python -m notebooks.build [NAME ...] runs NAME.py (percent format; all of them by default) and writes NAME.ipynb.

The .py is the source, the executed .ipynb beside it is what people look at. What would change from run to run is left out (times, versions,
random cell names). Cells with sliders, tagged skip-execution, are for readers with a kernel: the same picture stands above them, and running widgets
without a browser blocks now and then (nbclient issue 312).
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
FOR_READERS = "skip-execution"  # the tag that nbclient leaves out


def sources() -> list[Path]:
    """The notebooks, in their order."""
    return sorted(HERE.glob("[0-9]*.py"))


def read(source: Path) -> nbformat.NotebookNode:
    """The notebook of a source, without outputs; cells are named by their place."""
    notebook = jupytext.read(source)
    for k, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem}-{k}"
    notebook.metadata = nbformat.from_dict({
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}, "language_info": {"name": "python"}})
    return notebook


def executed(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the outputs of a fresh kernel."""
    NotebookClient(notebook, timeout=600, record_timing=False, resources={"metadata": {"path": str(HERE)}}).execute()
    return notebook


def faults(notebook: nbformat.NotebookNode, source: nbformat.NotebookNode) -> list[str]:
    """Where an executed notebook is not its source with outputs, in words."""
    mine, theirs = ([(cell.cell_type, cell.source) for cell in n.cells] for n in (source, notebook))
    found = [f"cell {k}: differs from the source" for k, pair in enumerate(zip(mine, theirs, strict=False)) if pair[0] != pair[1]]
    if len(mine) != len(theirs):
        found.append(f"{len(theirs)} cells, {len(mine)} in the source")
    code = [cell for cell in notebook.cells if cell.cell_type == "code" and FOR_READERS not in cell.metadata.get("tags", [])]
    found += [f"{cell.id}: not executed" for cell in code if cell.execution_count is None]
    found += [f"{cell.id}: an error" for cell in code for output in cell.outputs if output.output_type == "error"]
    if not any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs):
        found.append("no picture")
    return found


def main(names: list[str]) -> None:
    """Run and write each, one line a notebook."""
    for source in sources():
        if not names or source.stem in names:
            start = time.perf_counter()
            target = source.with_suffix(".ipynb")
            nbformat.write(executed(read(source)), target)
            print(f"{target.name}: {time.perf_counter() - start:.1f} s, {target.stat().st_size / 1000:.0f} kB", flush=True)


if __name__ == "__main__":
    main([name.removesuffix(".py") for name in sys.argv[1:]])
