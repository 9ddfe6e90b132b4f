"""Skip-gram and CBOW with negative sampling, in the form of matrix products (Mikolov et al., 2013).

A microbatch has B blocks of L words that follow each other. Inside a block, the scores of all pairs
of words are one matrix product, of which a mask keeps the pairs that are near each other. All words
of a block share their random words, so that their scores are a matrix product too; the weights of
the random words keep their expected gradient the same as with ``negatives`` words for each pair.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer_jax.config.word_vectors import WordVectorConfig

BLOCK = 64  # L. Pairs across the border of two blocks are lost: 4 % of them with a window of 5
BLOCKS = 4  # blocks of a microbatch; with more, frequent words would sum too many steps of the same weights
SHARED_NEGATIVES = 64  # M, the random words of a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pairs:
    """The words that a microbatch compares, with their weights.

    Attributes:
      inputs_BL: the words of each block; their input vectors are trained.
      outputs_BO: the words of each block, then its M random words; their output vectors are
        trained. O = L + M.
      mixing_BLL: the weights with which input vectors are mixed before they are compared; ``None``
        compares each input vector by itself.
      true_BLL: the weight of each pair of a (mixed) input and a true output.
      random_BL: the weight of each pair of a (mixed) input and a random output.
    """

    inputs_BL: Int[Array, "B L"]
    outputs_BO: Int[Array, "B O"]
    mixing_BLL: Float[Array, "B L L"] | None
    true_BLL: Float[Array, "B L L"]
    random_BL: Float[Array, "B L"]

    @property
    def is_mixed_BLL(self) -> Float[Array, "B L L"]:
        """1 for each input vector that is a part of a mean, 0 for the others."""
        assert self.mixing_BLL is not None
        return (self.mixing_BLL > 0).astype(jnp.float32)

    @property
    def weights_BLO(self) -> Float[Array, "B L O"]:
        """The weights of all pairs."""
        num_random = self.outputs_BO.shape[1] - self.inputs_BL.shape[1]
        return jnp.concatenate([self.true_BLL, jnp.repeat(self.random_BL[:, :, None], num_random, 2)], 2)


def draw_pairs(words_BL: Int[Array, "B L"], segments_BL: Int[Array, "B L"], cumulative_V: Float[Array, " V"],
               config: WordVectorConfig, key: jax.Array) -> Pairs:
    """Draws the windows and the random words of a microbatch.

    Args:
      words_BL: Token ids.
      segments_BL: Words are near each other only if their segments are equal; 0 is padding.
      cumulative_V: The sums of the probabilities with which random words are drawn.
      config: The settings of the word vectors.
      key: PRNG key.

    Returns:
      The pairs.
    """
    num_blocks, length = words_BL.shape
    window_key, random_key = jax.random.split(key)
    windows_BL = jax.random.randint(window_key, words_BL.shape, 1, config.window + 1)
    uniforms = jax.random.uniform(random_key, (num_blocks, SHARED_NEGATIVES)) * cumulative_V[-1]
    random_BM = jnp.searchsorted(cumulative_V, uniforms, side="right").astype(words_BL.dtype)
    random_BM = jnp.minimum(random_BM, len(cumulative_V) - 1)
    distance_LL = jnp.abs(jnp.arange(length)[:, None] - jnp.arange(length))
    # near_BLL[:, i, j]: word j is in the window of word i.
    near_BLL = (distance_LL > 0) & (distance_LL <= windows_BL[:, :, None]) & (
        segments_BL[:, :, None] == segments_BL[:, None, :]) & (segments_BL[:, :, None] > 0)
    near_BLL = near_BLL.astype(jnp.float32)
    outputs_BO = jnp.concatenate([words_BL, random_BM], 1)
    share = config.negatives / SHARED_NEGATIVES
    if config.method == "skip_gram":  # every word of the window of i predicts word i
        true_BLL = near_BLL.swapaxes(1, 2)
        return Pairs(words_BL, outputs_BO, None, true_BLL, true_BLL.sum(2) * share)
    counts_BL = near_BLL.sum(2)
    has_window_BL = (counts_BL > 0).astype(jnp.float32)
    mixing_BLL = near_BLL / jnp.maximum(counts_BL, 1.0)[:, :, None]
    return Pairs(words_BL, outputs_BO, mixing_BLL, jnp.eye(length) * has_window_BL[:, :, None], has_window_BL * share)


def pair_loss(pairs: Pairs, input_BLD: Float[Array, "B L D"],
              output_BOD: Float[Array, "B O D"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the loss of negative sampling: -log sigmoid(score) for true pairs and
    -log sigmoid(-score) for random ones.

    Args:
      pairs: The pairs.
      input_BLD: The input vectors of ``inputs_BL``.
      output_BOD: The output vectors of ``outputs_BO``.

    Returns:
      The sum of losses in nats, and the number of true pairs.
    """
    scores_BLO = _scores(pairs, input_BLD, output_BOD)
    length = input_BLD.shape[1]
    losses_BLO = jax.nn.softplus(jnp.where(jnp.arange(scores_BLO.shape[2]) < length, -scores_BLO, scores_BLO))
    return (pairs.weights_BLO * losses_BLO).sum(), pairs.true_BLL.sum()


def pair_gradients(pairs: Pairs, input_BLD: Float[Array, "B L D"], output_BOD: Float[Array, "B O D"]) -> tuple[
        Float[Array, "B L D"], Float[Array, "B O D"]]:
    """Computes the gradient of the sum of losses of ``pair_loss``.

    If input vectors are mixed, each of them takes the whole gradient of the mean, not its share of
    it, as in word2vec and gensim. The input vectors of CBOW would otherwise learn several times too
    slowly at the usual learning rates.

    Args:
      pairs: The pairs.
      input_BLD: The input vectors of ``inputs_BL``.
      output_BOD: The output vectors of ``outputs_BO``.

    Returns:
      The gradients with respect to both kinds of vectors.
    """
    mixed_BLD = _mixed(pairs, input_BLD)
    is_true_O = jnp.arange(output_BOD.shape[1]) < input_BLD.shape[1]
    scores_BLO = _scores(pairs, input_BLD, output_BOD)
    slopes_BLO = pairs.weights_BLO * (jax.nn.sigmoid(scores_BLO) - is_true_O)
    mixed_gradient_BLD = jnp.einsum("blo,bod->bld", slopes_BLO, output_BOD)
    output_gradient_BOD = jnp.einsum("blo,bld->bod", slopes_BLO, mixed_BLD)
    if pairs.mixing_BLL is None:
        return mixed_gradient_BLD, output_gradient_BOD
    return jnp.einsum("bij,bid->bjd", pairs.is_mixed_BLL, mixed_gradient_BLD), output_gradient_BOD


def pair_weights(pairs: Pairs) -> tuple[Float[Array, "B L"], Float[Array, "B O"]]:
    """Counts the pairs of each vector.

    Args:
      pairs: The pairs.

    Returns:
      The sum of the weights of the pairs of each input vector, and of each output vector.
    """
    weights_BLO = pairs.weights_BLO
    inputs_BL = weights_BLO.sum(2)
    if pairs.mixing_BLL is not None:
        inputs_BL = jnp.einsum("bij,bi->bj", pairs.is_mixed_BLL, inputs_BL)
    return inputs_BL, weights_BLO.sum(1)


def _mixed(pairs: Pairs, input_BLD: jax.Array) -> jax.Array:
    """Returns the vectors that are compared with the output vectors."""
    return input_BLD if pairs.mixing_BLL is None else jnp.einsum("bij,bjd->bid", pairs.mixing_BLL, input_BLD)


def _scores(pairs: Pairs, input_BLD: jax.Array, output_BOD: jax.Array) -> jax.Array:
    """Returns the scores of all pairs, ``[B, L, O]``."""
    return cast(jax.Array, jnp.einsum("bld,bod->blo", _mixed(pairs, input_BLD), output_BOD))
