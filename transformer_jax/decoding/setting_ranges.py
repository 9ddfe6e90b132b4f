"""The ranges of the sampling settings, and the check that a value is in its range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

_LARGEST_INT = 2**31 - 1

# For each setting, a test of its range and the range in words. Float settings are float32 in
# compiled code, so a value that float32 cannot hold would become 0 or infinity there.
_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x <= 1e30, "0 (greedy) or positive, at most 1e30"),
    "top_k": (lambda x: x >= 0, "a whole number, 0 (off) or positive"),
    "top_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "min_p": (lambda x: 0 <= x <= 1, "in [0, 1]"),
    "typical_p": (lambda x: 0 < x <= 1, "in (0, 1]"),
    "repetition_penalty": (lambda x: 1e-3 <= x <= 1e3, "positive, from 0.001 to 1000 (1 changes nothing)"),
    "presence_penalty": (lambda x: abs(x) <= 1e3, "a number from -1000 to 1000 (0 changes nothing)"),
    "frequency_penalty": (lambda x: abs(x) <= 1e3, "a number from -1000 to 1000 (0 changes nothing)"),
    "no_repeat_ngram": (lambda x: x >= 0, "a whole number, 0 (off) or positive"),
    "min_new_tokens": (lambda x: x >= 0, "a whole number, 0 (off) or positive"),
    "length_penalty": (lambda x: 0 <= x <= 6, "0 (off) or positive, at most 6"),
    "bias": (lambda x: abs(x) <= 1e30 or x == -math.inf, "from -1e30 to 1e30, or minus infinity to ban a token"),
}
_WHOLE = ("top_k", "no_repeat_ngram", "min_new_tokens")


def checked_setting(name: str, value: Any) -> float:
    """Returns a setting as a Python number that compiled code can use.

    Whole numbers are limited to the largest int32.

    Raises:
      ValueError: if the value is not a number or is out of the setting's range.
    """
    is_in_range, expected = _RANGES[name]
    number = _number(value)
    # NaN fails the test of every range, and infinity is not a whole number.
    if not is_in_range(number) or (name in _WHOLE and number != number // 1):
        raise ValueError(f"{name}={value} must be {expected}")
    return int(min(number, _LARGEST_INT)) if name in _WHOLE else float(number)


def _number(value: Any) -> int | float:
    """Converts a number of Python, NumPy or JAX to a Python number; returns NaN for anything
    else."""
    item = value.item() if getattr(value, "ndim", None) == 0 else value
    return item if isinstance(item, (int, float)) and not isinstance(item, bool) else math.nan
