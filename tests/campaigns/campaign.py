"""Code that all campaigns share: it draws cases from a seed until the time is up, and decides which
errors are clear."""

import contextlib
import dataclasses
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator

import jax
import numpy as np
import pytest

MARKS = [pytest.mark.long, pytest.mark.campaign]
SEED = int(os.environ.get("CAMPAIGN_SEED", "0"))
SECONDS = float(os.environ.get("CAMPAIGN_SECONDS", "12"))
_LONGEST_CASE = int(os.environ.get("CAMPAIGN_LONGEST_CASE", "600"))  # seconds
ONLY = os.environ.get("CAMPAIGN_CASE")


@dataclasses.dataclass
class Counts:
    """How the cases of a campaign ended."""

    right: int = 0
    refused: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)


def run_cases(name: str, case: Callable[[np.random.Generator], bool], *, least: int = 3, most: int = 10**9) -> Counts:
    """Runs a case repeatedly with new random generators, at least `least` times, until the time
    is up.

    Args:
        name: The name of the campaign in the report.
        case: Does one thing to the software. It returns whether the software accepted the case. A
            clear error counts as a refusal; any other exception and a failed assertion are
            failures.
        least: The smallest number of cases to run, even if the time is up.
        most: The number of different cases.
    """
    counts, end = Counts(), time.monotonic() + SECONDS
    signal.signal(signal.SIGALRM, _hangs)
    numbers = [int(ONLY)] if ONLY else range(most)
    for number in numbers:
        if number >= least and time.monotonic() > end and not ONLY:
            break
        try:
            signal.alarm(_LONGEST_CASE)
            if case(np.random.default_rng([SEED, number])):
                counts.right += 1
            else:
                counts.refused += 1
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of a Rust library is not an Exception; continue with the next case
            if is_clear(error):
                counts.refused += 1
            else:
                counts.failures.append(f"case {number}: {shown(error)}")
        finally:
            signal.alarm(0)
        if number % 25 == 24:  # each compiled program holds maps of memory, of which a process may have 65,530
            jax.clear_caches()
    total = counts.right + counts.refused + len(counts.failures)
    print(f"\n{name}: seed {SEED}, {total} cases: {counts.right} right, {counts.refused} refused in one line, "
          f"{len(counts.failures)} failed; one again: CAMPAIGN_SEED={SEED} CAMPAIGN_CASE=...")
    for failure in counts.failures[:20]:
        print("  ", failure)
    assert not counts.failures, counts.failures[:20]
    return counts


def _hangs(signum: int, frame: object) -> None:
    raise AssertionError(f"the case is not finished after {_LONGEST_CASE} s")


def is_clear(error: BaseException) -> bool:
    """Whether an error is one that a user can act on: an own ValueError of one line, or a file that
    cannot be used."""
    text = str(error)
    if isinstance(error, OSError):
        return bool(error.filename)
    kinds = (ValueError, ImportError, NotImplementedError)
    return type(error) not in (UnicodeDecodeError, UnicodeEncodeError) and isinstance(error, kinds) and (
        len(text) > 15 and "\n" not in text and not _is_raw(error))


def shown(error: BaseException) -> str:
    """Describes an error and the place where it was raised."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} ({last.filename}:{last.lineno})"


@contextlib.contextmanager
def refusals(allowed: str) -> Iterator[None]:
    """Checks that a clear error mentions `allowed`, such as the name of the file."""
    try:
        yield
    except Exception as error:
        if is_clear(error) and allowed not in str(error) and allowed not in str(getattr(error, "filename", "")):
            raise AssertionError(f"does not name {allowed!r}: {error}") from error
        raise


def _is_raw(error: BaseException) -> bool:
    """Returns whether an error was raised inside a library, on a call that this project did not
    make."""
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return "/transformer_jax/" not in last and "/tests/" not in last
