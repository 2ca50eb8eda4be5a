"""The API reference from docstrings: python docs/api.py writes docs/api.md."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ctrl

PAGE = Path(__file__).with_name("api.md")
MODULES = ("estimators", "exact", "exact.chain", "exact.quadrature", "exact.plane", "exact.limit", "exact.tilt", "exact.divergence", "learn", "zoo",
           "testing", "theorems", "torch", "torch.images", "torch.rewards", "torch.preferences", "torch.classifiers", "torch.pipelines",
           "torch.plan")


def public() -> dict[str, Any]:
    """(label, object): ctrl's own names, then the functions and classes that each public module defines or re-exports as X as X."""
    out = {name: getattr(ctrl, name) for name in ctrl._HOME}
    for name in MODULES:
        module = importlib.import_module(f"ctrl.{name}")
        tree = ast.parse(inspect.getsource(module))
        froms = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
        exported = {alias.asname for node in froms for alias in node.names if alias.asname == alias.name}
        for attribute, value in vars(module).items():
            here = getattr(value, "__module__", None) == module.__name__ or attribute in exported
            if here and not attribute.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
                out[f"{name}.{attribute}"] = value
    return out


def reference() -> str:
    """The page: a section a module, an entry a name."""
    lines = ["# API reference", "", "Made from docstrings by `python docs/api.py`. `Checked` names the test that checks what is said.", ""]
    section = None
    for label, value in public().items():
        module = label.rpartition(".")[0]
        if module != section:
            section = module
            about = inspect.getdoc(importlib.import_module(f"ctrl.{module}" if module else "ctrl")) or ""
            lines += [f"## `{'.'.join(filter(None, ('ctrl', module)))}`", "", sentence(about.partition("\n\n")[0]), ""]
        lines += entry(label, value)
    return "\n".join(lines)


def entry(label: str, value: Any) -> list[str]:
    """Signature, the sentence, the rest as it stands, and the methods."""
    first, _, rest = (inspect.getdoc(value) or "").partition("\n\n")
    lines = [f"### `{label.rpartition('.')[2]}{signature(value)}`", "", sentence(first), ""]
    if rest:
        lines += ["~~~text", rest, "~~~", ""]
    members = list(methods(value)) if inspect.isclass(value) else []
    return lines + members + [""] * bool(members)


def signature(value: Any) -> str:
    """Names and defaults; annotations would be longer than the rest."""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return ""
    shown = [p.name if p.default is p.empty or len(repr(p.default)) > 40 or "<" in repr(p.default) else f"{p.name}={p.default!r}" for p in parameters]
    return f"({', '.join(shown)})"


def sentence(text: str) -> str:
    """On one line, with what Markdown would take for emphasis or a tag as it stands."""
    return re.sub(r"([*<])", r"\\\1", " ".join(text.split()))


def methods(kind: type) -> Iterator[str]:
    """Public ones of the class itself that have a docstring."""
    for name, member in vars(kind).items():
        inner = getattr(member, "__func__", getattr(member, "fget", getattr(member, "func", member)))
        if name.startswith("_") or not inspect.isfunction(inner) or not inner.__doc__:
            continue
        what = name if inner is not member and not hasattr(member, "__func__") else f"{name}{bound(inner)}"
        yield f"- `{what}`: {sentence((inspect.getdoc(inner) or '').partition(chr(10) * 2)[0])}"


def bound(function: Any) -> str:
    names = [p.name for p in inspect.signature(function).parameters.values()]
    return f"({', '.join(names[1:] if names[:1] in (['self'], ['cls']) else names)})"


if __name__ == "__main__":
    PAGE.write_text(reference())
