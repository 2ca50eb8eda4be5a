"""Problems, policies and their parts to and from one file: JSON (readable, floats to the last bit) or NPZ.

A file names classes of this library only and never runs code; callables cannot be written.
"""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn
from zipfile import BadZipFile

import numpy as np

from ctrl import policy as P
from ctrl import reward as R
from ctrl import schedule as S
from ctrl.laws import Gaussian, GaussianMixture
from ctrl.problem import Problem

FORMAT = "ctrl-1"

STORABLE = (
    Problem, Gaussian, GaussianMixture, S.VP, S.VE, S.SubVP, S.OU, S.FlowMatching, S.DiscreteVP, S.TimeGrid,
    R.QuadraticReward, R.LinearReward, R.BumpReward, R.LogDensityReward, R.ClassLogPosteriorReward,
    P.AffinePolicy, P.BasisPolicy, P.MixturePolicy, P.Monomials, P.TimeBins, P.FunctionBasis, P.ShiftBasis, P.ScaleBasis)


def save(thing: Any, path: str | Path) -> None:
    """Write a problem, a policy or one of their parts to `path`, ending in .json or .npz.

    Source: theory.md, section 1 (what is stored).   Checked: tests/test_storage.py::test_round_trip
    """
    path, arrays = Path(path), dict[str, np.ndarray]()
    if type(thing) not in STORABLE:
        _refuse(thing)
    tree = _encode(thing, arrays if path.suffix == ".npz" else None)
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"path: expected a name ending in .json or .npz, got {path.name}")
    content = {"format": FORMAT, "object": tree}
    partial = path.with_name(f".{path.name}.partial")
    if path.suffix == ".json":
        partial.write_text(json.dumps(content, indent=1) + "\n")
    else:
        with partial.open("wb") as file:
            np.savez(file, tree=json.dumps(content), **arrays)  # type: ignore[arg-type]
    os.replace(partial, path)


def load(path: str | Path) -> Any:
    """Read what `save` wrote; every object is validated again on the way in.

    Source: theory.md, section 1 (what is stored).   Checked: tests/test_storage.py::test_round_trip
    """
    path = Path(path)
    if path.suffix not in (".json", ".npz"):
        raise ValueError(f"path: expected a name ending in .json or .npz, got {path.name}")
    arrays: dict[str, np.ndarray] = {}
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            text = str(arrays.pop("tree"))
        else:
            text = path.read_text()
        record = json.loads(text)
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']!r}")
        tree = record["object"]
        thing = _decode(tree, arrays)
        if type(thing) not in STORABLE:
            raise ValueError(f"a {type(thing).__name__}")
        return thing
    except FileNotFoundError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, EOFError, BadZipFile, OSError, NotImplementedError, RecursionError,
            OverflowError) as error:
        raise ValueError(f"path: expected a file written by ctrl.save, got {path.name} ({error})") from None


def _refuse(value: Any) -> NoReturn:
    raise ValueError(f"thing: expected an object made of this library's stored types, got {type(value).__name__} "
                     "(Python functions cannot be written to a file; for time functions use ctrl.policy.Monomials or TimeBins)")


def _encode(value: Any, arrays: dict[str, np.ndarray] | None) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, np.ndarray) and value.dtype == np.float64:
        if arrays is None:
            return {"array": value.tolist()}
        arrays[name := f"array_{len(arrays)}"] = value
        return {"array": name}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, arrays) for v in value]}
    if type(value) not in STORABLE:
        _refuse(value)
    return {"type": type(value).__name__, "fields": {f.name: _encode(getattr(value, f.name), arrays) for f in fields(value)}}


def _decode(tree: Any, arrays: dict[str, np.ndarray]) -> Any:
    if not isinstance(tree, dict):
        return tree
    if "array" in tree:
        return arrays[tree["array"]] if isinstance(tree["array"], str) else np.array(tree["array"], dtype=np.float64)
    if "tuple" in tree:
        return tuple(_decode(v, arrays) for v in tree["tuple"])
    kinds = {cls.__name__: cls for cls in STORABLE}
    if tree.get("type") not in kinds:
        raise ValueError(f"unknown type {tree.get('type')!r}")
    values = {name: _decode(v, arrays) for name, v in tree["fields"].items()}
    return P.BasisPolicy.of(**values) if tree["type"] == "BasisPolicy" else kinds[tree["type"]](**values)
