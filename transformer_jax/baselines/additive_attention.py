"""A recurrent decoder layer with additive attention to the states of an encoder."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.baselines.cells import RecurrentLayer, State, chosen, restarted, segment_starts
from transformer_jax.config.recurrent import RecurrentConfig
from transformer_jax.nn.layers import parameter
from transformer_jax.ops.attention import masked_softmax
from transformer_jax.sharding import gather_weight


class EncodedSource(NamedTuple):
    """What a decoder reads of a source.

    Attributes:
      values: the states of the encoder in both directions ``[B, S, 2 D]``.
      keys: their part of the scores ``[B, S, D]``.
      ids: the segment of each source token ``[B, S]``; 0 for padding.
    """

    values: jax.Array
    keys: jax.Array
    ids: jax.Array


class AttentiveLayer(nnx.Module):
    """A recurrent layer that attends to a source before each token.

    The score of a source token is ``v . tanh(W s + U h)``, where s is the state before the token
    and h the state of the encoder. The weighted mean of the encoder's states is an input of the
    cell.

    Source: Bahdanau et al. (2015), section 3.1 and appendix A.1.2.

    Attributes:
      cell: the recurrent layer, which reads the embedding and the weighted mean.
      query_kernel: W ``[D, D]``.
      key_kernel: U ``[2 D, D]``.
      score_kernel: v ``[D]``.
    """

    def __init__(self, config: RecurrentConfig, *, key: jax.Array):
        D = config.model_dim
        cell_key, query_key, key_key, score_key = jax.random.split(key, 4)
        self.cell = RecurrentLayer(config, 3 * D, key=cell_key)
        self.query_kernel = parameter(jax.random.normal(query_key, (D, D)) / D ** 0.5, ("embed", None))
        self.key_kernel = parameter(jax.random.normal(key_key, (2 * D, D)) / (2 * D) ** 0.5, ("embed", None))
        self.score_kernel = parameter(jax.random.normal(score_key, (D,)) / D ** 0.5, (None,))

    def keys(self, values_BSE: jax.Array) -> jax.Array:
        """Returns the part of the scores that depends only on the source ``[B, S, D]``."""
        return values_BSE @ gather_weight(self.key_kernel[...].astype(values_BSE.dtype), self.key_kernel.axes)

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array, source: EncodedSource, state: State | None,
                 before_B: jax.Array | None, first: State) -> tuple[jax.Array, jax.Array, jax.Array, State]:
        """Reads the tokens of each row in order.

        Args:
          x_BTD: the embeddings of the target's tokens.
          segment_ids_BT: the segment of each token; a token attends to the source of its segment.
          source: the encoded source.
          state: the state after the tokens before these; ``None`` if there are none.
          before_B: the segment of the last of these earlier tokens.
          first: arrays ``[B, T, D]``: the state with which a segment starts, at its first token.

        Returns:
          The states ``[B, T, D]``, the weighted means of the source ``[B, T, 2 D]``, the scores of
          the source tokens, float32 ``[B, T, S]``, and the state after the last token.
        """
        dtype, D = x_BTD.dtype, x_BTD.shape[-1]
        state = self.cell.zeros(x_BTD.shape[0], dtype) if state is None else state
        starts_BT = segment_starts(segment_ids_BT, before_B)
        state_DG = self.cell.kernel(dtype)
        query_DD = gather_weight(self.query_kernel[...].astype(dtype), ("embed", None))
        input_kernel = gather_weight(self.cell.input_kernel[...].astype(dtype), ("embed", None))
        inputs_BTG = x_BTD @ input_kernel[:D] + self.cell.bias[...].astype(dtype)
        score_D = self.score_kernel[...].astype(jnp.float32)

        @jax.checkpoint  # the backward pass computes tanh(W s + U h) [B, S, D] of each token again
        def attend(h_BD: jax.Array, segment_B: jax.Array, source: EncodedSource) -> tuple[jax.Array, jax.Array]:
            hidden_BSD = jnp.tanh((h_BD @ query_DD)[:, None] + source.keys)
            scores_BS = (hidden_BSD.astype(jnp.float32) * score_D).sum(-1)
            allowed_BS = (source.ids == segment_B[:, None]) & (source.ids != 0)
            weights_BS = masked_softmax(scores_BS, allowed_BS).astype(dtype)
            return (weights_BS[..., None] * source.values).sum(1), scores_BS

        def step(state: State, inputs: tuple) -> tuple[State, tuple]:
            inputs_BG, start_B, segment_B, first = inputs
            state = restarted(state, start_B, first)
            mean_BE, scores_BS = attend(state[0], segment_B, source)
            new = self.cell.advance(inputs_BG + mean_BE @ input_kernel[D:], state, state_DG)
            state = chosen(segment_B != 0, new, state)
            return state, (state[0], mean_BE, scores_BS)

        by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), (inputs_BTG, starts_BT, segment_ids_BT, first))
        state, outputs = jax.lax.scan(step, state, by_time)
        h_BTD, mean_BTE, scores_BTS = (jnp.swapaxes(x, 0, 1) for x in outputs)
        return h_BTD, mean_BTE, scores_BTS, state
