"""A forward pass in which every receiver reads its own mix of the outputs of earlier nodes.

The batch holds several runs one after another: the run that is edited, and the clean and the
corrupted run. An edge of weight w adds w times the difference between the sender's output in the
corrupted run and in the run that it is taken from. With all weights 1 the edited run is the
corrupted run, and with all weights 0 it is the clean one. Post-norm models fulfil this too, because
every output passes the norms after it with the scale that the norm has in its run.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import nnx

from transformer_jax.inspection.circuits.graph import EdgeGraph, StackShape
from transformer_jax.inspection.parts import LanguageModel, stack_of
from transformer_jax.nn.attention import Attention, AttentionContext
from transformer_jax.nn.blocks import Block, LayerTrace
from transformer_jax.nn.layers import Norm
from transformer_jax.nn.scanning import scan_by_period
from transformer_jax.nn.stack import Stack


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream of all runs, as a sum of the outputs of the nodes before it.

    Attributes:
      total: the stream ``[runs * B, T, D]``.
      parts: the part that each sender added to it, ``[U, runs * B, T, D]``, zero for senders that
        come later. The first one also holds the biases that belong to no head.
    """

    total: jax.Array
    parts: jax.Array

    def read(self, weights_RU: jax.Array, num_rows: int) -> jax.Array:
        """Returns what receivers read, ``[R, runs * B, T, D]``, if the edges have these weights."""
        B = num_rows
        difference_UBTD = self.parts[:, -B:] - self.parts[:, -2 * B:-B]
        mixed_RBTD = jnp.tensordot(weights_RU, difference_UBTD, 1)
        read = jnp.broadcast_to(self.total, (len(weights_RU), *self.total.shape))
        return read.at[:, :B].add(mixed_RBTD.astype(read.dtype))

    def add(self, output_BTD: jax.Array, parts: jax.Array, first: jax.Array | int) -> Stream:
        """Returns the stream after the output of nodes, of which the first has this index."""
        updated = jax.lax.dynamic_update_slice_in_dim(self.parts, parts.astype(self.parts.dtype), first, 0)
        rest = output_BTD - parts.sum(0)
        return Stream(self.total + output_BTD, updated.at[0].add(rest.astype(updated.dtype)))

    def normalized(self, norm: Any) -> Stream:
        """Returns the stream after the norm of a post-norm model."""
        x = self.total.astype(jnp.float32)
        parts = self.parts.astype(jnp.float32)
        if norm.kind != "rmsnorm":
            x, parts = (y - y.mean(-1, keepdims=True) for y in (x, parts))
        parts *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + norm.epsilon)
        if norm.scale is not None:
            parts *= norm.scale[...].astype(jnp.float32)
        if norm.bias is not None:
            parts = parts.at[0].add(norm.bias[...].astype(jnp.float32))
        return Stream(norm(self.total), parts.astype(self.parts.dtype))


class EdgeStack(nnx.Module):
    """A stack of layers whose nodes read weighted edges; it takes the place of a model's stack."""

    def __init__(self, stack: Stack, shape: StackShape, weights: dict[str, jax.Array], num_rows: int,
                 mix: jax.Array | None, memory: tuple[Stream, Norm | None] | None = None):
        self.blocks, self.relative = stack.blocks, stack.relative
        self.shape, self.num_rows = shape, num_rows
        self.weights, self.mix, self.memory = nnx.data(weights), nnx.data(mix), nnx.data(memory)

    def __call__(self, x_BTD: jax.Array, context: AttentionContext, **_: Any) -> tuple[jax.Array, LayerTrace, None]:
        """Applies the layers, and returns what the logits read (in an encoder that has a decoder,
        the stream itself) and the parts of the stream in place of a trace."""
        B, (weights, logits_U) = self.num_rows, (self.weights["layers"], self.weights.get("logits"))
        if self.mix is not None:
            x_BTD = x_BTD.at[:B].set(x_BTD[B:2 * B] + self.mix * (x_BTD[2 * B:] - x_BTD[B:2 * B]))
        num_senders = sum(1 for _ in self.shape.senders())
        parts = jnp.zeros((num_senders, *x_BTD.shape), x_BTD.dtype).at[0].set(x_BTD)

        def layer(context: AttentionContext, stream: Stream, inputs: Any) -> tuple[Stream, None]:
            block, index, weights_RU, memory_RU = inputs
            return self._layer(stream, block, index, context, weights_RU, memory_RU), None

        steps = [functools.partial(jax.checkpoint(layer), place) for place in context.places or (context,)]
        stream, _ = scan_by_period(steps, Stream(x_BTD, parts), (
            self.blocks, jnp.arange(self.shape.num_layers), weights, self.weights.get("memory")))
        final = stream.total if logits_U is None else stream.read(logits_U[None], B)[0]
        nothing: Any = None  # only the parts are read
        return final, LayerTrace(residual=stream.parts, queries=nothing, keys=nothing, values=nothing,
                                 head_output=nothing, attention_output=nothing, mlp_output=nothing, bias=nothing), None

    def _layer(self, stream: Stream, block: Block, index: jax.Array, context: AttentionContext,
               weights_RU: jax.Array, memory_RU: jax.Array | None) -> Stream:
        """Applies one layer to the stream."""
        N, K, B = self.shape.num_heads, self.shape.num_kv_heads, self.num_rows
        pre, attention = block.config.norm_position == "pre", block.attention
        place = 1 + index * (N * (2 if self.shape.has_memory else 1) + 1)
        before = stream

        def normed(read: jax.Array, norm: Norm | None) -> jax.Array:
            return norm(read) if pre and norm is not None else read

        read = block.read_by_attention(stream.read(weights_RU[:N + 2 * K], B), index)
        q, k, v = (_own_heads(lambda x, which=which: attention.project(x, context)[which], x_RBTD)
                   for which, x_RBTD in enumerate(jnp.split(read, (N, N + K))))
        stream = _attended(stream, attention, attention.attend(q, k, v, context.mask, context.bias, None), place)
        if self.shape.is_sequential and not pre:
            stream = stream.normalized(block.attention_norm)
        if memory_RU is not None:
            memory, memory_norm = cast(Any, self.memory)
            cross, cross_norm = cast(Any, (block.cross_attention, block.cross_norm))
            read = normed(stream.read(weights_RU[N + 2 * K:-1], B), cross_norm)
            q = _own_heads(cross.project_queries, read)
            read = memory.read(memory_RU, B)
            read = read if memory_norm is None else memory_norm(read)
            k, v = (_own_heads(lambda x, which=which: cross.project_memory(x)[which], x_RBSD)
                    for which, x_RBSD in enumerate(jnp.split(read, 2)))
            stream = _attended(stream, cross, cross.attend(q, k, v, context.memory_mask, None, None), place + N)
            stream = stream if pre else stream.normalized(cross_norm)
        source = stream if self.shape.is_sequential else before
        norm = block.attention_norm if block.mlp_norm is None else block.mlp_norm
        output_BTD = block.mlp(normed(source.read(weights_RU[-1:], B)[0], norm))
        stream = stream.add(output_BTD, output_BTD[None], place + N * (2 if self.shape.has_memory else 1))
        return stream if pre else stream.normalized(norm)


def _own_heads(project: Any, x_RBTD: jax.Array) -> jax.Array:
    """Projects what each head reads, and returns ``[B, T, R, H]``, each head from its own input."""
    return jax.vmap(lambda x_BTD, head: project(x_BTD)[:, :, head], out_axes=2)(x_RBTD, jnp.arange(len(x_RBTD)))


def _attended(stream: Stream, attention: Attention, heads_BTNH: jax.Array, first: jax.Array) -> Stream:
    """Adds the outputs of heads to the stream, each as a part of its own."""
    N, H = heads_BTNH.shape[2:]
    kernel_NHD = attention.output.kernel[...].astype(heads_BTNH.dtype).reshape(N, H, -1)
    return stream.add(attention.merge(heads_BTNH), jnp.einsum("BTNH,NHD->NBTD", heads_BTNH, kernel_NHD), first)


def edited_logits(model: LanguageModel, graph: EdgeGraph, runs: list[tuple[Any, ...]],
                  options: dict[str, Any], weights_VU: jax.Array, mix: jax.Array | None = None) -> jax.Array:
    """Computes the logits of the edited run.

    Args:
      model: the model.
      graph: its graph.
      runs: the tokens of the runs, clean and corrupted.
      options: further arrays of the model's call, for one run.
      weights_VU: the weight of each edge, ``[V, U]``; 1 reads the corrupted run.
      mix: ``None`` to edit the clean run itself. With a number, the edited run starts from
        embeddings at this part of the way from clean to corrupted, and an edge adds the difference
        between the corrupted and the clean run.

    Returns:
      The logits ``[B, T, V]``.
    """
    num_rows = runs[0][-1].shape[0]
    runs = runs if mix is None else [runs[0], *runs]
    tokens = [jnp.concatenate(parts) for parts in zip(*runs, strict=True)]
    options = {name: jnp.concatenate([value] * len(runs)) if value.shape[0] == num_rows else value
               for name, value in options.items()}
    weights_VU = jnp.where(graph.allowed_VU, weights_VU, 0.0)
    *others, own = graph.stacks
    first_row = first_column = columns = 0
    weights: dict[str, dict[str, jax.Array]] = {}
    for shape in graph.stacks:
        rows, columns = sum(1 for _ in shape.receivers()), sum(1 for _ in shape.senders())
        block = weights_VU[first_row:first_row + rows, first_column:first_column + columns]
        weights[shape.kind] = {"layers": block.reshape(shape.num_layers, -1, columns)}
        first_row, first_column = first_row + rows, first_column + columns
    weights[own.kind]["logits"] = weights_VU[-1, -columns:]

    edited: Any = jax.tree.map(lambda leaf: leaf, model)
    if not others:
        edited.stack = EdgeStack(stack_of(model, own.kind), own, weights[own.kind], num_rows, mix)
        # With an intervention, an encoder does not split the batch, which would separate the runs.
        return edited(*tokens, **options, intervene=_leave_unchanged).logits[:num_rows]
    edited.encoder = EdgeStack(edited.encoder, others[0], weights["encoder"], num_rows, mix)
    memory = edited.encode(tokens[0], segment_ids_BS=options.get("source_segment_ids_BS"))
    num_sources = sum(1 for _ in others[0].senders())
    weights["self"]["memory"] = weights_VU[first_row:-1, :num_sources].reshape(own.num_layers, -1, num_sources)
    read = Stream(memory.trace.final, memory.trace.layers.residual)
    edited.decoder = EdgeStack(edited.decoder, own, weights["self"], num_rows, mix, (read, edited.encoder_norm))
    return edited.decode(tokens[1], memory, segment_ids_BT=options.get("target_segment_ids_BT")).logits[:num_rows]


def _leave_unchanged(site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
    """An intervention that changes nothing."""
    return value
