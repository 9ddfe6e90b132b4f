"""The GPT family: decoder-only language models."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Shaped

from transformer_jax.config import ModelConfig
from transformer_jax.models.inputs import CausalInputs, check_config, tokens_of
from transformer_jax.models.output import Output, Trace
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Block
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.nn.layers import Norm, ScalarHead
from transformer_jax.nn.printing import Printed
from transformer_jax.nn.sites import Intervene
from transformer_jax.nn.stack import MakeBlock, Stack, unstack
from transformer_jax.sharding import constrain


class Decoder(Printed, nnx.Module):
    """A decoder-only Transformer: a pytree of weights, called as a pure function.

    Source: Radford et al. (2018, 2019), Brown et al. (2020); ``ModelConfig`` selects variants.

    Attributes:
      reads_sources: True if the model takes a source text in addition to the text that it
        continues.
      predicts_next: True if the logits are those of the next token, so that the model can generate.
      prediction_head: the module between the hidden states and the unembedding; ``None`` if there
        is no such module.
    """

    reads_sources = False
    predicts_next = True
    prediction_head = None

    def __init__(self, config: ModelConfig, *, key: jax.Array, block: MakeBlock = Block):
        """Creates a model with random weights.

        Args:
          config: the shape of the model; ``vocab_size`` must be set.
          key: PRNG key, such as ``jax.random.key(0)``.
          block: makes the block of a layer. Pass a class of your own to change it, see
            docs/extending/block.md.

        Raises:
          ValueError: if the config is for another family or has no ``vocab_size``.
        """
        check_config(config, "decoder", key)
        embedding_key, stack_key = jax.random.split(key)
        self.config = config
        self.embeddings = Embeddings(config, key=embedding_key)
        self.stack = Stack(config, key=stack_key, num_layers=config.num_layers, is_causal=True,
                           block=block)
        self.final_norm = Norm(config.model_dim, config) if config.norm_position != "post" else None
        self.value_head = ScalarHead(config, key=jax.random.fold_in(key, 2)) if config.use_value_head else None

    def __call__(self, tokens_BT: Int[Array, "B T"] | None = None, *,
                 segment_ids_BT: Shaped[Array, "B T"] | None = None, positions_BT: Int[Array, "#B T"] | None = None,
                 cache: KVCache | None = None, key: jax.Array | None = None,
                 visible_BTS: Bool[Array, "B T S"] | None = None, intervene: Intervene | None = None,
                 embeddings_BTD: Float[Array, "B T D"] | None = None) -> Output:
        """Returns the next-token logits of every position.

        Args:
          tokens_BT: token ids.
          segment_ids_BT: the document of a packed row that each token belongs to, 0 for padding.
            Tokens attend only within their segment, and positions restart in each segment. ``None``
            means one segment.
          positions_BT: positions to use instead of those counted within each segment.
          cache: keys and values of the tokens before these; each row of the cache is one sequence.
          key: PRNG key for dropout. ``None`` switches dropout off.
          visible_BTS: True for the slots of the cache that each token attends to, its own slot
            included, instead of all earlier slots. Use it for trees of continuations, and pass
            ``positions_BT`` too.
          intervene: ``intervene(site, layer, value) -> value``, called at the sites of each layer,
            such as ``"residual"``, ``"attention_bias"``, ``"head_output"``, ``"attention_output"``
            and ``"mlp_output"``.
          embeddings_BTD: embeddings to use in place of token ids. They replace the rows of the
            token table, so ``model.embeddings.token[...][tokens_BT]`` has the same effect as
            ``tokens_BT``: the model scales them and adds positions in the same way.

        Returns:
          The output. Under ``jit``, the compiler removes the computation of every part that is not
          read.

        Raises:
          ValueError: if the tokens are not integers ``[B, T]``, if there are none, or if there are
            more than ``config.max_len``; if the embeddings have another shape; and, outside of
            ``jit``, if token ids or positions are beyond their tables. Under ``jit`` their values
            are not known: an id or position that is too large reads the last row, and a negative
            one counts from the end.
        """
        tokens_BT = tokens_of(tokens_BT, embeddings_BTD, self.config)
        inputs = CausalInputs.of(self.config, tokens_BT, segment_ids_BT, positions_BT, cache, visible_BTS)
        embedding_key, stack_key = (None, None) if key is None else jax.random.split(key)
        context = AttentionContext.of(self.config, inputs.mask, inputs.positions_BT,
                                      weights=self.stack.relative, cache=inputs.cache,
                                      are_in_order=inputs.are_in_order)
        x_BTD = self.embeddings(tokens_BT, inputs.positions_BT, key=embedding_key, embeddings_BTD=embeddings_BTD)
        # Without this constraint, the compiler may replicate every activation over the mesh axis
        # that shards the weights.
        x_BTD = constrain(x_BTD, "batch", "sequence", None)
        x_BTD, layers, cache = self.stack(x_BTD, context, cache=inputs.cache, key=stack_key, intervene=intervene)
        hidden_BTD = x_BTD if self.final_norm is None else self.final_norm(x_BTD)
        return Output(logits=self.embeddings.unembed(hidden_BTD), hidden=hidden_BTD,
                      trace=Trace.of(self.config, layers, x_BTD, context),
                      cache=None if cache is None else cache.advance(tokens_BT.shape[1]))

    def stacks(self) -> dict[str, Stack]:
        """Returns the stack of layers that holds each kind of attention.

        Returns:
          A dictionary from the kind of attention, here only ``"self"``, to its stack.
        """
        return {"self": self.stack}

    def start_cache(self, batch_size: int, capacity: int, *, keeps_all: bool = False) -> KVCache:
        """Creates an empty cache.

        Args:
          batch_size: the number of rows B.
          capacity: the number of tokens that each row has room for.
          keeps_all: whether layers with a sliding window keep all tokens, as ``visible_BTS`` needs.
            Otherwise they keep only their window.

        Returns:
          The cache.
        """
        return KVCache.empty(self.config, batch_size, capacity, keeps_all=keeps_all)

    def step(self, tokens_BT: Int[Array, "B T"], cache: KVCache, **options: Any) -> Output:
        """Runs the model on the tokens that follow those in the cache.

        Args:
          tokens_BT: token ids.
          cache: keys and values of the tokens before these.
          **options: further arguments of a call of the model.

        Returns:
          The output; its ``cache`` includes the new tokens.
        """
        return self(tokens_BT, cache=cache, **options)

    def unembed(self, hidden_BTD: Float[Array, "*tokens D"]) -> Float[Array, "*tokens V"]:
        """Computes the logits of hidden states.

        Args:
          hidden_BTD: hidden states after the final norm, ``[..., D]``.

        Returns:
          Logits, float32 ``[..., V]``.
        """
        return self.embeddings.unembed(hidden_BTD)

    def for_decoding(self) -> Decoder:
        """Returns the model in the form in which a decoding loop reads its weights fastest.

        Returns:
          The same model, with the weights of each layer in separate arrays. It holds a copy of the
          weights.
        """
        model = jax.tree.map(lambda leaf: leaf, self)
        model.stack, model.embeddings = unstack(self.stack), self.embeddings.for_decoding()
        return model
