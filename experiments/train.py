"""Trains a model on text: a GPT, a BERT or a translator, as the config says.

python -m experiments.train --config=shakespeare_char --config.data.path=FILE --workdir=DIR
python -m experiments.train --config=book_mlm --config.data.path=BOOK --workdir=DIR
python -m experiments.train --config=multi30k_ende --config.data.path=SOURCE,TARGET --workdir=DIR

The same command resumes a run that was stopped.
"""

from __future__ import annotations

from absl import flags

from experiments import cli, language_model, masked_language_model, translation
from transformer_jax.training.processes import is_first

_CONFIG = cli.define_config()
_WORKDIR = flags.DEFINE_string("workdir", None, "Where checkpoints, metrics and the tokenizer go.")

_FAMILIES = {
    "decoder": (language_model, 'experiments.generate --workdir={} --prompt="..."'),
    "encoder": (masked_language_model, 'experiments.fill_mask --workdir={} --text="... <mask> ..."'),
    "encoder_decoder": (translation, 'experiments.translate --workdir={} --text="..."'),
}


def main() -> None:
    config = _CONFIG()
    if _WORKDIR.value is None:
        raise ValueError("--workdir is missing: the directory for checkpoints, metrics and the tokenizer")
    program, then = _FAMILIES[config.model.family]
    program.train(config, _WORKDIR.value)
    if is_first():
        print(f"done; next: python -m {then.format(_WORKDIR.value)}")


if __name__ == "__main__":
    cli.run(main)
