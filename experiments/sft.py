"""Fine-tunes a trained GPT on demonstrations: prompts and ideal answers.

python -m experiments.sft --model=BASE_WORKDIR --workdir=DIR --config.data.path=FILE
python -m experiments.sft --config=sft_faquad --model=BASE_WORKDIR --workdir=DIR --config.data.path=TRAIN \
    --config.data.validation_path=DEV --config.lora.rank=8

A base trained here needs role tokens in its tokenizer (--config.data.tokenizer.chat=true in its training); to a model
of Hugging Face (--model=openai-community/gpt2) roles are named in text. The same command resumes a run that
was stopped.
"""

from __future__ import annotations

from absl import flags

from experiments import answers, cli, fine_tuning, loading
from transformer_jax.data import read_demonstrations

_CONFIG = cli.define_config("sft_instructions")
_MODEL = flags.DEFINE_string("model", None, "The model to start from: a workdir, or a directory or id of Hugging Face.")
_STEP = flags.DEFINE_string("step", None, "A step kept there, or 'best'; by default the last.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the tokenizer go.")


def main() -> None:
    config = _CONFIG()
    workdir, model = cli.required(_WORKDIR), cli.required(_MODEL)
    demonstrations, held_out = answers.examples(config.data, read_demonstrations, "demonstrations")
    fine_tuning.train(config, workdir, loading.load(None, model, step=_STEP.value), demonstrations, held_out)
    print(f'done; next: python -m experiments.generate --workdir={workdir} --step=best --chat --prompt="..."')


if __name__ == "__main__":
    cli.run(main)
