"""Reward models: the likelihood of rankings, how good the scores are, and normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.models.heads import RewardModel
from transformer_jax.nn.layers import parameter
from transformer_jax.training.step import Batch, Sums


def ranking_loss(scores_BK: jax.Array, ranks_BK: jax.Array) -> jax.Array:
    """Minus the log-likelihood of rankings under the Plackett-Luce model; of pairs, that of Bradley
    and Terry.

    The best response is chosen among all with probability softmax(scores), then the next among the
    rest, and so on. Responses with the same rank are not compared with each other, only with those
    below them.

    Source: Plackett (1975), Luce (1959); Bradley and Terry (1952) for K = 2.

    Args:
      scores_BK: of the K responses to one prompt.
      ranks_BK: 1 is the best, 0 where there is no response.

    Returns:
      float32 ``[B]``, in nats; 0 where nothing is ranked above anything.
    """
    worse_BKK = _is_better(ranks_BK)
    rivals_BKK = worse_BKK | jnp.eye(ranks_BK.shape[1], dtype=bool)
    log_z_BK = jax.nn.logsumexp(jnp.where(rivals_BKK, scores_BK[:, None, :], -jnp.inf), axis=-1)
    return (log_z_BK - scores_BK).sum(-1)


def ranking_sums(scores_BK: jax.Array, ranks_BK: jax.Array) -> Sums:
    """What :func:`make_train_step` wants of a loss: sums over the rankings in which something is
    above something.

    Returns:
      The sum of :func:`ranking_loss`, the number of such rankings, and the sums of ``accuracy``
      (the fraction of the pairs of a ranking that the scores order as it does; a tie of scores is
      half right) and ``margin`` (the mean difference of their scores).
    """
    better_BKK = _is_better(ranks_BK)
    margins_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
    num_pairs_B = better_BKK.sum((1, 2))

    def mean_of_pairs(x_BKK: jax.Array) -> jax.Array:
        return (jnp.where(better_BKK, x_BKK, 0.0).sum((1, 2)) / jnp.maximum(num_pairs_B, 1)).sum()

    return (ranking_loss(scores_BK, ranks_BK).sum(), (num_pairs_B > 0).sum().astype(jnp.float32),
            {"accuracy": mean_of_pairs(0.5 + 0.5 * jnp.sign(margins_BKK)), "margin": mean_of_pairs(margins_BKK)})


def _is_better(ranks_BK: jax.Array) -> jax.Array:
    """``[b, i, j]``: whether response i is ranked above response j."""
    present_BK = ranks_BK > 0
    both_BKK = present_BK[:, :, None] & present_BK[:, None, :]
    return both_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :])


def reward_loss(model: RewardModel, batch: Batch, key: jax.Array | None = None) -> Sums:
    """A loss for :func:`make_train_step`: batches of :class:`Rankings`."""
    B, K, T = batch["tokens"].shape
    scores_M = model(batch["tokens"].reshape(B * K, T), segment_ids_BT=batch["segment_ids"].reshape(B * K, T), key=key)
    return ranking_sums(scores_M.reshape(B, K), batch["ranks"])


def expected_calibration_error(margins: np.ndarray, num_bins: int = 10) -> float:
    """How far the scores' confidence in their choice is from how often the choice is right, in [0,
    1].

    Source: Guo et al. (2017), equation 3, for sigmoid(|margin|), which is from 0.5 to 1.

    Args:
      margins: score of the preferred response minus that of the other, one a pair.
      num_bins: of equal width.
    """
    margins = np.asarray(margins, np.float64)
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    right = 0.5 + 0.5 * np.sign(margins)
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, right - confidence, num_bins)
    return float(np.abs(gaps).sum() / len(margins))


def pair_margins(scores_NK: np.ndarray, ranks_NK: np.ndarray) -> np.ndarray:
    """Score of the better response minus that of the worse, for every pair that the rankings
    order."""
    scores_NK, better_NKK = np.asarray(scores_NK), np.asarray(_is_better(jnp.asarray(ranks_NK)))
    return (scores_NK[:, :, None] - scores_NK[:, None, :])[better_NKK]


_scores = jax.jit(lambda model, tokens_BT, segment_ids_BT: model(tokens_BT, segment_ids_BT=segment_ids_BT))


def score_rows(model: RewardModel, tokens_NT: np.ndarray, segment_ids_NT: np.ndarray,
               batch_size: int = 64) -> np.ndarray:
    """The scores, float32 ``[N]``, of many rows, so many at a time; arguments as in a call of the
    model."""
    num_rows = len(tokens_NT)
    padded = ((0, -num_rows % batch_size), (0, 0))
    tokens_NT, segment_ids_NT = np.pad(tokens_NT, padded), np.pad(segment_ids_NT, padded)
    parts = [_scores(model, tokens_NT[at:at + batch_size], segment_ids_NT[at:at + batch_size])
             for at in range(0, len(tokens_NT), batch_size)]
    return np.concatenate(parts)[:num_rows]


def normalized(model: RewardModel, scores_N: np.ndarray) -> RewardModel:
    """The model with ``mean`` and ``std`` those of its scores on a reference set.

    Raises:
      ValueError: for scores that are all equal, or not finite.
    """
    mean, std = float(np.mean(scores_N, dtype=np.float64)), float(np.std(scores_N, dtype=np.float64))
    if not (np.isfinite(mean) and std > 0):
        raise ValueError(f"{len(scores_N)} scores with mean {mean} and standard deviation {std} cannot be normalised; "
                         "they must be finite and differ")
    model = jax.tree.map(lambda x: x, model)
    model.mean, model.std = parameter(jnp.float32(mean), ()), parameter(jnp.float32(std), ())
    return model
