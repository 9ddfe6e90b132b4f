"""The GPT family: decoder-only language models."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from transformer_jax.config import ModelConfig
from transformer_jax.models.inputs import CausalInputs, check_config
from transformer_jax.models.output import Output, Trace
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Block
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Norm, ScalarHead
from transformer_jax.nn.sites import Intervene
from transformer_jax.nn.stack import MakeBlock, Stack, unstack
from transformer_jax.sharding import constrain


class Decoder(nnx.Module):
    """A decoder-only Transformer: a pytree of weights, called as a pure function.

    Source: Radford et al. (2018, 2019), Brown et al. (2020); variants by :class:`ModelConfig`.

    Attributes:
      reads_sources: whether it reads a source beside the text that it continues.
      predicts_next: whether its logits are those of the next token, so that it can generate.
    """

    reads_sources = False
    predicts_next = True
    prediction_head = None

    def __init__(self, config: ModelConfig, *, key: jax.Array, block: MakeBlock = Block):
        """Random weights.

        Args:
          config: the shape; ``vocab_size`` must be set.
          key: PRNG key, such as ``jax.random.key(0)``.
          block: makes the block of a layer; a class of one's own, see docs/extending/block.md.
        """
        check_config(config, "decoder")
        embedding_key, stack_key = jax.random.split(key)
        self.config = config
        self.embeddings = Embeddings(config, key=embedding_key)
        self.stack = Stack(config, key=stack_key, num_layers=config.num_layers, is_causal=True,
                           block=block)
        self.final_norm = Norm(config.model_dim, config) if config.norm_position == "pre" else None
        self.value_head = ScalarHead(config, key=jax.random.fold_in(key, 2)) if config.use_value_head else None

    def __call__(self, tokens_BT: jax.Array, *, segment_ids_BT: jax.Array | None = None,
                 positions_BT: jax.Array | None = None, cache: KVCache | None = None, key: jax.Array | None = None,
                 visible_BTS: jax.Array | None = None, intervene: Intervene | None = None) -> Output:
        """Next-token logits of every position.

        Args:
          tokens_BT: token ids.
          segment_ids_BT: which document of a packed row a token belongs to, 0 for padding;
            attention stays within a segment and positions restart with it. ``None``: one segment.
          positions_BT: positions to use instead of those counted within each segment.
          cache: keys and values of the tokens before these; each of its rows is one sequence.
          key: switches dropout on.
          visible_BTS: which slots of the cache each token sees, itself included, instead of all
            before it: for trees of continuations, whose ``positions_BT`` must be given too.
          intervene: ``intervene(site, layer, value) -> value``, called at the sites ``"residual"``,
            ``"attention_bias"``, ``"head_output"``, ``"attention_output"`` and ``"mlp_output"`` of
            each layer.

        Returns:
          Output; under jit what is not read of it is not computed.

        Raises:
          ValueError: for tokens that are no integers ``[B, T]`` or longer than ``config.max_len``.
        """
        inputs = CausalInputs.of(self.config, tokens_BT, segment_ids_BT, positions_BT, cache, visible_BTS)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        context = AttentionContext.of(self.config, inputs.mask, inputs.positions_BT,
                                      key_positions_BS=inputs.key_positions_BS, relative=self.stack.relative)
        x_BTD = self.embeddings(tokens_BT, inputs.positions_BT, key=embedding_key)
        # Without it the compiler may replicate every activation over the axis that shards the
        # weights.
        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        x_BTD, layers, cache = self.stack(x_BTD, context, cache=inputs.cache, key=stack_key, intervene=intervene)
        hidden_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return Output(logits=self.embeddings.unembed(hidden_BTD), hidden=hidden_BTD,
                      trace=Trace(layers=layers, final=x_BTD, mask=context.mask, bias=context.bias),
                      cache=None if cache is None else cache.advance(tokens_BT.shape[1]))

    def stacks(self) -> dict[str, Stack]:
        """The stack of layers that holds each kind of attention."""
        return {"self": self.stack}

    def start_cache(self, batch_size: int, capacity: int) -> KVCache:
        """An empty cache with room for ``capacity`` tokens a row."""
        return KVCache.empty(self.config, batch_size, capacity)

    def step(self, tokens_BT: jax.Array, cache: KVCache, **options: Any) -> Output:
        """The output for the tokens after those in the cache; options as in a call."""
        return self(tokens_BT, cache=cache, **options)

    def unembed(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits, float32 ``[..., V]``, of hidden states after the final norm."""
        return self.embeddings.unembed(hidden_BTD)

    def for_decoding(self) -> Decoder:
        """The same model in the form in which a token loop reads its weights fastest; it holds a
        copy of them."""
        model = jax.tree.map(lambda leaf: leaf, self)
        model.stack = unstack(self.stack)
        return model
