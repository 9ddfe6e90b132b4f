"""Compiles the loop that draws tokens so that the CPU multiplies matrices fast for its batch.

XLA:CPU passes matrix products to the library YNNPACK. On the processor without AVX-512 that was
measured (AMD Zen), it is slower than the library Eigen for batches of four rows and more, and faster
for one or two rows. The figures are in docs/decisions/2026-12-01_products_of_batches.md.
"""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Callable
from typing import Any, Generic, ParamSpec, TypeVar

import jax

_P = ParamSpec("_P")
_R = TypeVar("_R")
_FEWEST_ROWS = 4
_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"


def rows_of_history(model: Any, state: Any, *_: Any, **__: Any) -> int:
    """Returns the number of rows of a state that has the tokens ``history_BS`` so far."""
    return len(state.history_BS)


class JitByRows(Generic[_P, _R]):
    """``jax.jit`` of a loop that draws tokens, whose compiler options depend on the number of rows
    that a pass multiplies and on the processor."""

    def __init__(self, function: Callable[_P, _R], *, num_rows: Callable[..., int] = rows_of_history, **options: Any):
        """Takes the function.

        Args:
          function: the loop.
          num_rows: returns the number of rows for the arguments of a call.
          options: further arguments of ``jax.jit``.
        """
        functools.update_wrapper(self, function)
        self._num_rows = num_rows
        self._plain: Any = jax.jit(function, **options)
        self._for_rows: Any = jax.jit(function, compiler_options={_YNNPACK: ""}, **options)

    def __call__(self, *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Calls the compiled function."""
        is_large = self._num_rows(*args, **kwargs) >= _FEWEST_ROWS
        return (self._for_rows if is_large and avoids_ynnpack() else self._plain)(*args, **kwargs)

    def lower(self, *args: _P.args, **kwargs: _P.kwargs) -> Any:
        """Lowers the function for any platform, as ``lower`` of ``jax.jit`` does."""
        return self._plain.lower(*args, **kwargs)

    @property
    def num_programs(self) -> int:
        """The number of programs that were compiled."""
        return self._plain._cache_size() + self._for_rows._cache_size()


@functools.cache
def avoids_ynnpack() -> bool:
    """Tells whether batches of several rows are multiplied without YNNPACK.

    ``TRANSFORMER_JAX_XLA_FLAGS=0`` switches this off, and so does a value of the flag in
    ``XLA_FLAGS``.
    """
    if os.environ.get("TRANSFORMER_JAX_XLA_FLAGS") == "0" or _YNNPACK in os.environ.get("XLA_FLAGS", ""):
        return False
    features = _features_of_processor()
    return ("avx2" in features and "avx512f" not in features and jax.default_backend() == "cpu"
            and _knows_option())


def _features_of_processor() -> frozenset[str]:
    """Returns the names of the processor's instruction sets, as Linux gives them."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # another operating system
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def _knows_option() -> bool:
    """True if this version of XLA has the option."""
    try:
        jax.jit(lambda x: x, compiler_options={_YNNPACK: ""}).lower(0.0).compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
