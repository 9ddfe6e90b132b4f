"""Skip-gram and CBOW with negative sampling, in the form of matrix products (Mikolov et al., 2013).

A microbatch has B blocks of L words that follow each other. All words of a block share their random
words, so that the scores with them are one matrix product; the weights of the random words keep
their expected gradient the same as with ``negatives`` words for each pair. In skip-gram, the scores
of all pairs of words of a block are a matrix product too, of which a mask keeps the pairs that are
near each other. In CBOW, each word is compared with the mean of its window.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from transformer_jax.config.word_vectors import WordVectorConfig

BLOCK = 64  # L. Pairs across the border of two blocks are lost: 4 % of them with a window of 5
BLOCKS = 4  # blocks of a microbatch; with more, frequent words would sum too many steps of the same weights
SHARED_NEGATIVES = 64  # M, the random words of a block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SkipGramPairs:
    """The pairs of words that a microbatch of skip-gram compares.

    Attributes:
      inputs_BL: the words of each block; their input vectors are trained.
      outputs_BO: the words of each block, then its M random words; their output vectors are
        trained. O = L + M.
      true_BLL: 1 for each pair of an input and a true output, else 0.
      share: the weight of a random word for each true pair of an input.
    """

    inputs_BL: Int[Array, "B L"]
    outputs_BO: Int[Array, "B O"]
    true_BLL: Float[Array, "B L L"]
    share: float = dataclasses.field(metadata={"static": True})

    @property
    def _weights_BLO(self) -> Float[Array, "B L O"]:
        num_random = self.outputs_BO.shape[1] - self.inputs_BL.shape[1]
        random_BL1 = self.true_BLL.sum(2, keepdims=True) * self.share
        return jnp.concatenate([self.true_BLL, jnp.repeat(random_BL1, num_random, 2)], 2)

    def loss(self, input_BLD: Float[Array, "B L D"],
             output_BOD: Float[Array, "B O D"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Computes the loss of negative sampling: -log sigmoid(score) for true pairs and
        -log sigmoid(-score) for random ones.

        Args:
          input_BLD: The input vectors of ``inputs_BL``.
          output_BOD: The output vectors of ``outputs_BO``.

        Returns:
          The sum of losses in nats, and the number of true pairs.
        """
        scores_BLO = jnp.einsum("bld,bod->blo", input_BLD, output_BOD)
        is_true_O = jnp.arange(scores_BLO.shape[2]) < input_BLD.shape[1]
        losses_BLO = jax.nn.softplus(jnp.where(is_true_O, -scores_BLO, scores_BLO))
        return (self._weights_BLO * losses_BLO).sum(), self.true_BLL.sum()

    def gradients(self, input_BLD: Float[Array, "B L D"], output_BOD: Float[Array, "B O D"]) -> tuple[
            Float[Array, "B L D"], Float[Array, "B O D"]]:
        """Computes the gradients of the sum of losses.

        Args:
          input_BLD: The input vectors of ``inputs_BL``.
          output_BOD: The output vectors of ``outputs_BO``.

        Returns:
          The gradients with respect to both kinds of vectors.
        """
        is_true_O = jnp.arange(output_BOD.shape[1]) < input_BLD.shape[1]
        scores_BLO = jnp.einsum("bld,bod->blo", input_BLD, output_BOD)
        slopes_BLO = self._weights_BLO * (jax.nn.sigmoid(scores_BLO) - is_true_O)
        return (jnp.einsum("blo,bod->bld", slopes_BLO, output_BOD), jnp.einsum("blo,bld->bod", slopes_BLO, input_BLD))

    def weights(self) -> tuple[Float[Array, "B L"], Float[Array, "B O"]]:
        """Returns the sum of the weights of the pairs of each input vector, and of each output
        vector."""
        return self._weights_BLO.sum(2), self._weights_BLO.sum(1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CbowPairs:
    """The words that a microbatch of CBOW compares with the means of their windows.

    Attributes:
      inputs_BL: the words of each block; their input vectors are trained.
      outputs_BO: the words of each block, then its M random words; their output vectors are
        trained. O = L + M.
      near_BLL: 1 where the second word is in the window of the first one, else 0.
      share: the weight of a random word for each mean.
    """

    inputs_BL: Int[Array, "B L"]
    outputs_BO: Int[Array, "B O"]
    near_BLL: Float[Array, "B L L"]
    share: float = dataclasses.field(metadata={"static": True})

    @property
    def _has_window_BL(self) -> Float[Array, "B L"]:
        return (self.near_BLL.sum(2) > 0).astype(jnp.float32)

    def _means(self, input_BLD: jax.Array) -> jax.Array:
        """Returns the mean input vector of each window; zeros for an empty one."""
        # A product with a matrix that is mostly zero is faster on CPUs than adding shifted arrays.
        counts_BL1 = jnp.maximum(self.near_BLL.sum(2, keepdims=True), 1.0)
        return jnp.einsum("bij,bjd->bid", self.near_BLL / counts_BL1, input_BLD)

    def loss(self, input_BLD: Float[Array, "B L D"],
             output_BOD: Float[Array, "B O D"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Computes the loss as ``SkipGramPairs.loss`` does; a pair is a mean and its word."""
        true_BL, random_BLM = self._scores(self._means(input_BLD), output_BOD)
        losses_BL = jax.nn.softplus(-true_BL) + self.share * jax.nn.softplus(random_BLM).sum(2)
        return (self._has_window_BL * losses_BL).sum(), self._has_window_BL.sum()

    def gradients(self, input_BLD: Float[Array, "B L D"], output_BOD: Float[Array, "B O D"]) -> tuple[
            Float[Array, "B L D"], Float[Array, "B O D"]]:
        """Computes the gradients as ``SkipGramPairs.gradients`` does.

        Each input vector takes the whole gradient of the mean, not its share of it, as in word2vec
        and gensim: at the usual learning rates it would otherwise learn several times too slowly.
        """
        means_BLD, length = self._means(input_BLD), input_BLD.shape[1]
        true_BL, random_BLM = self._scores(means_BLD, output_BOD)
        true_BL1 = (self._has_window_BL * (jax.nn.sigmoid(true_BL) - 1))[..., None]
        random_BLM = self._has_window_BL[..., None] * self.share * jax.nn.sigmoid(random_BLM)
        of_means_BLD = true_BL1 * output_BOD[:, :length] + jnp.einsum("blm,bmd->bld", random_BLM,
                                                                     output_BOD[:, length:])
        of_outputs_BOD = jnp.concatenate([true_BL1 * means_BLD, jnp.einsum("blm,bld->bmd", random_BLM, means_BLD)], 1)
        return jnp.einsum("bij,bid->bjd", self.near_BLL, of_means_BLD), of_outputs_BOD

    def weights(self) -> tuple[Float[Array, "B L"], Float[Array, "B O"]]:
        """Returns the sum of the weights of the pairs of each input vector, and of each output
        vector."""
        has_BL, num_random = self._has_window_BL, self.outputs_BO.shape[1] - self.inputs_BL.shape[1]
        of_means_BL = has_BL * (1 + num_random * self.share)
        random_BM = jnp.repeat(has_BL.sum(1, keepdims=True) * self.share, num_random, 1)
        return jnp.einsum("bij,bi->bj", self.near_BLL, of_means_BL), jnp.concatenate([has_BL, random_BM], 1)

    def _scores(self, means_BLD: jax.Array, output_BOD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the scores of the true words ``[B, L]`` and of the random words ``[B, L, M]``."""
        length = means_BLD.shape[1]
        return ((means_BLD * output_BOD[:, :length]).sum(2),
                jnp.einsum("bld,bmd->blm", means_BLD, output_BOD[:, length:]))


Pairs = SkipGramPairs | CbowPairs


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
    window_key, random_key = jax.random.split(key)
    windows_BL = jax.random.randint(window_key, words_BL.shape, 1, config.window + 1)
    uniforms = jax.random.uniform(random_key, (len(words_BL), SHARED_NEGATIVES)) * cumulative_V[-1]
    random_BM = jnp.searchsorted(cumulative_V, uniforms, side="right").astype(words_BL.dtype)
    outputs_BO = jnp.concatenate([words_BL, jnp.minimum(random_BM, len(cumulative_V) - 1)], 1)
    share = config.negatives / SHARED_NEGATIVES
    places_L = jnp.arange(words_BL.shape[1])
    distance_LL = jnp.abs(places_L[:, None] - places_L)
    # near_BLL[:, i, j]: word j is in the window of word i.
    near_BLL = ((distance_LL > 0) & (distance_LL <= windows_BL[:, :, None]) & (
        segments_BL[:, :, None] == segments_BL[:, None, :]) & (segments_BL[:, :, None] > 0)).astype(jnp.float32)
    if config.method == "skip_gram":  # every word of the window of i predicts word i
        return SkipGramPairs(words_BL, outputs_BO, near_BLL.swapaxes(1, 2), share)
    return CbowPairs(words_BL, outputs_BO, near_BLL, share)
