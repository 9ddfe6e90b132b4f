"""The flax.nnx modules that transformers consist of."""

from typing import TYPE_CHECKING

from transformer_jax.lazy import lazy_names

if TYPE_CHECKING:
    from transformer_jax.nn.attention import Attention, AttentionContext
    from transformer_jax.nn.blocks import Block, LayerTrace
    from transformer_jax.nn.cache import KVCache
    from transformer_jax.nn.embeddings import Embeddings, TargetEmbeddings
    from transformer_jax.nn.layers import Linear, Norm, ScalarHead
    from transformer_jax.nn.lora import AdaptedLinear, Adapter, adapt, adapted_loss, make_adapters, merge_adapters
    from transformer_jax.nn.mlp import FeedForward
    from transformer_jax.nn.positions import Places, PositionEncoding, register_positions
    from transformer_jax.nn.stack import Stack
    from transformer_jax.nn.state_cache import StateCache
else:
    __getattr__, __dir__ = lazy_names(__name__)

__all__ = [
    "AdaptedLinear", "Adapter", "Attention", "AttentionContext", "Block", "Embeddings", "FeedForward", "KVCache",
    "LayerTrace", "Linear", "Norm", "Places", "PositionEncoding", "ScalarHead", "Stack", "StateCache",
    "TargetEmbeddings", "adapt", "adapted_loss", "make_adapters", "merge_adapters", "register_positions",
]
