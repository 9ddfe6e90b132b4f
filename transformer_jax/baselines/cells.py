"""Recurrent layers: RNN, LSTM and GRU cells, scanned over the tokens of a row."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config.recurrent import RecurrentConfig
from transformer_jax.nn.layers import parameter
from transformer_jax.ops.linear import linear
from transformer_jax.sharding import as_rows, constrain, gather_weight

# The state of a layer: h, and for an LSTM the cell c after it. Each is [B, D].
State = tuple[jax.Array, ...]


def segment_starts(segment_ids_BT: jax.Array, before_B: jax.Array | None = None) -> jax.Array:
    """Finds the tokens at which a new segment starts.

    Args:
      segment_ids_BT: the segment of each token, 0 for padding.
      before_B: the segment of the last token before these; ``None`` if there is none.

    Returns:
      True ``[B, T]`` for the first token of each segment. Padding between two tokens of one segment
      starts no segment.
    """
    zeros_B = jnp.zeros_like(segment_ids_BT[:, 0]) if before_B is None else before_B
    places_T = jnp.arange(1, segment_ids_BT.shape[1] + 1)
    # The place after the last token that is not padding, up to and including each token.
    last_BT = jax.lax.cummax(jnp.where(segment_ids_BT != 0, places_T, 0), axis=1)
    with_before = jnp.concatenate([zeros_B[:, None], segment_ids_BT], axis=1)
    earlier_BT = jnp.concatenate([jnp.zeros_like(last_BT[:, :1]), last_BT[:, :-1]], axis=1)
    return (segment_ids_BT != 0) & (segment_ids_BT != jnp.take_along_axis(with_before, earlier_BT, axis=1))


class RecurrentLayer(nnx.Module):
    """One recurrent layer. The gates are joined in one matrix, in the order of PyTorch.

    ``nnx.RNN`` scans over cells that multiply the input at each step. Here the inputs of all tokens
    are multiplied in one product before the scan, and a segment of a packed row starts with a new
    state.

    Attributes:
      kind: ``rnn``, ``lstm`` (gates i, f, g, o) or ``gru`` (gates r, z, n).
      input_kernel: the weights of the input ``[in, G * D]``.
      state_kernel: the weights of the state ``[D, G * D]``.
      bias: the bias of all gates ``[G * D]``.
      candidate_bias: the bias of the state's part of n, inside the product with r ``[D]``; only in
        a GRU.
    """

    def __init__(self, config: RecurrentConfig, in_dim: int, *, key: jax.Array):
        D, G = config.model_dim, config.num_gates
        bound = 1 / math.sqrt(D)

        def uniform(index: int, *shape: int) -> jax.Array:
            return jax.random.uniform(jax.random.fold_in(key, index), shape, jnp.float32, -bound, bound)

        self.kind = config.cell
        self.input_kernel = parameter(uniform(0, in_dim, G * D), ("embed", None))
        self.state_kernel = parameter(uniform(1, D, G * D), ("embed", None))
        bias = uniform(2, G * D)
        if self.kind == "lstm":  # a forget gate that starts open keeps the gradient (Jozefowicz et al., 2015)
            bias = bias.at[D:2 * D].add(1.0)
        self.bias = parameter(bias, (None,))
        self.candidate_bias = parameter(uniform(3, D), (None,)) if self.kind == "gru" else None

    @property
    def num_states(self) -> int:
        """The number of arrays in the state."""
        return 2 if self.kind == "lstm" else 1

    def zeros(self, batch_size: int, dtype: jax.typing.DTypeLike) -> State:
        """Returns the state before the first token, ``num_states`` arrays ``[B, D]``."""
        return tuple(constrain(jnp.zeros((batch_size, self.state_kernel.shape[0]), dtype), "batch", None)
                     for _ in range(self.num_states))

    def projected(self, x: jax.Array) -> jax.Array:
        """Returns the input's part of the gates of all tokens, ``[..., G * D]``."""
        kernel = gather_weight(self.input_kernel[...].astype(x.dtype), self.input_kernel.axes)
        rows = linear(as_rows(x), kernel, None) + self.bias[...].astype(x.dtype)
        return rows.reshape(*x.shape[:-1], -1)

    def advance(self, inputs_BG: jax.Array, state: State, kernel_DG: jax.Array) -> State:
        """Computes the state after one token.

        Args:
          inputs_BG: the input's part of the gates ``[B, G * D]``, see ``projected``.
          state: the state before the token.
          kernel_DG: the weights of the state.

        Returns:
          The state after the token.
        """
        h_BD = state[0]
        from_state_BG = h_BD @ kernel_DG
        if self.kind == "rnn":
            return (jnp.tanh(inputs_BG + from_state_BG),)
        if self.kind == "lstm":
            i, f, g, o = jnp.split(inputs_BG + from_state_BG, 4, axis=-1)
            c_BD = jax.nn.sigmoid(f) * state[1] + jax.nn.sigmoid(i) * jnp.tanh(g)
            return jax.nn.sigmoid(o) * jnp.tanh(c_BD), c_BD
        assert self.candidate_bias is not None
        (x_r, x_z, x_n), (h_r, h_z, h_n) = (jnp.split(part, 3, axis=-1) for part in (inputs_BG, from_state_BG))
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * (h_n + self.candidate_bias[...].astype(h_n.dtype)))
        return ((1 - z) * n + z * h_BD,)

    def kernel(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Returns the weights of the state in the type of the products, gathered over the mesh."""
        return gather_weight(self.state_kernel[...].astype(dtype), self.state_kernel.axes)

    def __call__(self, x_BTD: jax.Array, segment_ids_BT: jax.Array, state: State | None = None,
                 before_B: jax.Array | None = None, *, reverse: bool = False,
                 first: State | None = None) -> tuple[State, State]:
        """Reads the tokens of each row in order.

        Args:
          x_BTD: the inputs ``[B, T, in]``.
          segment_ids_BT: the segment of each token. Padding (0) does not change the state, and a
            new segment starts with a new state.
          state: the state after the tokens before these; ``None`` if there are none.
          before_B: the segment of the last of these earlier tokens.
          reverse: True to read each row from its end.
          first: arrays ``[B, T, D]``; the state with which a segment starts is read at its first
            token. ``None`` means zeros.

        Returns:
          The state after each token, arrays ``[B, T, D]``, and the state after the last token.
        """
        state = self.zeros(x_BTD.shape[0], x_BTD.dtype) if state is None else state
        ids_BT = segment_ids_BT[:, ::-1] if reverse else segment_ids_BT
        starts_BT = segment_starts(ids_BT, before_B)
        if reverse:
            starts_BT = starts_BT[:, ::-1]
        kernel_DG = self.kernel(x_BTD.dtype)

        def step(state: State, inputs: tuple) -> tuple[State, State]:
            inputs_BG, start_B, is_token_B, first = inputs
            state = restarted(state, start_B, first)
            new = self.advance(inputs_BG, state, kernel_DG)
            state = chosen(is_token_B, new, state)
            return state, state

        by_time = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1),
                               (self.projected(x_BTD), starts_BT, segment_ids_BT != 0, first))
        state, states = jax.lax.scan(step, state, by_time, reverse=reverse)
        return tuple(jnp.swapaxes(part_TBD, 0, 1) for part_TBD in states), state


def restarted(state: State, start_B: jax.Array, first: State | None) -> State:
    """Returns the state before a token; rows in which a segment starts get its first state, or
    zeros."""
    fresh = first if first is not None else tuple(jnp.zeros_like(part) for part in state)
    return chosen(start_B, fresh, state)


def chosen(which_B: jax.Array, these: State, others: State) -> State:
    """Returns, for each row, the first state where ``which_B`` is true, and else the second."""
    return tuple(jnp.where(which_B[:, None], one, other) for one, other in zip(these, others, strict=True))
