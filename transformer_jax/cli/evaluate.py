"""Measures a trained model: loss, perplexity and bits per byte; accuracy at masked tokens; BLEU and
chrF. It also compares the answers of several assistants.

transformer-jax evaluate --workdir=DIR --data=FILE                       a language model
transformer-jax evaluate --workdir=DIR [--data=FILE]                     a masked language model
transformer-jax evaluate --workdir=DIR [--data=SOURCE,TARGET --target_language=de]  a translator
transformer-jax evaluate --workdir=DIR --data=QUESTIONS --answers [--language=pt]   an assistant
transformer-jax evaluate --compare A B [C ...] --data=PROMPTS --judge=JUDGE         assistants

A judge is the workdir of a reward model, or module:function, a function from texts to numbers. The
KL divergence is measured from A, the first assistant. --model=DIRECTORY_OR_ID instead of --workdir
measures a model of Hugging Face. Without --data, most tasks measure a model on the held-out part of
its training data.
"""

from __future__ import annotations

import itertools
import sys
from typing import Any

from absl import flags

from transformer_jax.alignment import comparison
from transformer_jax.cli import loading
from transformer_jax.cli.flags import required, run
from transformer_jax.data import read_prompts
from transformer_jax.runs.evaluation import evaluate, evaluating_task, is_option
from transformer_jax.tasks.answering import answering
from transformer_jax.tasks.inputs import tokenizer_of
from transformer_jax.tasks.policy import load_reward
from transformer_jax.training.bundle import load

_WORKDIR = flags.DEFINE_string("workdir", None, "The directory of a run, which transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead of --workdir: a directory or id of Hugging Face, or a GGUF file.")
_STEP = flags.DEFINE_string("step", None, "The step of a checkpoint in --workdir, or 'best'; by default the last.")
_AVERAGE = flags.DEFINE_integer("average", 1, "The number of last checkpoints whose weights are averaged.")
_DATA = flags.DEFINE_string("data", None,
                            "A text file, a glob, or JSONL; for a translator SOURCE,TARGET or a TSV file.")
_TASK = flags.DEFINE_string("task", None, "The task that measures the model; by default the task that trained it.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32,
                                   "The number of windows, rows or sentences in a batch.", lower_bound=1)
_BEAM_SIZE = flags.DEFINE_integer("beam_size", 5, "For a translator: the number of hypotheses of beam search.")
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "The exponent of the length, by which log P is divided.")
_TARGET_LANGUAGE = flags.DEFINE_string("target_language", None,
                                       "The language of the targets, such as 'de', for BLEU and chrF.")
_COMPARE = flags.DEFINE_list("compare", None, "The workdirs of assistants whose answers are compared.")
_JUDGE = flags.DEFINE_string("judge", None, "The workdir of a reward model, or module:function.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 48,
                                       "The largest number of tokens in an answer of an assistant.")
_ANSWERS = flags.DEFINE_boolean("answers", False,
                                "For an assistant: let it answer, and compare with the right answers.")
_LANGUAGE = flags.DEFINE_string("language", "en", "The language of the answers, 'en' or 'pt'.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed draws the same answers.")


def main() -> None:
    """Runs ``transformer-jax evaluate``."""
    sys.argv[:] = _joined(sys.argv)
    run(_compare_or_evaluate)


def _compare_or_evaluate() -> None:
    """Compares several models if ``--compare`` is given; otherwise measures one."""
    if _COMPARE.value:
        _compare()
        return
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value, average=_AVERAGE.value)
    task = evaluating_task(bundle, _TASK.value)
    given: dict[str, Any] = dict(batch_size=_BATCH_SIZE.value, beam_size=_BEAM_SIZE.value,
                                 length_penalty=_LENGTH_PENALTY.value, target_language=_TARGET_LANGUAGE.value,
                                 answers=_ANSWERS.value, max_new_tokens=_MAX_NEW_TOKENS.value,
                                 language=_LANGUAGE.value)
    options = {name: value for name, value in given.items() if is_option(task, name)}
    measured = evaluate(bundle, _DATA.value, task=_TASK.value, **options)
    print(task.report(bundle, measured, **options))


def _compare() -> None:
    """Prints the first answers of each assistant, and the table of
    ``transformer_jax.alignment.comparison``."""
    workdirs: list[str] = _COMPARE.value or []
    if len(workdirs) < 2:
        raise ValueError(f"--compare needs at least two workdirs, but got {' '.join(workdirs)}")
    prompts = read_prompts(required(_DATA))
    bundles = {workdir: load(workdir, step=_STEP.value) for workdir in workdirs}
    for bundle in bundles.values():
        answering(bundle)
    judge = load_reward(required(_JUDGE), tokenizer_of(bundles[workdirs[0]]))
    found = comparison.answer(bundles, prompts, judge, max_new_tokens=_MAX_NEW_TOKENS.value, seed=_SEED.value)
    for name, answered in found.items():
        print(f"--- {name} ---")
        for prompt, text in itertools.islice(zip(prompts, answered.texts, strict=True), 3):
            print(f"{prompt[-1].content}\n  -> {text}")
    print(comparison.table(found, against=workdirs[0]))


def _joined(arguments: list[str]) -> list[str]:
    """Rewrites ``--compare A B`` to ``--compare=A,B``, because absl reads a list in this form
    only."""
    if "--compare" not in arguments:
        return arguments
    start = arguments.index("--compare")
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[start + 1:]))
    return [*arguments[:start], f"--compare={','.join(names)}", *arguments[start + 1 + len(names):]]


if __name__ == "__main__":
    main()
