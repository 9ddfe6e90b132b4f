"""Measures this library beside its peers, on the same work in the same run (extra ``bench``).

python -m benchmarks train                       training step beside eager PyTorch
python -m benchmarks quality --data=input.txt    time to a validation loss, beside eager PyTorch
python -m benchmarks decode                      generation beside Hugging Face transformers
python -m benchmarks compile                     compile time by depth, and with the cache warm
python -m benchmarks mlm --data=dom_casmurro.txt masked language modelling beside Hugging Face's RoBERTa
python -m benchmarks translate --workdir=DIR     beam search beside Hugging Face's Marian, same weights
python -m benchmarks interop                     GPT-2, RoBERTa and BART from the same files as transformers
python -m benchmarks rl                          GRPO and PPO beside TRL's GRPO
python -m benchmarks gpu --data=input.txt        everything that is measured on a GPU, in ten minutes
python -m benchmarks tpu                         programs compiled for TPUs that are not here

Medians over rounds in which both sides take turns, each in a process of its own; warm, unless
compilation is what is measured.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from types import ModuleType

from absl import app, flags

from transformer_jax.runtime import keep_freed_memory

_DATA = flags.DEFINE_string("data", None, "A text file, for quality and mlm.")
_WORKDIR = flags.DEFINE_string("workdir", None, "What a translator was trained in, for translate.")
_STEPS = flags.DEFINE_integer("steps", 300, "Training steps of mlm.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Turns of each side; the median is reported.")
_TINY = flags.DEFINE_bool("tiny", False, "Run gpu or interop at toy size, on any machine.")
_PARTS = flags.DEFINE_list("parts", None, "Only these parts of gpu or interop, or programs of tpu.")
_JSON = flags.DEFINE_string("json", None, "Also write the figures here.")


def _module(name: str) -> ModuleType:
    """A module of the benchmarks, imported when asked for: a machine with a GPU need not have what
    the others need."""
    return importlib.import_module(f"benchmarks.{name}")


def _given(flag: flags.FlagHolder[str | None]) -> str:
    return flag.value if flag.value is not None else sys.exit(f"error: --{flag.name} is missing")


_PROGRAMS = {
    "train": lambda: _module("cpu.decoders").train(_ROUNDS.value),
    "quality": lambda: _module("cpu.decoders").quality(_given(_DATA)),
    "decode": lambda: _module("cpu.decoders").decode(_ROUNDS.value),
    "compile": lambda: _module("cpu.decoders").compilation(),
    "mlm": lambda: _module("cpu.families").mlm(_given(_DATA), _STEPS.value),
    "translate": lambda: _module("cpu.families").translate(_given(_WORKDIR), _ROUNDS.value),
    "interop": lambda: _module("cpu.interop").interop(_ROUNDS.value, _PARTS.value, tiny=_TINY.value),
    "rl": lambda: _module("cpu.alignment").rl(_ROUNDS.value),
    "gpu": lambda: _module("gpu.suite").gpu(_DATA.value, tiny=_TINY.value, parts=_PARTS.value),
    "tpu": lambda: _module("tpu.programs").tpu(_PARTS.value),
}


def main(arguments: list[str]) -> None:
    if len(arguments) != 2 or arguments[1] not in _PROGRAMS:
        sys.exit(f"error: say what to measure: python -m benchmarks {{{','.join(_PROGRAMS)}}}")
    if arguments[1] in ("train", "mlm", "rl"):
        keep_freed_memory()  # as programs that train do
    rows = _PROGRAMS[arguments[1]]()
    for row in [] if arguments[1] == "gpu" else rows:  # which shows its tables as they come
        print("  ".join(f"{name} {value:,.3g}" if isinstance(value, float) and value < 100 else
                        f"{name} {value:,.0f}" if isinstance(value, float) else str(value)
                        for name, value in row.items()))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
