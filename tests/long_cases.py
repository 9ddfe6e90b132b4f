"""Parameters of a test, most of which run with the long tests."""

from collections.abc import Iterable

import pytest


def mostly_long(names: Iterable[str], *short: str) -> list:
    """Returns the names as parameters; only those in ``short`` run with the short tests."""
    names = list(names)
    assert set(short) <= set(names), f"{set(short) - set(names)} are no parameters"
    return [name if name in short else pytest.param(name, marks=pytest.mark.long) for name in names]
