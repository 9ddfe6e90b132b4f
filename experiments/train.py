"""Trains a language model on text.

python -m experiments.train --config=shakespeare_char --config.data.path=FILE --workdir=DIR

The same command resumes a run that was stopped.
"""

from __future__ import annotations

from absl import flags

from experiments import cli, language_model
from transformer_jax.data import read_documents

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the tokenizer go.")


def main() -> None:
    config = _CONFIG()
    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing: the directory for checkpoints, metrics and the tokenizer")
    if (config.data.path is None) == (config.data.tfds is None):
        raise ValueError("say what to train on: --config.data.path=FILE (text, glob or JSONL), or "
                         "--config.data.tfds=NAME")
    held_out = None if config.data.validation_path is None else read_documents(
        config.data.validation_path, key=config.data.text_key)
    language_model.run(config, _WORKDIR.value, language_model.corpus(config.data), held_out)
    print(f"done; next: python -m experiments.generate --workdir={_WORKDIR.value} --prompt=\"...\"")


if __name__ == "__main__":
    cli.run(main)
