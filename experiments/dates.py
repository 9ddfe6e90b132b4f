"""Learns to read dates written in words, Portuguese and English, and draws which words became year, month and day.

python -m experiments.dates
"""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import numpy as np
from absl import flags

import transformer_jax as tj
from experiments import cli, translation
from transformer_jax.training.bundle import Bundle

_CONFIG = cli.define_config("dates")
_WORKDIR = flags.DEFINE_string("workdir", "runs/dates", "Where everything goes.")
_TEXT = flags.DEFINE_string("text", "sexta-feira, vinte e três de abril de 1998", "The date of the picture.")


def main() -> None:
    workdir, config = pathlib.Path(_WORKDIR.value), _CONFIG()
    translation.train(config, workdir)
    bundle = tj.load(workdir)
    translation.evaluate(bundle, None, batch_size=250, beam_size=1, length_penalty=0.0, language=None)
    iso = draw_cross_attention(bundle, _TEXT.value, workdir / "attention.png")
    print(f"""{_TEXT.value} -> {iso}
The model is in {workdir}; which words became the year, the month and the day: {workdir / "attention.png"}. Next:
  python -m experiments.translate --workdir={workdir} --text="the twenty-third of April, nineteen ninety-eight"
  python -m experiments.dates --workdir={workdir} --text="domingo, 5 de maio de dois mil e sete\"""")


def draw_cross_attention(bundle: Bundle, text: str, path: pathlib.Path) -> str:
    """Draws, for each token of the translation, where the last decoder layer looks: the mean over its heads.

    Returns:
      The translation.
    """
    from matplotlib.figure import Figure

    tokenizer = bundle.tokenizer
    tokens = tj.beam_search(bundle.model, text, tokenizer=tokenizer, beam_size=1).tokens[0]
    source = [*tokenizer.encode(text), tokenizer.eos_id]
    # The query that predicts a token stands at the token before it.
    trace = tj.trace(bundle.model, jnp.array([source]), jnp.array([[tokenizer.bos_id, *tokens[:-1]]]))
    map_TS = np.asarray(trace.cross.attention(layers=-1)[0].mean(0))
    figure = Figure(figsize=(0.45 * len(source) + 1.5, 0.35 * len(tokens) + 1.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(map_TS, cmap="Blues", vmin=0, aspect="auto")
    axes.set_xticks(range(len(source)), tokenizer.pieces(source), rotation=60, ha="right")
    axes.set_yticks(range(len(tokens)), tokenizer.pieces(tokens))
    axes.set(xlabel="source", ylabel="target", title="cross attention, last layer, mean of heads")
    figure.savefig(path, dpi=120)
    return tokenizer.decode(tokens)


if __name__ == "__main__":
    cli.run(main)
