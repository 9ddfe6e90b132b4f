"""The BERT family: bidirectional encoders, trained to restore masked tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.models.heads import MaskedTokenHead
from transformer_jax.models.inputs import check_config, check_token_array, positions_in_segments
from transformer_jax.models.output import Output, Trace
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Block
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Norm
from transformer_jax.nn.sites import Intervene
from transformer_jax.nn.stack import MakeBlock, Stack, by_rows, rows_at_a_time
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import constrain


class Encoder(nnx.Module):
    """An encoder-only Transformer: a pytree of weights, called as a pure function.

    Source: Devlin et al. (2019), BERT; Liu et al. (2019), RoBERTa; variants by
      :class:`ModelConfig`.

    Attributes:
      reads_sources: see :class:`transformer_jax.Decoder`; so is ``predicts_next``.
    """

    reads_sources = False
    predicts_next = False

    def __init__(self, config: ModelConfig, *, key: jax.Array, block: MakeBlock = Block):
        """Random weights.

        Args:
          config: the shape; ``family`` must be ``"encoder"`` and ``vocab_size`` set.
          key: PRNG key, such as ``jax.random.key(0)``.
          block: makes the block of a layer; a class of one's own, see docs/extending/block.md.
        """
        check_config(config, "encoder")
        embedding_key, stack_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embeddings = Embeddings(config, key=embedding_key)
        self.stack = Stack(config, key=stack_key, num_layers=config.num_layers, is_causal=False,
                           block=block)
        self.final_norm = Norm(config.model_dim, config) if config.norm_position == "pre" else None
        self.head = MaskedTokenHead(config, key=head_key)

    def __call__(self, tokens_BT: jax.Array, *, mask_BT: jax.Array | None = None,
                 token_types_BT: jax.Array | None = None, segment_ids_BT: jax.Array | None = None,
                 positions_BT: jax.Array | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> Output:
        """Logits of the token at every position.

        Args:
          tokens_BT: token ids.
          mask_BT: True (or 1) for tokens, False for padding, which nothing attends to. ``None``: no
            padding.
          token_types_BT: the kind of each token, below ``config.num_token_types``; all 0 by
            default.
          segment_ids_BT: which example of a packed row a token belongs to, 0 for padding; attention
            stays within a segment and positions restart with it.
          positions_BT: positions to use instead of those counted within each segment.
          key: switches dropout on.
          intervene: ``intervene(site, layer, value) -> value``, see
            :meth:`transformer_jax.Decoder.__call__`.

        Returns:
          Output; ``hidden`` are the contextual embeddings. Under jit what is not read is not
          computed: read ``hidden`` and call :meth:`predict` on some positions for the logits of
          these alone.

        Raises:
          ValueError: for tokens that are no integers ``[B, T]`` or longer than ``config.max_len``,
            or token types that the config does not have.
        """
        config = self.config
        check_token_array(tokens_BT, config.max_len, "config.max_len")
        if token_types_BT is not None and not config.num_token_types:
            raise ValueError("token_types_BT is given, but config.num_token_types is 0")
        if mask_BT is not None:
            mask_BT = jnp.asarray(mask_BT).astype(jnp.int32)
            segment_ids_BT = mask_BT if segment_ids_BT is None else segment_ids_BT * mask_BT
        if positions_BT is None:
            positions_BT = positions_in_segments(tokens_BT, segment_ids_BT)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = self.embeddings(tokens_BT, positions_BT, token_types_BT, key=embedding_key)
        x_BTD = constrain(x_BTD, "batch", "sequence", None)

        def context_of(stack: Stack, positions_BT: jax.Array, segment_ids_BT: jax.Array | None) -> AttentionContext:
            mask = AttentionMask(window=config.sliding_window)
            if segment_ids_BT is not None:
                mask &= AttentionMask.segments(segment_ids_BT)
            return AttentionContext.of(config, mask, positions_BT, relative=stack.relative)

        context = context_of(self.stack, positions_BT, segment_ids_BT)
        if key is None and intervene is None and (rows := rows_at_a_time(*tokens_BT.shape)):
            x_BTD, layers = by_rows(lambda stack, x_BTD, *inputs: stack(x_BTD, context_of(stack, *inputs))[:2], rows,
                                    self.stack, x_BTD, jnp.broadcast_to(positions_BT, tokens_BT.shape), segment_ids_BT)
        else:
            x_BTD, layers, _ = self.stack(x_BTD, context, key=stack_key, intervene=intervene)
        hidden_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return Output(logits=self.predict(hidden_BTD), hidden=hidden_BTD,
                      trace=Trace(layers=layers, final=x_BTD, mask=context.mask, bias=context.bias), cache=None)

    def predict(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits, float32 ``[..., V]``, of hidden states, such as those of the masked positions."""
        return self.head(hidden_BTD, self.embeddings)

    def stacks(self) -> dict[str, Stack]:
        """The stack of layers that holds each kind of attention."""
        return {"self": self.stack}

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits, float32 ``[..., V]``, of hidden states after the final norm: :meth:`predict`."""
        return self.predict(hidden_BTD)

    @property
    def prediction_head(self) -> MaskedTokenHead:
        """What stands between the hidden states and the unembedding; ``None`` in the other
        families."""
        return self.head
