"""All benchmarks of a CPU in one run; run by ``python -m benchmarks all``.

Each benchmark is a process of its own, with few rounds. On two cores of an AMD EPYC of 2017, those
up to ``experts`` took 49 minutes. Those that read a text need ``--data``, and those whose peers are
not installed report the error of their process and do not stop the others.
"""

from __future__ import annotations

import json
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time
from typing import Any

_ROUNDS = {"train": 3, "decode": 3, "fast": 3, "interop": 2, "compile": 1, "experts": 3}
_WITH_DATA = {"sweep": ["--rounds=3"], "speedrun": ["--rounds=3", "--parts=1.87"]}


def everything(data: str | None, results: str | None = None) -> list[dict[str, Any]]:
    """Runs the benchmarks one after the other.

    Args:
      data: The file of tinyshakespeare, or ``None`` to leave out the benchmarks that read it.
      results: A JSON file, to which the rows are written after each benchmark, so that those that
        have ended are kept if the program is stopped.

    Returns:
      The rows of all benchmarks. Each row has the name of its ``benchmark``. The first row says what
      the machine is, and each benchmark ends with a row of its ``minutes``, and the ``error`` if it
      failed.
    """
    commands = {name: [f"--rounds={rounds}"] for name, rounds in _ROUNDS.items()}
    if data is not None:
        commands |= {name: [f"--data={data}", *options] for name, options in _WITH_DATA.items()}
    rows: list[dict[str, Any]] = [{"benchmark": "machine", **machine()}]
    for name, options in commands.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        rows += _run(name, options)
        print(f"{name}: {rows[-1]['minutes']:.1f} minutes {rows[-1].get('error', '')}", file=sys.stderr, flush=True)
        if results is not None:
            pathlib.Path(results).write_text(json.dumps(rows, indent=1))
    return rows


def machine() -> dict[str, Any]:
    """Describes the machine and the versions of the libraries."""
    import flax
    import jax

    return {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version(),
            "jax": jax.__version__, "flax": flax.__version__}


def _processor() -> str:
    """Returns the name of the processor, as the system gives it."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _run(name: str, options: list[str]) -> list[dict[str, Any]]:
    """Runs one benchmark and returns its rows."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as directory:
        results = pathlib.Path(directory, "rows.json")
        done = subprocess.run([sys.executable, "-m", "benchmarks", name, *options, f"--json={results}"],
                              capture_output=True, text=True)
        rows = json.loads(results.read_text()) if results.exists() else []
    end: dict[str, Any] = {"minutes": (time.perf_counter() - start) / 60}
    if done.returncode:
        end["error"] = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
    return [{"benchmark": name, **row} for row in [*rows, end]]
