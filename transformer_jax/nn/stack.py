"""Layers as one pytree with a leading layer axis, applied by a scan."""

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

from transformer_jax.config import ModelConfig
from transformer_jax.nn.attention import AttentionContext, RelativePositions
from transformer_jax.nn.blocks import Block, LayerTrace, prepared
from transformer_jax.nn.cache import KVCache
from transformer_jax.nn.layers import LAYER_INPUT, LINEAR_OUTPUT
from transformer_jax.nn.sites import Intervene, Sites
from transformer_jax.ops.attention import platform
from transformer_jax.ops.positions import RelativeBias
from transformer_jax.sharding import constrain, is_divided

_REMAT_POLICIES: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.save_only_these_names(LINEAR_OUTPUT),
    "full": None,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=[LAYER_INPUT, LINEAR_OUTPUT], offload_src="device",
        offload_dst="pinned_host"),
}
# Up to so many for each head, learned biases are looked up once for all layers; else by each layer,
# as it needs them.
_MOST_BIASES = 1 << 22
_CACHED_TOKENS = 2048

# Makes the block of one layer: (config, *, key, num_layers), and has_memory=True in the decoder of
# an encoder-decoder.
MakeBlock = Callable[..., Any]


class Stack(nnx.Module):
    """Blocks whose weights share arrays ``[L, ...]``, so that compile time does not grow with
    depth."""

    def __init__(self, config: ModelConfig, *, key: jax.Array, num_layers: int, is_causal: bool,
                 has_memory: bool = False, block: MakeBlock = Block):
        memory = {"has_memory": True} if has_memory else {}
        self.config = config
        self.num_layers = num_layers
        self.blocks = jax.vmap(lambda key: block(config, key=key, num_layers=num_layers, **memory))(
            jax.random.split(key, num_layers))
        self.relative = (RelativePositions(config, key=jax.random.fold_in(key, num_layers), is_causal=is_causal)
                         if config.positions == "relative" else None)

    def __call__(self, x_BTD: jax.Array, context: AttentionContext, *, cache: KVCache | None = None,
                 key: jax.Array | None = None,
                 intervene: Intervene | None = None) -> tuple[jax.Array, LayerTrace, KVCache | None]:
        """The final stream, the layers' traces stacked on a leading axis, and the extended
        cache."""
        x_BTD, traces, cache = self._layers(x_BTD, context, cache, key, intervene)
        return Sites(intervene, self.num_layers - 1)("final", x_BTD), traces, cache

    def _layers(self, x_BTD, context, cache, key, intervene):
        if isinstance(context.bias, RelativeBias):
            T, S = x_BTD.shape[1], x_BTD.shape[1] if cache is None else cache.capacity
            if T * S <= _MOST_BIASES:
                context = dataclasses.replace(context, bias=context.bias.materialize(T, S))
        if cache is not None:
            return self._with_cache(x_BTD, context, cache, key, intervene)

        def layer(x_BTD: jax.Array, block_and_index: tuple[Block, jax.Array]) -> tuple[jax.Array, LayerTrace]:
            block, index = block_and_index
            # Without it the compiler may replicate every activation over the axes that divide the
            # weights.
            x_BTD = checkpoint_name(constrain(x_BTD, "batch", "sequence", None), LAYER_INPUT)
            x_BTD, trace, _ = block(x_BTD, context, index, key=key, intervene=intervene)
            return x_BTD, trace

        if self.config.remat != "none":
            layer = jax.checkpoint(layer, policy=_REMAT_POLICIES[self.config.remat])
        x_BTD, traces = jax.lax.scan(layer, x_BTD, (self.blocks, jnp.arange(self.num_layers)),
                                     unroll=min(self.config.unroll, self.num_layers))
        return x_BTD, traces, None

    def project_memory(self, memory_BSD: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
        """Keys and values ``[B, S, K, H]`` of an encoder's output, for every layer."""
        return [block.cross_attention.project_memory(memory_BSD) for block in self._separate_blocks()]

    def _separate_blocks(self) -> Iterable[Any]:
        return self.blocks if isinstance(self.blocks, nnx.List) else unstack(self).blocks

    def _with_cache(self, x_BTD, context, cache, key, intervene):
        # A loop in Python: each layer writes its own cache array in place, and decoding hands in
        # blocks that are already separate (see unstack), which a scan could only join again.
        traces = []
        for index, block in enumerate(self._separate_blocks()):
            x_BTD, trace, cache = block(x_BTD, context, index, cache=cache, key=key, intervene=intervene)
            traces.append(trace)
        return x_BTD, jax.tree.map(lambda *layers: jnp.stack(layers), *traces), cache


def rows_at_a_time(num_rows: int, num_tokens: int) -> int | None:
    """How many rows of a large batch go through all layers before the next do; ``None``: all
    together.

    On a CPU, whose caches hold what some thousand tokens are in a layer: a large batch waits for
    memory instead.
    """
    if platform() != "cpu" or is_divided() or num_rows * num_tokens <= _CACHED_TOKENS:
        return None
    rows = max((n for n in range(1, num_rows) if num_rows % n == 0 and n * num_tokens <= _CACHED_TOKENS), default=0)
    return rows if rows * num_tokens >= _CACHED_TOKENS // 4 else None


def by_rows(apply: Callable[..., tuple[jax.Array, LayerTrace]], rows: int, stack: Stack, x_BTD: jax.Array,
            *inputs: jax.Array | None) -> tuple[jax.Array, LayerTrace]:
    """``apply(stack, x_BTD, *inputs)``, the stream and the traces, so many rows at a time; inputs
    are ``[B, ...]``.

    A gradient is that of all rows together: it would add up those of the weights once a part.
    """
    @jax.custom_vjp
    def in_parts(stack: Stack, x_BTD: jax.Array, *inputs: jax.Array | None) -> tuple[jax.Array, LayerTrace]:
        x_NBTD, layers = jax.lax.map(lambda some: apply(stack, *some), jax.tree.map(
            lambda a: a.reshape(-1, rows, *a.shape[1:]), (x_BTD, *inputs)))
        return x_NBTD.reshape(x_BTD.shape), jax.tree.map(
            lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1, *a.shape[3:]), layers)

    in_parts.defvjp(functools.partial(jax.vjp, apply), lambda pull_back, gradient: pull_back(gradient))
    return in_parts(stack, x_BTD, *inputs)


def unstack(stack: Stack) -> Stack:
    """The same stack in the form in which a token loop reads weights fastest.

    One block a layer, each in the form that its ``for_single_tokens`` gives. To be made once,
    outside the loop: inside, every token would copy what it reads.
    """
    result = jax.tree.map(lambda x: x, stack)
    result.blocks = nnx.List([prepared(jax.tree.map(operator.itemgetter(layer), stack.blocks))
                              for layer in range(stack.num_layers)])
    return result
