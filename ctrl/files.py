"""Files of a run: folders that can be written, JSON that is never half there, the environment, and objects of a user's own file.

And what takes a second to work out and never changes: kept for the next process.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import platform
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "scores-as-actions"


def writable(out: Path) -> Path:
    """The folder, made if need be; ValueError when nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"out: expected a writable folder, got {out} ({error.strerror})") from None
    return out


def write_text(path: Path, content: str) -> None:
    """Write text so that a reader sees the old file or the new one, never half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    os.replace(partial, path)


def embedded(png: bytes) -> str:
    """A PNG as a data URI."""
    return "data:image/png;base64," + b64encode(png).decode()


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def kept(make: Callable[..., Any], *arguments: Any, needs: tuple[str, ...]) -> Any:
    """make(*arguments), of JSON's kinds, from the cache where an earlier process left it; made again when its code or what it `needs` has changed.

    The code is that of `make` alone: it is to call nothing of this library. Without its source, versions or a place to write, nothing is kept.
    Checked: tests/test_files.py::test_what_is_kept_is_what_would_be_made
    """
    try:
        code, folder, of = inspect.getsource(make), CACHE.expanduser(), {name: version(name) for name in needs}
    except (OSError, RuntimeError, PackageNotFoundError):
        return make(*arguments)
    key = sha256(json.dumps([code, arguments, of]).encode()).hexdigest()
    path = folder / f"{make.__name__}-{key[:16]}.json"
    try:
        if (found := json.loads(path.read_text(encoding="utf-8")))["key"] == key:
            return found["made"]
    except (OSError, ValueError, KeyError, TypeError):
        pass  # not there, or another file by this name
    made = make(*arguments)
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"key": key, "made": made}))
    return made


def versions(*names: str) -> dict[str, str]:
    """Versions of this library, of what all its numbers depend on, and of `names`."""
    found = {"python": platform.python_version()}
    for name in ("scores-as-actions", "numpy", "scipy", "numba", "scikit-learn", *names):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def environment(*names: str) -> dict[str, Any]:
    """What a run's numbers and times depend on: versions, platform, cores, and the commit of a checkout with its dirty flag."""
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else None

    try:
        commit, changes = (git("rev-parse", "HEAD"), git("status", "--porcelain")) if (root / ".git").exists() else (None, None)
    except OSError:  # no git on this machine
        commit = changes = None
    return {"versions": versions(*names), "platform": platform.platform(), "processor": platform.machine(), "cores": os.cpu_count(),
            "commit": commit, "dirty": None if changes is None else bool(changes)}


def user_object(argument: str, reference: str) -> tuple[str, Any]:
    """(NAME, what NAME is in FILE.py), from "FILE.py:NAME"; runs the user's file.

    Source: design.md's contract.   Checked: tests/test_verify.py::test_user_problem
    """
    name, module = user_module(argument, reference)
    return name, getattr(module, name, None)


def user_module(argument: str, reference: str) -> tuple[str, ModuleType]:
    """(NAME, the module that FILE.py is), from "FILE.py:NAME"; runs the user's file.

    Source: design.md's contract.   Checked: tests/test_verify.py::test_user_problem
    """
    file, _, name = reference.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise ValueError(f"{argument}: expected FILE.py:NAME, got {reference!r}")
    if not path.is_file():
        raise ValueError(f"{argument}: expected an existing file, got {file!r}")
    spec = importlib.util.spec_from_file_location(f"ctrl_user_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{argument}: expected a Python file, got {file!r}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickles of the file look for it
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(f"{argument}: expected {path.name} to run, got {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
    return name, module
