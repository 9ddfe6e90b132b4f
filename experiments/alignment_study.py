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


def looking_at(heads: Sequence[Head], places_BT: np.ndarray) -> Edits:
    """Returns the intervention that makes heads look at one source word only: at that of
    ``places_BT`` for each position, and as before where this is -1."""
    is_kept_BTS = (places_BT[:, :, None] == np.arange(LENGTH)) | (places_BT < 0)[:, :, None]
    bias_LBNTS = np.zeros((MODEL.num_layers, len(places_BT), MODEL.num_heads, *is_kept_BTS.shape[1:]), np.float32)
    for layer, head in heads:
        bias_LBNTS[layer, :, head] = np.where(is_kept_BTS, 0.0, -np.inf)
    return inspection.together(*(inspection.patch("cross_attention_bias", layer, bias_BNTS)
                                 for layer, bias_BNTS in enumerate(bias_LBNTS)))


def other_nouns(pairs: Translations) -> tuple[np.ndarray, np.ndarray, list[tuple[int, int, str]]]:
    """Finds the sentences whose first two nouns differ and have the same gender.

    Args:
      pairs: Sentences with their translations.

    Returns:
      The place of the first noun in the source, at the position that predicts its translation, and
      -1 at all others, ``[B, T]``; the place of the second noun, at the same positions; and for each
      of these sentences the row, the position, and the translation of the second noun.
    """
    own_BT, other_BT, wanted = np.full_like(pairs.aligned, -1), np.full_like(pairs.aligned, -1), []
    for row, (source, target) in enumerate(pairs.texts):
        nouns = [place for place, word in enumerate(source) if word in NOUNS]
        first, second = (NOUNS[source[place]].split() for place in nouns[:2])
        if first[0] != second[0] and first[1] == second[1]:
            position = target.index(first[0])
            own_BT[row, position], other_BT[row, position] = nouns[:2]
            wanted.append((row, position, second[0]))
    return own_BT, other_BT, wanted
