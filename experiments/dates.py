"""Trains a model that converts dates in words, in Portuguese and English, to ISO form. It then
draws which words the model reads for the year, the month and the day.

python -m experiments.dates
"""

from __future__ import annotations

import pathlib
import re

import numpy as np
from absl import flags

import transformer_jax as tj
from experiments.dates_figure import fields, words
from transformer_jax.cli.flags import define_config, directory, run
from transformer_jax.inspection import plots
from transformer_jax.runs.evaluation import evaluate, evaluating_task
from transformer_jax.runs.training import train
from transformer_jax.training.bundle import Bundle

_CONFIG = define_config("dates")
_WORKDIR = flags.DEFINE_string("workdir", "runs/dates", "The directory for all results.")
_TEXT = flags.DEFINE_string("text", "sexta-feira, vinte e três de abril de 1998",
                            "The date in words that the picture shows.")

DATE = r"\d{4}-\d\d-\d\d"


def main() -> None:
    """Trains the model, evaluates it and draws its attention."""
    workdir, config = directory(_WORKDIR), _CONFIG()
    bundle = train(config, workdir=workdir)
    search = dict(beam_size=1, length_penalty=0.0)
    print(evaluating_task(bundle).report(bundle, evaluate(bundle, batch_size=250, **search), **search))
    iso = draw_cross_attention(bundle, _TEXT.value, workdir / "attention.png")
    print(f"""{_TEXT.value} -> {iso}
The model is in {workdir}. The picture {workdir / "attention.png"} shows which words the model reads for the year,
the month and the day. Next:
  python -m experiments.translate --workdir={workdir} --text="the twenty-third of April, nineteen ninety-eight"
  python -m experiments.dates --workdir={workdir} --text="domingo, 5 de maio de dois mil e sete\"""")


def draw_cross_attention(bundle: Bundle, text: str, path: pathlib.Path) -> str:
    """Draws the cross attention of the last decoder layer, averaged over its heads. The picture has
    a row for the year, the month and the day, and a column for each word. If the output is not a
    date, the picture has a row for each token.

    Args:
      bundle: The trained model.
      text: The date in words.
      path: The picture to write.

    Returns:
      The translation.
    """
    inspected = tj.inspect_text(bundle, text)
    weights_TS = np.asarray(inspected.attention("cross", layers=-1)).mean(0)
    queries, keys = inspected.labels("cross")
    title = "which source tokens each token attends to"
    if re.fullmatch(DATE, "".join(inspected.tokens[1:])):
        queries, shares_FT = fields(inspected.tokens[1:])
        keys, members_WS = words(bundle.tokenizer, inspected.source_ids.tolist())
        weights_TS = shares_FT @ weights_TS[:-1] @ members_WS.T  # the last row predicts the end of the text
        title = "which words the year, the month and the day attend to"
    figure = plots.alignment(weights_TS, keys, queries, title=f"{title} (cross attention, last layer, mean of heads)")
    plots.save(figure, path)
    return bundle.tokenizer.decode(inspected.ids[1:].tolist())


if __name__ == "__main__":
    run(main)
