"""The stack of layers: one pytree with a leading axis of layers, applied by a scan."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from transformer_jax.config import ModelConfig
from transformer_jax.nn.attention import AttentionContext
from transformer_jax.nn.blocks import Block, LayerTrace, prepared
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.layers import LAYER_INPUT, LINEAR_OUTPUT
from transformer_jax.nn.positions import position_encoding
from transformer_jax.nn.scanning import joined_traces, scan_by_period, scan_groups
from transformer_jax.nn.sites import Intervene, Sites
from transformer_jax.ops.attention import platform
from transformer_jax.sharding import constrain, is_sharded

_REMAT_POLICIES: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT, LINEAR_OUTPUT], offload_src="device",
        offload_dst="pinned_host"),
}
# A bias with materialize_once=True is materialized once for all layers if it has at most so many
# entries for each head. Otherwise each layer materializes what it needs.
_MOST_BIASES = 1 << 22
# The activations of about so many tokens fit the caches of a CPU.
_CACHED_TOKENS = 2048

# A function that makes the block of one layer from (config, *, key, num_layers). In the decoder of
# an encoder-decoder it is also called with has_memory=True.
MakeBlock = Callable[..., Any]


class Stack(nnx.Module):
    """Blocks whose weights are stacked in arrays ``[L, ...]``.

    One scan applies all layers, so that the compile time does not grow with their number. With
    ``config.shared_layers`` the arrays have one layer, which is applied ``num_layers`` times.

    Attributes:
      blocks: The blocks of all layers; with a mixture of experts, of the layers that have experts.
      dense_blocks: The blocks of the layers without experts in a model whose other layers have
        them, else ``None``.
    """

    def __init__(self, config: ModelConfig, *, key: jax.Array, num_layers: int, is_causal: bool,
                 has_memory: bool = False, block: MakeBlock = Block):
        _check_makes_blocks(block)
        memory = {"has_memory": True} if has_memory else {}
        self.config = config
        self.num_layers = num_layers
        keys = jax.random.split(key, 1 if config.shared_layers else num_layers)

        def blocks(config: ModelConfig, keys: jax.Array) -> Any:
            return jax.vmap(lambda key: block(config, key=key, num_layers=num_layers, **memory))(keys)

        dense, others = self.layers_of_groups if self.is_mixed else ((), None)
        # One block whose arrays have a leading layer axis, or what ``unstack`` puts in its place.
        self.blocks: Any = blocks(config, keys if others is None else keys[jnp.asarray(others)])
        without_experts = dataclasses.replace(config, moe=None, layer_pattern=()) if dense else config
        self.dense_blocks: Any = nnx.data(blocks(without_experts, keys[jnp.asarray(dense)]) if dense else None)
        # The weights of a learned position encoding, which the layers share. Checkpoints use this
        # name.
        self.relative = nnx.data(position_encoding(config).attention_weights(
            config, key=jax.random.fold_in(key, num_layers), is_causal=is_causal))

    @property
    def is_mixed(self) -> bool:
        """Whether some layers have experts and others do not."""
        return self.config.moe is not None and len(self.config.moe.layers(self.config)) < self.num_layers

    @property
    def layers_of_groups(self) -> tuple[tuple[int, ...], ...]:
        """The layers whose weights have the same structure: those without experts before those with
        experts, if both exist."""
        every = tuple(range(self.num_layers))
        if self.config.moe is None or not self.is_mixed:
            return (every,)
        experts = self.config.moe.layers(self.config)
        return tuple(layer for layer in every if layer not in experts), experts

    def block_of(self, layer: int) -> Any:
        """Returns the block of one layer.

        Args:
          layer: The index of the layer.

        Returns:
          The block, whose arrays have no axis of layers.
        """
        if isinstance(self.blocks, nnx.List):
            return self.blocks[layer]
        is_dense = self.is_mixed and layer in self.layers_of_groups[0]
        layers = self.layers_of_groups[0 if is_dense else -1]
        index = 0 if self.config.shared_layers else layers.index(layer)
        return jax.tree.map(operator.itemgetter(index), self.dense_blocks if is_dense else self.blocks)

    def __call__(self, x_BTD: Float[Array, "B T D"], context: AttentionContext, *, cache: KVCache | None = None,
                 key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> tuple[jax.Array, LayerTrace, KVCache | None]:
        """Applies all layers.

        Args:
          x_BTD: The embeddings ``[B, T, D]``.
          context: The inputs of attention that all layers share.
          cache: The keys and values of earlier tokens.
          key: The PRNG key of dropout. ``None`` switches dropout off.
          intervene: Reads and changes intermediate values, see ``transformer_jax.nn.sites``.

        Returns:
          The final residual stream ``[B, T, D]``, the traces of the layers stacked on a leading
          axis, and the cache with the new keys and values (``None`` without a cache).

        Raises:
          ValueError: The stack is in the form for decoding, and there is no cache.
        """
        x_BTD, traces, cache = self._layers(x_BTD, context, cache, key, intervene)
        return Sites(intervene, self.num_layers - 1)("final", x_BTD), traces, cache

    def _layers(self, x_BTD, context, cache, key, intervene):
        """Applies all layers, without the intervention at the site "final"."""
        if getattr(context.bias, "materialize_once", False):
            T, S = x_BTD.shape[1], x_BTD.shape[1] if cache is None else cache.capacity
            if T * S <= _MOST_BIASES:
                bias = context.bias.materialize(T, S)
                context = context.map(lambda own: dataclasses.replace(own, bias=bias))
        if cache is not None:
            return self._with_cache(x_BTD, context, cache, key, intervene)
        if isinstance(self.blocks, nnx.List):
            raise ValueError("this model is in the form for decoding (tj.prepare_for_decoding), which only generate, "
                             "stream and beam_search can use; a forward pass without a cache, such as this one, needs "
                             "the original model")

        def layer(context: AttentionContext, x_BTD: jax.Array,
                  block_and_index: tuple[Block, jax.Array]) -> tuple[jax.Array, LayerTrace]:
            block, index = block_and_index
            if self.config.shared_layers:
                block = jax.tree.map(lambda leaf: leaf[0], self.blocks)
            # Without this constraint the compiler may replicate every activation over the mesh axes
            # that shard the weights.
            x_BTD = checkpoint_name(constrain(x_BTD, "batch", "sequence", None), LAYER_INPUT)
            x_BTD, trace, _ = block(x_BTD, context, index, key=key, intervene=intervene)
            return x_BTD, trace

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.config.remat])
        steps = [functools.partial(layer, place) for place in context.places or (context,)]
        if self.is_mixed:
            return *self._mixed_layers(x_BTD, steps), None
        blocks = None if self.config.shared_layers else self.blocks
        x_BTD, traces = scan_by_period(steps, x_BTD, (blocks, jnp.arange(self.num_layers)),
                                       unroll=self.config.unroll)
        return x_BTD, traces, None

    def _mixed_layers(self, x_BTD: jax.Array, steps: list[Callable]) -> tuple[jax.Array, LayerTrace]:
        """Applies layers of which only some have experts."""
        dense, experts = self.layers_of_groups
        groups = [(self.dense_blocks, jnp.asarray(dense)), (self.blocks, jnp.asarray(experts))]
        first = experts[0] if experts == tuple(range(experts[0], self.num_layers)) else 0
        if first:  # the dense layers come before those with experts, and each kind has its own scan
            later = [steps[(first + place) % len(steps)] for place in range(len(steps))]
            x_BTD, dense_traces = scan_by_period(steps, x_BTD, groups[0], unroll=self.config.unroll)
            x_BTD, traces = scan_by_period(later, x_BTD, groups[1], unroll=self.config.unroll)
            return x_BTD, joined_traces((dense_traces, traces), self.layers_of_groups)
        kinds = [int(place in experts) for place in range(len(steps))]
        x_BTD, traces = scan_groups(steps, kinds, x_BTD, groups, unroll=self.config.unroll)
        return x_BTD, joined_traces(traces, self.layers_of_groups)

    def project_memory(self, memory_BSD: Float[Array, "B S D"]) -> list[tuple[jax.Array, jax.Array]]:
        """Computes the keys and values of cross-attention for every layer.

        Args:
          memory_BSD: The encoder's output ``[B, S, D]``.

        Returns:
          For each layer, keys and values ``[B, S, K, H]``.
        """
        return [block.cross_attention.project_memory(memory_BSD) for block in self._separate_blocks()]

    def _separate_blocks(self) -> Iterable[Any]:
        """Returns one block for each layer."""
        return self.blocks if isinstance(self.blocks, nnx.List) else unstack(self).blocks

    def _with_cache(self, x_BTD, context, cache, key, intervene):
        """Applies all layers with a cache."""
        # This is a Python loop, because each layer then updates its own cache array in place. Also,
        # decoding passes blocks that are already separate (see unstack), and a scan would stack
        # them again.
        traces = []
        for index, block in enumerate(self._separate_blocks()):
            x_BTD, trace, cache = block(x_BTD, context.of_layer(index), index, cache=cache, key=key,
                                        intervene=intervene)
            traces.append(trace)
        stacked = [jax.tree.map(lambda *layers: jnp.stack(layers), *(traces[layer] for layer in layers))
                   for layers in self.layers_of_groups]
        return x_BTD, joined_traces(stacked, self.layers_of_groups), cache


def _check_makes_blocks(block: object) -> None:
    """Raises an error if a stack cannot make blocks with ``block``."""
    if not callable(block) or (isinstance(block, type) and not issubclass(block, nnx.Module)):
        raise TypeError(f"block={block!r} cannot make the block of a layer; expected a subclass of nnx.Module, or a "
                        "function that makes one from (config, *, key, num_layers)")


def rows_at_a_time(num_rows: int, num_tokens: int) -> int | None:
    """Chooses how many rows of a large batch to apply all layers to at a time.

    On a CPU, the activations of few rows stay in its caches, while a large batch waits for memory.

    Args:
      num_rows: The number of rows of the batch.
      num_tokens: The number of tokens of each row.

    Returns:
      The number of rows, which divides ``num_rows``; ``None`` means all rows together.
    """
    if platform() != "cpu" or is_sharded() or num_rows * num_tokens <= _CACHED_TOKENS:
        return None
    rows = max((n for n in range(1, num_rows) if num_rows % n == 0 and n * num_tokens <= _CACHED_TOKENS), default=0)
    return rows if rows * num_tokens >= _CACHED_TOKENS // 4 else None


def by_rows(apply: Callable[..., tuple[jax.Array, LayerTrace]], rows: int, stack: Stack, x_BTD: Float[Array, "B T D"],
            *inputs: jax.Array | None) -> tuple[jax.Array, LayerTrace]:
    """Applies a stack to a batch in parts of a few rows.

    The gradient is computed for all rows together, because in parts it would add to the gradient of
    all weights once for each part.

    Args:
      apply: ``apply(stack, x_BTD, *inputs)`` returns the residual stream and the traces.
      rows: The number of rows in each part, which must divide B.
      stack: The stack.
      x_BTD: The embeddings ``[B, T, D]``.
      *inputs: More inputs ``[B, ...]``.

    Returns:
      The residual stream and the traces of all rows.
    """
    @jax.custom_jvp
    def in_parts(stack: Stack, x_BTD: jax.Array, *inputs: jax.Array | None) -> tuple[jax.Array, LayerTrace]:
        x_NBTD, layers = jax.lax.map(lambda some: apply(stack, *some), jax.tree.map(
            lambda a: a.reshape(-1, rows, *a.shape[1:]), (x_BTD, *inputs)))
        return x_NBTD.reshape(x_BTD.shape), jax.tree.map(
            lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1, *a.shape[3:]), layers)

    in_parts.defjvp(functools.partial(jax.jvp, apply))
    return in_parts(stack, x_BTD, *inputs)


def unstack(stack: Stack) -> Stack:
    """Converts a stack to the form in which decoding token by token reads weights fastest.

    The result has a separate block for each layer, in the form of its ``for_single_tokens``. Call
    this function once, outside of the decoding loop; inside, every token would copy the weights.

    Args:
      stack: A stack whose weights are stacked.

    Returns:
      A new stack that computes the same function. It works only with a cache.
    """
    result = jax.tree.map(lambda x: x, stack)
    result.blocks = nnx.List([prepared(stack.block_of(layer)) for layer in range(stack.num_layers)])
    result.dense_blocks = None
    return result
