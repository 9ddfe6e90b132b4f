"""How good a trained model is: loss, perplexity, bits per byte; masked-token accuracy; BLEU and
chrF; who answers best.

transformer-jax evaluate --workdir=DIR --data=FILE                                    a language model
transformer-jax evaluate --workdir=DIR [--data=FILE]                                  a masked language model
transformer-jax evaluate --workdir=DIR [--data=SOURCE,TARGET --target_language=de]    a translator
transformer-jax evaluate --compare A B [C ...] --data=PROMPTS --judge=JUDGE           assistants

A judge is the workdir of a reward model, or module:function from texts to numbers. KL is measured
to A. --model=DIRECTORY_OR_ID in place of --workdir measures a model of Hugging Face. Without --data
a model is measured on what its run held out, where its task can.
"""

from __future__ import annotations

import itertools
import sys

from absl import flags

from transformer_jax.alignment import comparison
from transformer_jax.cli import loading
from transformer_jax.cli.flags import required, run
from transformer_jax.data import read_prompts
from transformer_jax.runs.evaluation import evaluate, evaluating_task
from transformer_jax.tasks.answering import check_can_answer
from transformer_jax.tasks.policy import load_reward
from transformer_jax.training.bundle import load

_WORKDIR = flags.DEFINE_string("workdir", None, "A directory that transformer-jax train wrote.")
_MODEL = flags.DEFINE_string("model", None, "Instead: a directory, or an id, of a model of Hugging Face.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_AVERAGE = flags.DEFINE_integer("average", 1, "Use the mean weights of so many last checkpoints.")
_DATA = flags.DEFINE_string("data", None, "A text file, a glob, or JSONL; for a translator SOURCE,TARGET or TSV.")
_TASK = flags.DEFINE_string("task", None, "By whose measure; by default that of the task that trained the model.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Windows, rows or sentences at a time.", lower_bound=1)
_BEAM_SIZE = flags.DEFINE_integer("beam_size", 5, "Hypotheses of beam search, for a translator.")
_LENGTH_PENALTY = flags.DEFINE_float("length_penalty", 1.0, "Exponent of the length that divides log P.")
_TARGET_LANGUAGE = flags.DEFINE_string("target_language", None, "Such as 'de': to tokenise for tokenised BLEU.")
_COMPARE = flags.DEFINE_list("compare", None, "Workdirs of assistants whose answers to compare.")
_JUDGE = flags.DEFINE_string("judge", None, "The workdir of a reward model, or module:function.")
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 48, "Longest answer of an assistant.")
_SEED = flags.DEFINE_integer("seed", 0, "The same seed draws the same answers.")


def main() -> None:
    """``transformer-jax evaluate``."""
    sys.argv[:] = _joined(sys.argv)
    run(_compare_or_evaluate)


def _compare_or_evaluate() -> None:
    if _COMPARE.value:
        _compare()
        return
    bundle = loading.load(_WORKDIR.value, _MODEL.value, step=_STEP.value, average=_AVERAGE.value)
    options = dict(batch_size=_BATCH_SIZE.value, beam_size=_BEAM_SIZE.value, length_penalty=_LENGTH_PENALTY.value,
                   target_language=_TARGET_LANGUAGE.value)
    measured = evaluate(bundle, _DATA.value, task=_TASK.value, **options)
    print(evaluating_task(bundle, _TASK.value).report(bundle, measured, **options))


def _compare() -> None:
    """Prints the table of :mod:`transformer_jax.alignment.comparison`."""
    if len(_COMPARE.value) < 2:
        raise ValueError(f"--compare takes two workdirs or more, not {' '.join(_COMPARE.value)}")
    prompts = read_prompts(required(_DATA))
    bundles = {workdir: load(workdir, step=_STEP.value) for workdir in _COMPARE.value}
    for bundle in bundles.values():
        check_can_answer(bundle)
    judge = load_reward(required(_JUDGE), next(iter(bundles.values())).tokenizer)
    found = comparison.answer(bundles, prompts, judge, max_new_tokens=_MAX_NEW_TOKENS.value, seed=_SEED.value)
    for name, answered in found.items():
        print(f"--- {name} ---")
        for prompt, text in itertools.islice(zip(prompts, answered.texts, strict=True), 3):
            print(f"{prompt[-1].content}\n  -> {text}")
    print(comparison.table(found, against=_COMPARE.value[0]))


def _joined(arguments: list[str]) -> list[str]:
    """``--compare A B`` as ``--compare=A,B``, which is how absl reads a list."""
    if "--compare" not in arguments:
        return arguments
    start = arguments.index("--compare")
    names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments[start + 1:]))
    return [*arguments[:start], f"--compare={','.join(names)}", *arguments[start + 1 + len(names):]]


if __name__ == "__main__":
    main()
