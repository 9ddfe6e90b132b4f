"""Word vectors: one vector for each word, learned from the words nearby (Mikolov et al., 2013)."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from transformer_jax.baselines.negative_sampling import BLOCK, Pairs, draw_pairs
from transformer_jax.config.word_vectors import WordVectorConfig
from transformer_jax.sharding import constrain, embedding_lookup
from transformer_jax.training.state import TrainState

_AXES = ("vocab", None)
_MOST_PAIRS = 64


class WordVectors(nnx.Module):
    """Two tables of vectors: ``input`` has the word vectors, and ``output`` the vectors of the
    words that they predict. Both are sharded by the vocabulary."""

    def __init__(self, config: WordVectorConfig, *, key: jax.Array):
        """Creates the vectors: small random numbers in ``input``, zeros in ``output``.

        Args:
          config: The settings; ``vocab_size`` must be set.
          key: PRNG key.

        Raises:
          ValueError: If the config has no ``vocab_size``.
        """
        if config.vocab_size is None:
            raise ValueError("model.vocab_size is not set; use config.replace(vocab_size=...)")
        self.config = config
        shape = config.vocab_size, config.model_dim
        self.input = nnx.Param(jax.random.uniform(key, shape, minval=-0.5, maxval=0.5) / config.model_dim, axes=_AXES)
        self.output = nnx.Param(jnp.zeros(shape), axes=_AXES)

    def __call__(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Returns the word vector of each token."""
        return embedding_lookup(self.input[...], tokens_BT, _AXES)


def blocks_of(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the words and the segments of a batch as microbatches, ``[S, B, L]`` each."""
    return tuple(constrain(batch[name].T.reshape(batch[name].shape[1], -1, BLOCK), None, "batch", None)
                 for name in ("tokens", "segment_ids"))  # pyright: ignore[reportReturnType]


def batch_loss(model: WordVectors, batch: Mapping[str, jax.Array], cumulative_V: jax.Array,
               key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Computes the loss of all microbatches of a batch with the same weights.

    Args:
      model: The word vectors.
      batch: ``tokens`` and ``segment_ids``, ``[B * L, S]`` each.
      cumulative_V: The sums of the probabilities with which random words are drawn.
      key: PRNG key of the windows and of the random words.

    Returns:
      The sum of losses in nats, and the number of true pairs.
    """
    words_SBL, segments_SBL = blocks_of(batch)

    def one(words_BL: jax.Array, segments_BL: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        pairs = draw_pairs(words_BL, segments_BL, cumulative_V, model.config, key)
        return pairs.loss(*_rows(pairs, model.input[...], model.output[...]))

    losses_S, counts_S = jax.lax.map(lambda part: one(*part),
                                     (words_SBL, segments_SBL, jax.random.split(key, len(words_SBL))))
    return losses_S.sum(), counts_S.sum()


def make_word_vector_step(cumulative_V: jax.Array, schedule: Callable[[Any], Any]) -> Callable[
        [TrainState, Mapping[str, jax.Array]], tuple[TrainState, dict[str, jax.Array]]]:
    """Makes the training step of word vectors: plain gradient descent on one microbatch after the
    other, each of which changes only the vectors of its own words.

    The gradient is that of the sum of the losses, not of their mean, as in word2vec, so the
    learning rates are the usual ones.

    Args:
      cumulative_V: The sums of the probabilities with which random words are drawn.
      schedule: A function from the number of a step to the learning rate. Within a step the rate
        changes linearly.

    Returns:
      A jitted function ``step(state, batch) -> (state, metrics)``. ``loss`` is that of the first
      microbatch, and ``grad_norm`` the norm of its gradient. An update that is not finite is
      skipped.
    """
    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: TrainState, batch: Mapping[str, jax.Array], cumulative_V: jax.Array) -> tuple[
            TrainState, dict[str, jax.Array]]:
        words_SBL, segments_SBL = blocks_of(batch)
        model, num_parts = state.params, len(words_SBL)
        keys_S = jax.random.split(jax.random.fold_in(state.key, state.step), num_parts)
        start, end = (jnp.asarray(schedule(step), jnp.float32) for step in (state.step, state.step + 1))
        rates_S = start + (end - start) * jnp.arange(num_parts) / num_parts

        def update(carry: tuple[jax.Array, ...], part: tuple[jax.Array, ...]) -> tuple[Any, None]:
            inputs_VD, outputs_VD, num_skipped, loss, grad_norm = carry
            words_BL, segments_BL, key, rate, is_first = part
            pairs = draw_pairs(words_BL, segments_BL, cumulative_V, model.config, key)
            rows = _rows(pairs, inputs_VD, outputs_VD)
            gradients = pairs.gradients(*rows)
            # Inside of the loop, because reading the tables before it would copy them.
            loss, grad_norm = jax.lax.cond(is_first, lambda: _metrics(pairs, rows, gradients),
                                           lambda: (loss, grad_norm))
            is_finite = jnp.isfinite(sum(gradient.sum() for gradient in gradients))
            inputs_VD, outputs_VD = (
                _subtract(table_VD, ids, jnp.where(is_finite, rate * gradient, 0.0), weights)
                for table_VD, ids, gradient, weights in zip(
                    (inputs_VD, outputs_VD), (pairs.inputs_BL, pairs.outputs_BO), gradients, pairs.weights(),
                    strict=True))
            return (inputs_VD, outputs_VD, num_skipped + ~is_finite, loss, grad_norm), None

        zero = jnp.zeros(())
        (inputs_VD, outputs_VD, num_skipped, loss, grad_norm), _ = jax.lax.scan(
            update, (model.input[...], model.output[...], jnp.zeros((), jnp.int32), zero, zero),
            (words_SBL, segments_SBL, keys_S, rates_S, jnp.arange(num_parts) == 0))
        model = jax.tree.unflatten(jax.tree.structure(model), (inputs_VD, outputs_VD))
        is_bad = num_skipped > 0
        state = TrainState(params=model, opt_state=state.opt_state, step=state.step + 1, key=state.key,
                           skipped=state.skipped + is_bad,
                           skipped_in_a_row=jnp.where(is_bad, state.skipped_in_a_row + 1, 0))
        return state, {"loss": loss, "grad_norm": grad_norm, "skipped": state.skipped,
                       "skipped_in_a_row": state.skipped_in_a_row}

    return lambda state, batch: step(state, batch, cumulative_V)


def _metrics(pairs: Pairs, rows: tuple[jax.Array, jax.Array],
             gradients: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the mean loss of true pairs, and the norm of the gradient."""
    loss, count = pairs.loss(*rows)
    return loss / jnp.maximum(count, 1.0), jnp.sqrt(sum(jnp.square(gradient).sum() for gradient in gradients))


def _rows(pairs: Pairs, inputs_VD: jax.Array, outputs_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the vectors that pairs compare."""
    return (embedding_lookup(inputs_VD, pairs.inputs_BL, _AXES),
            embedding_lookup(outputs_VD, pairs.outputs_BO, _AXES))


def _subtract(table_VD: jax.Array, ids: jax.Array, rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Subtracts rows from the rows of a table with these ids. Each device receives all rows, and
    changes those of its own shard of the table.

    All pairs of a microbatch have the same weights, so a word with very many pairs would move much
    too far. It moves as far as with ``_MOST_PAIRS`` pairs.
    """
    totals_V = jnp.zeros(len(table_VD)).at[ids].add(weights)
    rows = rows * jnp.minimum(1.0, _MOST_PAIRS / jnp.maximum(totals_V[ids], 1.0))[..., None]
    rows = constrain(rows, None, None, None)
    return constrain(table_VD.at[constrain(ids, None, None)].add(-rows), *_AXES)
