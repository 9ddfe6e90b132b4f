"""Compares this library with other libraries, on the same work in the same run (extra ``bench``).

python -m benchmarks train                       a training step, compared with eager PyTorch
python -m benchmarks quality --data=input.txt    the time to a validation loss, compared with eager PyTorch
python -m benchmarks decode                      generation, compared with Hugging Face transformers
python -m benchmarks fast                        loading, quantised weights and speculative decoding
python -m benchmarks draft --data=moby_dick.txt --workdir=runs/draft
                                                 speculative decoding of prose with a draft model that is trained first
python -m benchmarks compile                     compile time by depth, and with a warm cache
python -m benchmarks mlm --data=dom_casmurro.txt masked language modelling, compared with Hugging Face's RoBERTa
python -m benchmarks translate --workdir=DIR     beam search, compared with Hugging Face's Marian with the same weights
python -m benchmarks interop                     GPT-2, RoBERTa and BART, from the same files as transformers,
                                                 CTranslate2, llama.cpp and ONNX Runtime (extra engines)
python -m benchmarks experts                     a mixture of experts beside a dense model of equal active parameters
python -m benchmarks corpora --data=FOLDER       planted duplicates and a quality filter, beside exact similarities
python -m benchmarks rl                          GRPO and PPO, compared with TRL's GRPO
python -m benchmarks rollouts                    log probabilities of the sampler beside those of the trainer
python -m benchmarks words --data=a.txt,b.jsonl.gz --analogies=questions-words.txt --rounds=3
                                                 word vectors, compared with gensim
python -m benchmarks features --rounds=3         sparse autoencoders, compared with SAELens; the speed of collecting
python -m benchmarks sweep --data=input.txt      eight small models in one program, compared with eight programs
python -m benchmarks speedrun --data=input.txt   steps and time to fixed losses, compared with eager PyTorch
python -m benchmarks gpu --data=input.txt        all measurements on a GPU, in ten minutes
python -m benchmarks all --data=input.txt --json=all.json
                                                 train, decode, fast, interop, compile, experts, sweep and speedrun
                                                 with few rounds
python -m benchmarks tpu                         programs that are compiled for TPUs, on a machine without TPUs

The results are medians over several rounds. In each round the sides run one after the other, each
in its own process. Compilation is not included, unless it is what the benchmark measures.
"""

from __future__ import annotations

import importlib
import json
import pathlib
import sys
from types import ModuleType

from absl import app, flags

from transformer_jax.runtime import keep_freed_memory

_DATA = flags.DEFINE_string("data", None, "The text file for quality, draft, mlm, words, sweep, speedrun and "
                            "gpu; the folder for corpora.")
_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a trained translator, for translate; of the "
                               "models to train, for draft.")
_ANALOGIES = flags.DEFINE_string("analogies", None, "The file of analogies, for words.")
_STEPS = flags.DEFINE_integer("steps", 300, "The number of training steps of mlm.")
_ROUNDS = flags.DEFINE_integer("rounds", 9, "The number of rounds; the median is reported.")
_TINY = flags.DEFINE_bool("tiny", False, "Run gpu, interop, fast or draft with very small sizes, on any machine.")
_PARTS = flags.DEFINE_list("parts", None, "The parts of gpu, interop or fast, the programs of tpu, or the targets of "
                           "speedrun; default: all.")
_JSON = flags.DEFINE_string("json", None, "A JSON file to write the figures to.")


def _module(name: str) -> ModuleType:
    """Imports a module of the benchmarks. The import is late, because a benchmark need not have the
    packages that the other benchmarks need."""
    return importlib.import_module(f"benchmarks.{name}")


def _given(flag: flags.FlagHolder[str | None]) -> str:
    """Returns the value of a flag, or exits with an error if it is not given."""
    return flag.value if flag.value is not None else sys.exit(f"error: --{flag.name} is missing")


_PROGRAMS = {
    "train": lambda: _module("cpu.decoders").train(_ROUNDS.value),
    "quality": lambda: _module("cpu.decoders").quality(_given(_DATA)),
    "decode": lambda: _module("cpu.decoders").decode(_ROUNDS.value),
    "fast": lambda: _module("cpu.fast_decoding").fast(_ROUNDS.value, _PARTS.value, tiny=_TINY.value),
    "draft": lambda: _module("cpu.drafts").draft(_given(_DATA), _ROUNDS.value, _WORKDIR.value, tiny=_TINY.value),
    "compile": lambda: _module("cpu.decoders").compilation(),
    "experts": lambda: _module("cpu.experts").compare(_ROUNDS.value),
    "mlm": lambda: _module("cpu.families").mlm(_given(_DATA), _STEPS.value),
    "translate": lambda: _module("cpu.families").translate(_given(_WORKDIR), _ROUNDS.value),
    "interop": lambda: _module("cpu.interop").interop(_ROUNDS.value, _PARTS.value, tiny=_TINY.value),
    "corpora": lambda: _module("cpu.corpora").corpora(_given(_DATA)),
    "words": lambda: _module("cpu.word_vectors").words(_given(_DATA), _given(_ANALOGIES), _ROUNDS.value),
    "features": lambda: _module("cpu.features").features(_ROUNDS.value),
    "rl": lambda: _module("cpu.alignment").rl(_ROUNDS.value),
    "rollouts": lambda: _module("cpu.rollouts").rollouts(),
    "sweep": lambda: _module("cpu.sweeping").sweep(_given(_DATA), _ROUNDS.value),
    "speedrun": lambda: _module("cpu.speedrun").speedrun(_given(_DATA), _ROUNDS.value, _PARTS.value),
    "gpu": lambda: _module("gpu.suite").gpu(_DATA.value, tiny=_TINY.value, parts=_PARTS.value),
    "all": lambda: _module("everything").everything(_DATA.value, _JSON.value),
    "tpu": lambda: _module("tpu.programs").tpu(_PARTS.value),
}


def main(arguments: list[str]) -> None:
    """Runs the benchmark that the first argument names, and prints its rows."""
    if len(arguments) != 2 or arguments[1] not in _PROGRAMS:
        sys.exit(f"error: name one benchmark: python -m benchmarks {{{','.join(_PROGRAMS)}}}")
    if arguments[1] in ("train", "draft", "mlm", "rl", "sweep", "speedrun"):
        keep_freed_memory()  # the training programs do this too
    rows = _PROGRAMS[arguments[1]]()
    for row in [] if arguments[1] == "gpu" else rows:  # gpu prints its own tables
        print("  ".join(f"{name} {value:,.3g}" if isinstance(value, float) and value < 100 else
                        f"{name} {value:,.0f}" if isinstance(value, float) else str(value)
                        for name, value in row.items()))
    if _JSON.value:
        pathlib.Path(_JSON.value).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    app.run(main)
