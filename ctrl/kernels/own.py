"""Functions of the user inside the compiled chain.

A kernel that takes a dispatcher as argument is compiled again in every process; a first-class function is an address and a
signature, so that the kernel and, with cache=True, the user's function come from the cache.
Checked: tests/test_rollout.py::test_own_action_comes_from_the_cache
"""

from __future__ import annotations

from typing import Any

from numba.core.errors import NumbaError
from numba.core.types.function_type import CompileResultWAP


def first_class(name: str, function: Any, arguments: tuple[Any, ...]) -> CompileResultWAP:
    """An @njit function compiled for these argument types, as a value that kernels call; ValueError when it does not compile."""
    try:
        function.compile(arguments)
    except NumbaError as error:
        reason = next((line for line in str(error).splitlines()[1:] if line.strip()), str(error))
        raise ValueError(f"{name}: expected code that Numba compiles for {', '.join(map(str, arguments))}, got: {reason.strip()}") from None
    return CompileResultWAP(function.overloads[arguments])
