"""Masking of tokens for masked language modelling."""

import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.data.lines import LineRows
from transformer_jax.data.packing import needed_ids
from transformer_jax.data.sentencepiece_training import ISOLATED_PIECES
from transformer_jax.data.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True, eq=False)
class Masking:
    """Selects tokens to predict: 80 % become ``<mask>``, 10 % a random ordinary token, and 10 %
    stay.

    Of the n ordinary tokens in a row, max(1, round(probability * n)) are selected. Special tokens
    are never selected. The selection is made word by word, in random order. Without whole-word
    masking each token counts as a word. With it, a word is a sequence of tokens up to the next
    token that starts a word, and all of its tokens get the same treatment. A word that has more
    tokens than may still be selected is skipped, so that whole-word masking may select slightly
    fewer tokens. If every word of a row is too large, the first tokens of the smallest one are
    selected.

    Attributes:
      probability: The fraction of tokens to select, in (0, 1).
      mask_id: The id of ``<mask>``.
      is_ordinary_V: For each token id, whether it is not special, bool [V].
      opens_word_V: For each token id, whether it always starts a word, bool [V].
      closes_word_V: For each token id, whether it always ends a word, bool [V].

    Raises:
      ValueError: If the probability is not between 0 and 1.

    Source: Devlin et al. 2019, "BERT", section 3.1. A new mask for each epoch: Liu et al. 2019,
    "RoBERTa", section 4.1.
    """

    probability: float
    mask_id: int
    is_ordinary_V: np.ndarray
    opens_word_V: np.ndarray
    closes_word_V: np.ndarray

    def __post_init__(self):
        if not 0 < self.probability < 1:
            raise ValueError(f"masking probability={self.probability} must lie between 0 and 1")

    @classmethod
    def of(cls, tokenizer: Tokenizer, probability: float = 0.15, whole_words: bool = False) -> "Masking":
        """Creates the masking for a tokenizer.

        Args:
          tokenizer: Defines which tokens are special.
          probability: The fraction of tokens to select, in (0, 1).
          whole_words: Whether to select whole words. A word starts at a token that begins with a
            space, and after a special token. Line breaks, tabs and the other isolated characters
            are words of their own.

        Returns:
          The masking.

        Raises:
          ValueError: If the tokenizer has no mask token, or if the probability is not between 0 and
            1.
        """
        (mask_id,) = needed_ids(tokenizer, "masked language modelling", mask_id="<mask> or [MASK]")
        is_ordinary_V = np.ones(tokenizer.vocab_size, bool)
        is_ordinary_V[tokenizer.special_ids] = False
        texts = [tokenizer.decode_bytes([token]).decode("utf-8", "replace") for token in range(tokenizer.vocab_size)]
        isolated = set("\0" + ISOLATED_PIECES)
        opens_word_V = np.array([not whole_words or text[:1] in {" ", *isolated} for text in texts])
        closes_word_V = np.array([text in isolated for text in texts])
        return cls(probability, mask_id, is_ordinary_V, opens_word_V, closes_word_V)

    def __call__(self, batch: Mapping[str, np.ndarray], rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Masks the tokens and collects the tokens to predict.

        Each row has P = ceil(probability * T) places for tokens to predict.

        Args:
          batch: ``tokens`` int32 [B, T], and any other entries, which are returned unchanged.
          rng: The source of all random choices.

        Returns:
          The entries of ``batch`` with masked ``tokens``, and three more: ``masked_positions``
          int32 [B, P], in ascending order; ``masked_targets`` int32 [B, P], the original tokens;
          ``masked_weights`` float32 [B, P], 1 for a token to predict and 0 for unused places at the
          end. The position and the target of an unused place are 0.
        """
        tokens_BT = batch["tokens"]
        words_BT = self._words(tokens_BT)
        chosen_BT = self._choose(words_BT, rng)
        fate_BT = np.take_along_axis(rng.random((len(tokens_BT), tokens_BT.shape[1] + 1)), words_BT, axis=1)
        random_BT = rng.choice(np.flatnonzero(self.is_ordinary_V), tokens_BT.shape)
        corrupted_BT = np.where(fate_BT < 0.8, self.mask_id, np.where(fate_BT < 0.9, random_BT, tokens_BT))

        num_masked = math.ceil(self.probability * tokens_BT.shape[1])
        positions_BP = np.argsort(~chosen_BT, axis=1, kind="stable")[:, :num_masked]
        weights_BP = np.take_along_axis(chosen_BT, positions_BP, axis=1)
        return dict(batch) | {
            "tokens": np.where(chosen_BT, corrupted_BT, tokens_BT).astype(np.int32),
            "masked_positions": (positions_BP * weights_BP).astype(np.int32),
            "masked_targets": (np.take_along_axis(tokens_BT, positions_BP, axis=1) * weights_BP).astype(np.int32),
            "masked_weights": weights_BP.astype(np.float32),
        }

    def _words(self, tokens_BT: np.ndarray) -> np.ndarray:
        """Numbers the words of every row from 1; special tokens get 0."""
        ordinary_BT = self.is_ordinary_V[tokens_BT]
        starts_BT = self.opens_word_V[tokens_BT]
        starts_BT[:, :1] = True
        starts_BT[:, 1:] |= ~ordinary_BT[:, :-1] | self.closes_word_V[tokens_BT[:, :-1]]
        return np.cumsum(starts_BT & ordinary_BT, axis=1) * ordinary_BT

    def _choose(self, words_BT: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns which tokens are selected, bool [B, T]."""
        num_rows, num_slots = len(words_BT), words_BT.shape[1] + 1
        slots_BT = words_BT + num_slots * np.arange(num_rows)[:, None]
        sizes_BW = np.bincount(slots_BT.ravel(), minlength=num_rows * num_slots).reshape(num_rows, num_slots)
        sizes_BW[:, 0] = 0
        num_tokens_B = sizes_BW.sum(1)
        budget_B = np.where(num_tokens_B, np.maximum(1, np.rint(self.probability * num_tokens_B).astype(int)), 0)

        order_BW = np.argsort(np.where(sizes_BW, rng.random(sizes_BW.shape), 2), axis=1)  # slots without a word go last
        sizes_BW = np.take_along_axis(sizes_BW, order_BW, axis=1)
        drawn_BW = np.zeros(sizes_BW.shape, bool)
        left_B = budget_B.copy()
        for turn in range(words_BT.max(initial=0)):
            if not left_B.any():
                break
            drawn_BW[:, turn] = (sizes_BW[:, turn] > 0) & (sizes_BW[:, turn] <= left_B)
            left_B -= sizes_BW[:, turn] * drawn_BW[:, turn]
        stuck = np.flatnonzero((left_B == budget_B) & (budget_B > 0))
        drawn_BW[stuck, np.where(sizes_BW, sizes_BW, num_slots)[stuck].argmin(1)] = True

        is_chosen_BW = np.zeros(sizes_BW.shape, bool)
        np.put_along_axis(is_chosen_BW, order_BW, drawn_BW, axis=1)
        chosen_BT = np.take_along_axis(is_chosen_BW, words_BT, axis=1)
        return chosen_BT & (np.cumsum(chosen_BT, axis=1) <= budget_B[:, None])


def masked_evaluation_batches(
    rows: LineRows, masking: Masking, batch_size: int, seed: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields every row once, in order. The mask of a row depends only on the seed and on the number
    of the row.

    Args:
      rows: The rows to evaluate on.
      masking: Masks the rows.
      batch_size: Rows of every batch. The last batch is filled with zeros, also in
        ``masked_weights``.
      seed: The same seed gives the same masks, with any batch size.

    Returns:
      An iterator over batches, as ``Masking`` returns them.

    Raises:
      ValueError: If ``batch_size`` is not positive.
    """
    def read(numbers: range) -> dict[str, np.ndarray]:
        examples = [masking(rows[[number]], np.random.default_rng((seed, number))) for number in numbers]
        return {name: np.concatenate([example[name] for example in examples]) for name in examples[0]}

    return fixed_batches(len(rows), batch_size, read)
