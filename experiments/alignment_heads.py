"""Trains a small translator on generated English sentences, and finds the heads of cross-attention
that align each Portuguese word with the English word that it translates.

python -m experiments.alignment_heads

What would refute that these heads tell the model which word comes next: their attention fits the
alignment of another sentence as well; the translations stay right without them; they suffer as much
without as many other heads, of any attention; or a word does not become that of another place when
the heads read the values of that place. The heads are found on some sentences, and the program
measures all of this on others.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
from absl import flags

import transformer_jax as tj
from experiments import alignment_study as study
from experiments.alignment_data import IDS, Translations, draw_translations
from experiments.study_training import config_for, train, verdict
from transformer_jax.cli.flags import directory, run
from transformer_jax.inspection import plots
from transformer_jax.inspection.causal import Head
from transformer_jax.training.bundle import Bundle

_WORKDIR = flags.DEFINE_string("workdir", "runs/alignment_heads", "The directory for all results.")
_STEPS = flags.DEFINE_integer("steps", 400, "The number of training steps.", lower_bound=20)
_SEED = flags.DEFINE_integer("seed", 0, "The seed of the weights and of the sentences.", lower_bound=0)

ALIGNING = 0.4  # the mean weight on the aligned word from which a head counts as an alignment head


def main() -> None:
    """Trains the translator, finds its alignment heads, and tries to refute that it needs them."""
    workdir = directory(_WORKDIR)
    config = config_for(study.MODEL, steps=_STEPS.value, seed=_SEED.value)
    bundle = train(config, draw_translations, workdir / "run")
    searched, held_out = (Translations(np.random.default_rng((555, seed)), 128) for seed in range(2))
    words, sentences = study.right(bundle, held_out)
    print(f"new sentences: {words:.1%} of the words are right, and {sentences:.1%} of the sentences as a whole")
    scores_LN = study.weight_on(np.asarray(study.call(tj.trace, bundle, searched).cross.attention()), searched.aligned)
    best = np.unravel_index(scores_LN.argmax(), scores_LN.shape)
    heads = [(int(layer), int(head)) for layer, head in np.argwhere(scores_LN >= min(ALIGNING, scores_LN[best]))]
    plots.save(plots.layer_head_summary(scores_LN, "mean weight on the word to translate"), workdir / "heads.png")
    align(bundle, held_out, heads, workdir / "alignment.png")
    ablate(bundle, held_out, heads)
    exchange(bundle, held_out, heads)


def align(bundle: Bundle, pairs: Translations, heads: Sequence[Head], path: pathlib.Path) -> None:
    """Prints and draws how well the heads' attention fits the alignment of words."""
    maps_LBNTS = np.asarray(study.call(tj.trace, bundle, pairs).cross.attention())
    mean_BTS = np.mean([maps_LBNTS[layer, :, head] for layer, head in heads], axis=0)
    longest = max(range(len(pairs.texts)), key=lambda row: len(pairs.texts[row][0]))
    source, target = pairs.texts[longest]
    plots.save(plots.alignment(mean_BTS[longest, :len(target), :len(source)], source, target,
                               title=f"cross-attention, mean of the heads {_names(heads)}"), path)
    own, other = (np.mean([study.weight_on(maps_LBNTS, aligned_BT)[head] for head in heads])
                  for aligned_BT in study.contrasted(pairs.aligned))
    is_found = (mean_BTS.argmax(-1) == pairs.aligned)[pairs.aligned >= 0]
    print(f"the heads {_names(heads)} look most at the right word in {is_found.mean():.1%} of the cases ({path}); "
          f"where another sentence aligns other places, their weight is {own:.2f} on the right word and {other:.2f} "
          f"on the one that the other sentence has there: {verdict(own > 2 * other)}")


def ablate(bundle: Bundle, pairs: Translations, heads: Sequence[Head]) -> None:
    """Prints how many words are right without the heads, and without other ones."""
    whole = study.right(bundle, pairs)[0]
    words, sentences = study.right(bundle, pairs, study.without(bundle, [("cross", *head) for head in heads], pairs))
    draws = np.array([study.right(bundle, pairs, study.without(bundle, others, pairs))[0]
                      for others in study.other_heads(heads)])
    print(f"without the {len(heads)} heads {words:.1%} of the words and {sentences:.1%} of the sentences are right; "
          f"without as many other heads, of any attention, {draws.mean():.1%} of the words (lowest of {len(draws)} "
          f"draws {draws.min():.1%}): {verdict(words < whole - 0.2 and draws.min() > words + 0.2)}")


def exchange(bundle: Bundle, pairs: Translations, heads: Sequence[Head]) -> None:
    """Prints how often the first noun becomes the second one, of the same gender, if the heads read
    the value of the other noun at the place of each, and if they do so with the words before."""
    of_nouns, of_others, wanted = study.noun_orders(pairs)
    nouns, others = (np.mean([found_BT[row, position] == IDS[word] for row, position, word in wanted]) for found_BT
                     in (study.predicted(bundle, pairs, study.exchanged(bundle, heads, pairs, order_BS))
                         for order_BS in (of_nouns, of_others)))
    print(f"if the heads read the values of the two nouns in exchange, {nouns:.1%} of {len(wanted)} first nouns become "
          f"the second one; if they exchange the words before the nouns, {others:.1%}: "
          f"{verdict(nouns > 0.5 and others < 0.1)}")


def _names(heads: Sequence[Head]) -> str:
    """Writes heads as layer.head."""
    return " ".join(f"{layer}.{head}" for layer, head in heads)


if __name__ == "__main__":
    run(main)
