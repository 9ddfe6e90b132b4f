"""The measurements of ``experiments.alignment_heads``: how right translations are, how well heads fit
the alignment of words, and changes of what heads look at."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import transformer_jax as tj
from experiments.alignment_data import LENGTH, NOUNS, WORDS, Translations
from transformer_jax import inspection
from transformer_jax.inspection.causal import Head
from transformer_jax.inspection.interventions import Edits
from transformer_jax.training.bundle import Bundle

NUM_DRAWS = 10  # of other heads
MODEL = tj.ModelConfig(family="encoder_decoder", vocab_size=len(WORDS), max_len=LENGTH, num_layers=2, num_heads=4,
                       model_dim=64, positions="sinusoidal", tie_embeddings=False, scale_embeddings=True,
                       init_std=None, unroll=2)


def call(function: Any, bundle: Bundle, pairs: Translations, intervene: Any = None) -> Any:
    """Calls ``tj.forward`` or ``tj.trace`` on pairs; the decoder reads the right words so far."""
    batch = pairs.batch
    return function(bundle.model, batch["source"], batch["tokens"], source_segment_ids_BS=batch["source_segment_ids"],
                    target_segment_ids_BT=batch["segment_ids"], intervene=intervene)


def predicted(bundle: Bundle, pairs: Translations, intervene: Any = None) -> Int[np.ndarray, "B T"]:
    """Returns the most probable word at each position."""
    return np.asarray(call(tj.forward, bundle, pairs, intervene).argmax(-1))


def right(bundle: Bundle, pairs: Translations, intervene: Any = None) -> tuple[float, float]:
    """Returns the share of words that are right if those before them are, and the share of
    sentences in which all words are: those that greedy decoding translates without an error."""
    is_word_BT = pairs.aligned >= 0
    is_right_BT = predicted(bundle, pairs, intervene) == pairs.batch["targets"]
    return float(is_right_BT[is_word_BT].mean()), float((is_right_BT | ~is_word_BT).all(1).mean())


def weight_on(maps_LBNTS: np.ndarray, aligned_BT: np.ndarray) -> Float[np.ndarray, "L N"]:
    """Returns the mean weight of each head on the aligned word, over all words that have one."""
    rows, places = np.nonzero(aligned_BT >= 0)
    return maps_LBNTS[:, rows, :, places, aligned_BT[rows, places]].mean(0)


def contrasted(aligned_BT: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the alignment of each sentence, and that of the sentence before it, at the words where
    the two differ; -1 elsewhere."""
    other_BT = np.roll(aligned_BT, 1, axis=0)
    differs_BT = (aligned_BT >= 0) & (other_BT >= 0) & (aligned_BT != other_BT)
    return np.where(differs_BT, aligned_BT, -1), np.where(differs_BT, other_BT, -1)


def other_heads(heads: Sequence[Head]) -> list[list[tuple[str, int, int]]]:
    """Draws ``NUM_DRAWS`` times as many other heads of the model, of any kind of attention, each with
    its kind, its layer and its number."""
    others = [(kind, layer, head) for kind in ("cross", "self", "encoder") for layer in range(MODEL.num_layers)
              for head in range(MODEL.num_heads) if kind != "cross" or (layer, head) not in heads]
    rng = np.random.default_rng(0)
    return [[others[place] for place in rng.choice(len(others), len(heads), replace=False)] for _ in range(NUM_DRAWS)]


def without(bundle: Bundle, heads: Sequence[tuple[str, int, int]], pairs: Translations) -> Edits:
    """Returns the intervention that replaces the outputs of heads, given by kind, layer and number,
    by their means over all words."""
    reference, valid_BT = call(tj.trace, bundle, pairs), pairs.batch["segment_ids"]
    return inspection.together(*(inspection.ablate_head(
        layer, head, "mean", reference=reference, valid_BT=valid_BT, kind=kind) for kind, layer, head in heads))


def exchanged(bundle: Bundle, heads: Sequence[Head], pairs: Translations, order_BS: np.ndarray) -> Edits:
    """Returns the intervention that gives heads of cross-attention, at each place of a source, the
    value of the place that ``order_BS`` names."""
    values_LBSKH = np.asarray(call(tj.trace, bundle, pairs).cross.values)
    moved_LBSKH = np.take_along_axis(values_LBSKH, order_BS[None, :, :, None, None], axis=2)
    return inspection.together(*(inspection.patch("cross_values", layer, moved_LBSKH[layer], heads=head)
                                 for layer, head in heads))


def noun_orders(pairs: Translations) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, str]]]:
    """Finds the sentences whose first two nouns differ and have the same gender.

    Args:
      pairs: Sentences with their translations.

    Returns:
      The places of each source, of which those of the two nouns are exchanged, ``[B, S]``; the same
      for the words before the two nouns; and for each of these sentences the row, the position of
      the first noun in the target, and the translation of the second noun.
    """
    of_nouns, of_others = (np.tile(np.arange(LENGTH), (len(pairs.texts), 1)) for _ in range(2))
    wanted = []
    for row, (source, target) in enumerate(pairs.texts):
        nouns = [place for place, word in enumerate(source) if word in NOUNS][:2]
        first, second = (NOUNS[source[place]].split() for place in nouns)
        if first[0] != second[0] and first[1] == second[1]:
            of_nouns[row, nouns] = nouns[::-1]
            before = [place - 1 for place in nouns]
            of_others[row, before] = before[::-1]
            wanted.append((row, target.index(first[0]), second[0]))
    return of_nouns, of_others, wanted
