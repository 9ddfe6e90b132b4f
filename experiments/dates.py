"""Learns to read dates written in words, Portuguese and English, and draws which words became year,
month and day.

python -m experiments.dates
"""

from __future__ import annotations

import pathlib

from absl import flags

import transformer_jax as tj
from transformer_jax.cli.flags import define_config, run
from transformer_jax.inspection import plots
from transformer_jax.runs.evaluation import evaluate, evaluating_task
from transformer_jax.runs.training import train
from transformer_jax.training.bundle import Bundle

_CONFIG = define_config("dates")
_WORKDIR = flags.DEFINE_string("workdir", "runs/dates", "Where everything goes.")
_TEXT = flags.DEFINE_string("text", "sexta-feira, vinte e três de abril de 1998", "The date of the picture.")


def main() -> None:
    workdir, config = pathlib.Path(_WORKDIR.value), _CONFIG()
    bundle = train(config, workdir=workdir)
    search = dict(beam_size=1, length_penalty=0.0)
    print(evaluating_task(bundle).report(bundle, evaluate(bundle, batch_size=250, **search), **search))
    iso = draw_cross_attention(bundle, _TEXT.value, workdir / "attention.png")
    print(f"""{_TEXT.value} -> {iso}
The model is in {workdir}; which words became the year, the month and the day: {workdir / "attention.png"}. Next:
  python -m experiments.translate --workdir={workdir} --text="the twenty-third of April, nineteen ninety-eight"
  python -m experiments.dates --workdir={workdir} --text="domingo, 5 de maio de dois mil e sete\"""")


def draw_cross_attention(bundle: Bundle, text: str, path: pathlib.Path) -> str:
    """Draws, for each token of the translation, where the last decoder layer looks: the mean over
    its heads.

    Returns:
      The translation.
    """
    seen = tj.inspect_text(bundle, text)
    queries, keys = seen.labels("cross")
    figure = plots.alignment(seen.attention("cross", layers=-1), keys, queries,
                             title="cross attention, last layer, mean of heads")
    plots.save(figure, path)
    return bundle.tokenizer.decode(seen.ids[1:].tolist())


if __name__ == "__main__":
    run(main)
