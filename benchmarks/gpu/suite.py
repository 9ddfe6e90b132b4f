"""All benchmarks on one GPU; run by ``python -m benchmarks gpu``.

The program prints a Markdown table for each part, and ``--json`` writes the same figures to a file.
If a part fails, or misses a package or has not enough time left, its table says so, and the other
parts run. If PyTorch is installed, the other sides run in it, each in its own process. ``--tiny``
runs every part with very small sizes on any machine.
"""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import jax

from benchmarks.gpu import kernels, models
from benchmarks.gpu.sizes import FULL, TINY, Sizes
from transformer_jax.runtime import use_xla_flags

_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

# Each part with the seconds that it may take. A part starts only if this time is left.
_PARTS: dict[str, tuple[Callable[..., list[dict]], int]] = {
    "ceilings": (kernels.ceilings, 15),
    "kernels against float64": (kernels.errors, 40),
    "training": (models.training, 150),
    "attention": (kernels.attention, 60),
    "cross entropy": (kernels.cross_entropy, 20),
    "decoding": (models.decoding, 120),
    "compiling": (models.compiling, 60),
    "nanoGPT's characters": (models.characters, 90),
}


def gpu(data: str | None, *, tiny: bool = False, parts: list[str] | None = None, minutes: float = 10.0) -> dict:
    """Runs the benchmark.

    Args:
      data: The text file that the character model is trained on.
      tiny: True to use very small sizes, on any machine.
      parts: The parts to run; by default all.
      minutes: The time limit. A part is left out if it may take longer than the time that is left.

    Returns:
      The rows of each part, by its name.
    """
    start = time.monotonic()
    # The processes of the other sides need GPU memory too.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    added = {} if tiny else use_xla_flags("gpu")
    device = jax.devices()[0]
    if device.platform != "gpu" and not tiny:
        sys.exit(f"error: this benchmark needs a GPU, but the device is a {device.platform.upper()}; pass --tiny for "
                 "a test run")
    unknown = sorted(set(parts or ()) - {*_PARTS, "determinism"})
    if unknown:
        sys.exit(f"error: there is no part {unknown[0]!r}; the parts are: {', '.join(_PARTS)}, determinism")
    sizes = TINY if tiny else FULL
    found: dict[str, list[dict]] = {"machine": [{
        "device": device.device_kind, "jax": jax.__version__, "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
        "of which set here": " ".join(f"{name}={value}" for name, value in added.items())}]}
    show("machine", found["machine"])
    for name, (part, seconds) in _PARTS.items():
        if parts is not None and name not in parts:
            continue
        left = 60 * minutes - (time.monotonic() - start)
        if left < seconds and not tiny:
            found[name] = [{"left out": f"{left:.0f} s are left and it may take {seconds} s"}]
        else:
            found[name] = _tried(lambda part=part: part(sizes, found, data))
        show(name, found[name])
    if parts is None or "determinism" in parts:
        found["determinism"] = _tried(lambda: _determinism(sizes, found, tiny))
        show("determinism", found["determinism"])
    return found


def _tried(part: Callable[[], list[dict]]) -> list[dict]:
    """Runs a part, and returns its error as a row if it fails."""
    try:
        return part()
    except Exception as error:  # one failing part must not stop the others
        return [{"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}]


def _determinism(sizes: Sizes, found: dict[str, list[dict]], tiny: bool) -> list[dict]:
    """Repeats the training of the first model in a process in which XLA uses deterministic kernels
    only."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks", "gpu", "--parts=training", f"--json={file.name}"]
        flags = " ".join([os.environ.get("XLA_FLAGS", ""), _DETERMINISTIC])
        environment = os.environ | {"XLA_FLAGS": flags, models.FIRST_ONLY: "1"}
        command += ["--tiny"] if tiny else []
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr[-300:])
        slow = json.loads(pathlib.Path(file.name).read_text())["training"][0]
    rows = found.get("training") or models.training(sizes, found, None)
    fast = rows[0]
    return [{"model": slow["model"], "tokens/s": fast.get("tokens/s"), "deterministic tokens/s": slow["tokens/s"],
             "share": slow["tokens/s"] / fast["tokens/s"]}]


def show(title: str, rows: list[dict]) -> None:
    """Prints rows as a Markdown table."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    print(f"\n### {title}\n\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for row in rows:
        print(f"| {' | '.join(_cell(row.get(name, '')) for name in columns)} |", flush=True)


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
