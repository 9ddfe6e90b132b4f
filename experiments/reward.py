"""Trains a reward model on ranked answers; it begins as a trained policy.

python -m experiments.reward --model=SFT_WORKDIR --workdir=DIR --config.data.path=COMPARISONS

The same command resumes a run that was stopped.
"""

from __future__ import annotations

from absl import flags

import transformer_jax as tj
from experiments import answers, cli, preferences
from transformer_jax.data import read_comparisons

_CONFIG = cli.define_config("reward")
_MODEL = flags.DEFINE_string("model", None, "The workdir of the policy to start from, such as that of experiments.sft.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the tokenizer go.")


def main() -> None:
    config = _CONFIG()
    workdir, model = cli.required(_WORKDIR), cli.required(_MODEL)
    comparisons, held_out = answers.examples(config.data, read_comparisons, "comparisons")
    found = preferences.train_reward(config, workdir, tj.load(model, step=_STEP.value), comparisons, held_out)
    print(f"the best, of step {found['step']}, orders {found['accuracy']:.1%} of the pairs held out as they are; mean "
          f"margin {found['margin']:.3f}, calibration error {found['calibration_error']:.3f}")
    print(f"done; next: python -m experiments.ppo --model={model} --config.rl.reward={workdir} --workdir=... "
          "--config.data.path=PROMPTS")


if __name__ == "__main__":
    cli.run(main)
