"""The road to the Transformer, measured: trains n-grams, RNN, LSTM, GRU and a GPT on one text, with
equal tokens and with equal time, and writes a table, pictures and samples.

python -m experiments.road --data=input.txt --workdir=runs/road
python -m experiments.road --pairs=dates --workdir=runs/road_dates

The same command resumes a road that was stopped. With --pairs, it trains translators: an RNN
without attention, a GRU with attention, and a Transformer.
"""

from __future__ import annotations

import json
import pathlib

from absl import flags

from experiments import road_figures, road_pairs, road_text
from transformer_jax.cli.flags import directory, run
from transformer_jax.runs.workdir import locked

_DATA = flags.DEFINE_string("data", None, "The text, as in --config.data.path of experiments.train.")
_PAIRS = flags.DEFINE_string("pairs", None, "dates (needs no file), or files of pairs: SOURCE,TARGET or a TSV file.")
_LANGUAGE = flags.DEFINE_string("target_language", None, "The language of the targets, such as de, for BLEU.")
_MINUTES = flags.DEFINE_float("minutes", 15.0, "The time for all trainings together, without compiling and measuring.",
                              lower_bound=0.01)
_PROMPT = flags.DEFINE_string("prompt", "\n", "The beginning of the samples.")
_WORKDIR = flags.DEFINE_string("workdir", "runs/road", "The directory for all results.")


def main() -> None:
    """Trains, measures and draws."""
    if (_DATA.value is None) == (_PAIRS.value is None):
        raise ValueError("pass exactly one of --data=FILE and --pairs=dates (or --pairs=SOURCE,TARGET)")
    workdir = directory(_WORKDIR)
    with locked(workdir):
        if _PAIRS.value is not None:
            found = road_pairs.run(_PAIRS.value, workdir, _MINUTES.value, _LANGUAGE.value)
            table = road_figures.pairs_table(found["models"])
            road_figures.draw_pairs(found["models"], workdir)
        else:
            found = road_text.run(_DATA.value, workdir, _MINUTES.value, _PROMPT.value)
            table = road_figures.text_table(found["models"])
            road_figures.draw_text(found["models"], found["gradients"], workdir)
            samples = [f"## {name}\n\n```\n{model['time']['sample']}\n```" for name, model in found["models"].items()]
            (workdir / "samples.md").write_text("\n\n".join(samples) + "\n")
        (workdir / "table.md").write_text(table)
        (workdir / "results.json").write_text(json.dumps(found, indent=1))
    print(table)
    print(f"The table, the pictures and results.json are in {pathlib.Path(workdir)}")


if __name__ == "__main__":
    run(main)
