"""The BERT family: bidirectional encoders, trained to restore masked tokens."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from transformer_jax.config import ModelConfig
from transformer_jax.models.heads import MaskedTokenHead
from transformer_jax.models.inputs import (
    check_config,
    check_token_array,
    check_values,
    positions_in_segments,
    tokens_of,
)
from transformer_jax.models.output import Output, Trace
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Block
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Norm
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.sites import Intervene
from transformer_jax.nn.stack import MakeBlock, Stack, by_rows, rows_at_a_time
from transformer_jax.ops.masks import AttentionMask
from transformer_jax.sharding import constrain


class Encoder(Printed, nnx.Module):
    """An encoder-only Transformer: a pytree of weights, called as a pure function.

    Source: Devlin et al. (2019), BERT; Liu et al. (2019), RoBERTa; ``ModelConfig`` selects
    variants.

    Attributes:
      reads_sources: False: the model takes one text, see ``transformer_jax.Decoder``.
      predicts_next: False: the model predicts masked tokens and cannot generate.
    """

    reads_sources = False
    predicts_next = False

    def __init__(self, config: ModelConfig, *, key: jax.Array, block: MakeBlock = Block, has_head: bool = True):
        """Creates a model with random weights.

        Args:
          config: the shape of the model; ``family`` must be ``"encoder"`` and ``vocab_size`` must
            be set.
          key: PRNG key, such as ``jax.random.key(0)``.
          block: makes the block of a layer. Pass a class of your own to change it, see
            docs/extending/block.md.
          has_head: False for a model without the head that predicts masked tokens, such as the
            trunk of a ``Classifier``.

        Raises:
          ValueError: if the config is for another family or has no ``vocab_size``.
        """
        check_config(config, "encoder", key)
        embedding_key, stack_key, head_key = jax.random.split(key, 3)
        self.config = config
        self.embeddings = Embeddings(config, key=embedding_key)
        self.stack = Stack(config, key=stack_key, num_layers=config.num_layers, is_causal=False,
                           block=block)
        self.final_norm = Norm(config.model_dim, config) if config.norm_position != "post" else None
        self.head = MaskedTokenHead(config, key=head_key) if has_head else None

    def __call__(self, tokens_BT: Int[Array, "B T"] | None = None, *, mask_BT: Shaped[Array, "B T"] | None = None,
                 token_types_BT: Int[Array, "#B T"] | None = None, segment_ids_BT: Shaped[Array, "B T"] | None = None,
                 positions_BT: Int[Array, "#B T"] | None = None, key: jax.Array | None = None,
                 intervene: Intervene | None = None, embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Returns the logits of the token at every position.

        Args:
          tokens_BT: token ids.
          mask_BT: True (or 1) for tokens, False for padding. No token attends to padding. ``None``
            means that there is no padding.
          token_types_BT: the type of each token, below ``config.num_token_types``; all 0 by
            default.
          segment_ids_BT: the example of a packed row that each token belongs to, 0 for padding.
            Tokens attend only within their segment, and positions restart in each segment.
          positions_BT: positions to use instead of those counted within each segment.
          key: PRNG key for dropout. ``None`` switches dropout off.
          intervene: ``intervene(site, layer, value) -> value``, see
            ``transformer_jax.Decoder.__call__``.
          embeddings_BTD: embeddings to use in place of token ids, see
            ``transformer_jax.Decoder.__call__``.

        Returns:
          The output; ``hidden`` holds the contextual embeddings. Without a head, ``logits`` is
          ``[B, T, 0]``. Under ``jit``, the compiler
          removes the computation of every part that is not read. To compute the logits of some
          positions only, read ``hidden`` and call ``predict`` on these positions.

        Raises:
          ValueError: if the tokens are not integers ``[B, T]``, if there are none, or if there are
            more than ``config.max_len``; if the embeddings have another shape; and, outside of
            ``jit``, if token ids, positions or token types are beyond their tables. Under ``jit``
            their values are not known: one that is too large reads the last row, and a negative one
            counts from the end.
        """
        config = self.config
        tokens_BT = tokens_of(tokens_BT, embeddings_BTD, config)
        check_token_array(tokens_BT, config.max_len, "config.max_len")
        check_values(config, tokens_BT, positions_BT, token_types_BT)
        if mask_BT is not None:
            mask_BT = jnp.asarray(mask_BT).astype(jnp.int32)
            segment_ids_BT = mask_BT if segment_ids_BT is None else segment_ids_BT * mask_BT
        are_in_order = positions_BT is None
        if positions_BT is None:
            positions_BT = positions_in_segments(tokens_BT, segment_ids_BT)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        x_BTD = self.embeddings(tokens_BT, positions_BT, token_types_BT, key=embedding_key,
                                embeddings_BTD=embeddings_BTD)
        x_BTD = constrain(x_BTD, "batch", "sequence", None)

        def context_of(stack: Stack, positions_BT: jax.Array, segment_ids_BT: jax.Array | None) -> AttentionContext:
            mask = AttentionMask()
            if segment_ids_BT is not None:
                mask &= AttentionMask.segments(segment_ids_BT)
            return AttentionContext.of(config, mask, positions_BT, weights=stack.relative, are_in_order=are_in_order)

        context = context_of(self.stack, positions_BT, segment_ids_BT)
        if key is None and intervene is None and (rows := rows_at_a_time(*tokens_BT.shape)):
            x_BTD, layers = by_rows(lambda stack, x_BTD, *inputs: stack(x_BTD, context_of(stack, *inputs))[:2], rows,
                                    self.stack, x_BTD, jnp.broadcast_to(positions_BT, tokens_BT.shape), segment_ids_BT)
        else:
            x_BTD, layers, _ = self.stack(x_BTD, context, key=stack_key, intervene=intervene)
        hidden_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        logits_BTV = jnp.zeros((*tokens_BT.shape, 0)) if self.head is None else self.predict(hidden_BTD)
        return Output(logits=logits_BTV, hidden=hidden_BTD,
                      trace=Trace.of(config, layers, x_BTD, context), cache=None)

    def predict(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes the logits of hidden states, such as those of the masked positions.

        Args:
          hidden_BTD: hidden states after the final norm, ``[..., D]``.

        Returns:
          Logits, float32 ``[..., V]``.

        Raises:
          ValueError: if the model has no head.
        """
        if self.head is None:
            raise ValueError("this encoder has no head that predicts tokens, because it is the trunk of a classifier")
        return self.head(hidden_BTD, self.embeddings)

    def stacks(self) -> dict[str, Stack]:
        """Returns the stack of layers that holds each kind of attention.

        Returns:
          A dictionary from the kind of attention, here only ``"self"``, to its stack.
        """
        return {"self": self.stack}

    def unembed(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes the logits of hidden states; the same as ``predict``.

        Args:
          hidden_BTD: hidden states after the final norm, ``[..., D]``.

        Returns:
          Logits, float32 ``[..., V]``.
        """
        return self.predict(hidden_BTD)

    @property
    def prediction_head(self) -> MaskedTokenHead | None:
        """The module between the hidden states and the unembedding; ``None`` in the other families,
        and without a head."""
        return self.head
