"""Training and evaluation of reward models: losses, calibration, and normalisation of scores."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.data.evaluation import fixed_batches
from transformer_jax.models.heads import RewardModel
from transformer_jax.nn.layers import parameter
from transformer_jax.training.router_losses import with_router_losses
from transformer_jax.training.step import Batch, Sums


def ranking_loss(scores_BK: Float[Array, "B K"], ranks_BK: Int[Array, "B K"]) -> Float[Array, " B"]:
    """Computes the negative log-likelihood of rankings under the Plackett-Luce model.

    In this model, the best response is chosen among all responses with the probabilities
    softmax(scores), then the next best among the rest, and so on. For two responses it is the
    Bradley-Terry model. Responses with the same rank are compared only with the responses below
    them, not with each other.

    Source: Plackett (1975), Luce (1959); Bradley and Terry (1952) for K = 2.

    Args:
      scores_BK: the scores of the K responses to each prompt.
      ranks_BK: 1 for the best response; 0 if there is no response.

    Returns:
      The loss of each prompt, float32 ``[B]``, in nats; 0 if no response is ranked above another.
    """
    better_BKK = _is_better(ranks_BK)
    rivals_BKK = better_BKK | jnp.eye(ranks_BK.shape[1], dtype=bool)
    log_z_BK = jax.nn.logsumexp(jnp.where(rivals_BKK, scores_BK[:, None, :], -jnp.inf), axis=-1)
    return (log_z_BK - scores_BK).sum(-1)


def ranking_sums(scores_BK: Float[Array, "B K"], ranks_BK: Int[Array, "B K"]) -> Sums:
    """Computes the sums of the ranking loss and its metrics, as ``make_train_step`` expects them.

    The sums run over the rankings in which at least one response is ranked above another.

    Args:
      scores_BK: the scores of the K responses to each prompt.
      ranks_BK: 1 for the best response; 0 if there is no response.

    Returns:
      The sum of ``ranking_loss``, the number of these rankings, and the sums of two metrics:
      ``accuracy`` is the fraction of the ordered pairs in a ranking that the scores order in the
      same way (equal scores count as half), and ``margin`` is the mean difference of the scores of
      these pairs.
    """
    better_BKK = _is_better(ranks_BK)
    margins_BKK = scores_BK[:, :, None] - scores_BK[:, None, :]
    num_pairs_B = better_BKK.sum((1, 2))

    def mean_of_pairs(x_BKK: jax.Array) -> jax.Array:
        return (jnp.where(better_BKK, x_BKK, 0.0).sum((1, 2)) / jnp.maximum(num_pairs_B, 1)).sum()

    return (ranking_loss(scores_BK, ranks_BK).sum(), (num_pairs_B > 0).sum().astype(jnp.float32),
            {"accuracy": mean_of_pairs(0.5 + 0.5 * jnp.sign(margins_BKK)), "margin": mean_of_pairs(margins_BKK)})


def _is_better(ranks_BK: jax.Array) -> jax.Array:
    """Returns a boolean array ``[B, K, K]`` that is True at [b, i, j] if i is ranked above j."""
    present_BK = ranks_BK > 0
    both_BKK = present_BK[:, :, None] & present_BK[:, None, :]
    return both_BKK & (ranks_BK[:, :, None] < ranks_BK[:, None, :])


def reward_loss(model: RewardModel, batch: Batch, key: jax.Array | None = None) -> Sums:
    """Computes the ranking loss of a reward model; it is a loss function for ``make_train_step``.

    Args:
      model: the reward model.
      batch: a batch of ``Rankings``: ``tokens`` and ``segment_ids`` ``[B, K, T]``, and ``ranks``
        ``[B, K]``.
      key: a PRNG key that switches dropout on; ``None`` runs the model without dropout.

    Returns:
      The sum of the losses in nats, the number of rankings that count, and the sums of the metrics
      ``accuracy`` and ``margin``. In training, which a key shows, the losses of the router of a
      mixture of experts are added.
    """
    B, K, T = batch["tokens"].shape
    segment_ids_MT = batch["segment_ids"].reshape(B * K, T)
    scores_M, trace = model.scores_and_trace(batch["tokens"].reshape(B * K, T), segment_ids_BT=segment_ids_MT, key=key)
    sums = ranking_sums(scores_M.reshape(B, K), batch["ranks"])
    return with_router_losses(sums, model.config, trace, segment_ids_MT, key)


def expected_calibration_error(margins: Sequence[float] | Float[np.ndarray, " pairs"],
                               num_bins: int = 10) -> float:
    """Computes how far the confidence of a reward model is from its accuracy.

    The confidence in a choice between two responses is sigmoid(|margin|), between 0.5 and 1.

    Source: Guo et al. (2017), equation 3.

    Args:
      margins: the score of the preferred response minus that of the other one, for each pair.
      num_bins: number of bins of equal width that the confidences are sorted into.

    Returns:
      The expected calibration error, in [0, 1].

    Raises:
      ValueError: if there is no margin.
    """
    margins = np.asarray(margins, np.float64)
    if margins.ndim != 1 or not margins.size:
        raise ValueError(f"got margins of the shape {margins.shape}; expected a list of at least one number, one per "
                         "pair")
    confidence = 1.0 / (1.0 + np.exp(-np.abs(margins)))
    right = 0.5 + 0.5 * np.sign(margins)
    bins = np.minimum(((confidence - 0.5) * 2 * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, right - confidence, num_bins)
    return float(np.abs(gaps).sum() / len(margins))


def pair_margins(scores_NK: Float[np.ndarray, "N K"],
                 ranks_NK: Int[np.ndarray, "N K"]) -> Float[np.ndarray, " pairs"]:
    """Returns the score of the better response minus that of the worse one, for every ordered pair.

    Args:
      scores_NK: the scores of the K responses to each of N prompts.
      ranks_NK: 1 for the best response; 0 if there is no response.

    Returns:
      The margins of all pairs of all prompts, in one dimension.
    """
    scores_NK, better_NKK = np.asarray(scores_NK), np.asarray(_is_better(jnp.asarray(ranks_NK)))
    return (scores_NK[:, :, None] - scores_NK[:, None, :])[better_NKK]


_scores = jax.jit(lambda model, tokens_BT, segment_ids_BT: model(tokens_BT, segment_ids_BT=segment_ids_BT))


def score_rows(model: RewardModel, tokens_NT: Int[np.ndarray, "N T"], segment_ids_NT: Int[np.ndarray, "N T"],
               batch_size: int = 64) -> Float[np.ndarray, " N"]:
    """Scores many rows with a reward model.

    Args:
      model: the reward model.
      tokens_NT: the token ids of each row.
      segment_ids_NT: 1 for tokens, 0 for padding.
      batch_size: number of rows that are scored at a time.

    Returns:
      The scores, float32 ``[N]``.
    """
    batches = fixed_batches(len(tokens_NT), batch_size, lambda rows: {
        "tokens": tokens_NT[rows.start:rows.stop], "segment_ids": segment_ids_NT[rows.start:rows.stop]})
    parts = [_scores(model, batch["tokens"], batch["segment_ids"]) for batch in batches]
    return np.concatenate(parts)[:len(tokens_NT)]


def normalized(model: RewardModel, scores_N: Float[np.ndarray, " N"]) -> RewardModel:
    """Normalises a reward model so that given scores get mean 0 and standard deviation 1.

    Args:
      model: the reward model.
      scores_N: its scores of a reference set of texts.

    Returns:
      A copy of the model whose ``mean`` and ``std`` are those of the scores.

    Raises:
      ValueError: if the scores are all equal or not finite.
    """
    mean, std = float(np.mean(scores_N, dtype=np.float64)), float(np.std(scores_N, dtype=np.float64))
    if not (np.isfinite(mean) and std > 0):
        raise ValueError(f"{len(scores_N)} scores with mean {mean} and standard deviation {std} cannot be normalised; "
                         "give scores that are finite and not all equal")
    model = jax.tree.map(lambda x: x, model)  # a copy, so that the argument stays unchanged
    model.mean, model.std = parameter(jnp.float32(mean), ()), parameter(jnp.float32(std), ())
    return model
