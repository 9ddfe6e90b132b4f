"""Direct logit attribution: a logit as the sum of what each part of the model wrote for it."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from transformer_jax.inspection.parts import output_kernel, stack_of, trace_of
from transformer_jax.models.functional import Model
from transformer_jax.models.output import Index, PairTrace, Trace, resolve
from transformer_jax.nn.attention import Attention
from transformer_jax.nn.blocks import Block, LayerTrace
from transformer_jax.nn.layers import Norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attribution:
    """The parts of logits; in float32, over rows B and positions P.

    Attributes:
      embeddings: of the embeddings, with positions ``[B, P]``.
      heads: of each head of self-attention ``[L, B, P, N]``.
      cross_heads: of each head of attention to the source ``[L, B, P, N]``; ``None`` without an
        encoder.
      mlp: of each feed-forward layer ``[L, B, P]``.
      bias: of the biases of norms, of attention's output projections, of logits and of an encoder's
        head ``[B, P]``.
    """

    embeddings: jax.Array
    heads: jax.Array
    cross_heads: jax.Array | None
    mlp: jax.Array
    bias: jax.Array

    @property
    def total(self) -> jax.Array:
        """The sum of the parts, which is the logit ``[B, P]``."""
        cross = 0.0 if self.cross_heads is None else self.cross_heads.sum((0, -1))
        return self.embeddings + self.heads.sum((0, -1)) + cross + self.mlp.sum(0) + self.bias


def direct_logit_attribution(model: Model, trace: Trace | PairTrace, targets_BP: jax.Array, *,
                             positions: Index = None) -> Attribution:
    """What each head, feed-forward layer and embedding adds to a logit, by way of the residual
    stream alone.

    The logit's direction is taken back through the last norm (and, in post-norm models, through
    every norm), each with its scale as it was in this pass: then everything is linear, and the
    parts sum to the logit. In an encoder's head the GELU, x * P(normal <= x), is taken with its
    factor as it was.

    Source: Elhage et al. (2021); nostalgebraist (2020); the frozen scale: Wang et al. (2022),
      section 3.

    Args:
      model: the model.
      trace: of its forward pass without interventions; of an encoder-decoder, the target's stream
        is read.
      targets_BP: the token whose logit is wanted, for each position; the difference of two
        attributions is that of the difference of two logits.
      positions: one or several, ``None`` for all; negative ones count from the end.

    Raises:
      ValueError: for a position that there is not, or targets that are not ``[B, P]``.
    """
    main = trace_of(trace, "self")
    rows = resolve("positions", positions, main.final.shape[1])[0]
    targets_BP = jnp.asarray(targets_BP)
    if targets_BP.shape != (main.final.shape[0], rows.size):
        raise ValueError(f"targets_BP has shape {targets_BP.shape}; expected {(main.final.shape[0], rows.size)}, a "
                         "token for each row and position")
    return _attribute(model, trace, targets_BP, rows)


@jax.jit
def _attribute(model: Model, trace: Trace | PairTrace, targets_BP: jax.Array, rows: jax.Array) -> Attribution:
    main = trace_of(trace, "self")
    layers = _at(main.layers, rows)
    if "cross" in trace.parts():
        layers = dataclasses.replace(layers, cross=_at(trace_of(trace, "cross").layers, rows))
    direction_BPD, bias_BP = _direction(model, main.final[:, rows], targets_BP)
    post = model.config.norm_position == "post"

    def layer(state: tuple[jax.Array, jax.Array], block_and_trace: tuple[Block, LayerTrace, jax.Array, jax.Array]):
        direction, bias = state
        block, seen, kernel_NHD, cross_kernel_NHD = block_and_trace
        cross = None
        middle = seen.residual + seen.attention_output  # the stream, as it grows
        if post:
            middle, before = block.attention_norm(middle), middle
        if seen.cross is not None:
            middle_cross = middle + seen.cross.attention_output
            if post:
                middle_cross, before_cross = block.cross_norm(middle_cross), middle_cross
        stream = middle if seen.cross is None else middle_cross
        if post:
            direction, bias = _through(block.mlp_norm, stream + seen.mlp_output, direction, bias)
        mlp = _dot(seen.mlp_output, direction)
        if seen.cross is not None:
            if post:
                direction, bias = _through(block.cross_norm, before_cross, direction, bias)
            cross, bias = _heads(block.cross_attention, cross_kernel_NHD, seen.cross, direction, bias)
        if post:
            direction, bias = _through(block.attention_norm, before, direction, bias)
        heads, bias = _heads(block.attention, kernel_NHD, seen, direction, bias)
        return (direction, bias), (heads, cross, mlp)

    blocks = stack_of(model, "self").blocks
    kernels = (output_kernel(blocks.attention),
               None if layers.cross is None else output_kernel(blocks.cross_attention))
    (direction_BPD, bias_BP), (heads, cross, mlp) = jax.lax.scan(
        layer, (direction_BPD, bias_BP), (blocks, layers, *kernels), reverse=True)
    return Attribution(embeddings=_dot(layers.residual[0], direction_BPD), heads=heads, cross_heads=cross, mlp=mlp,
                       bias=bias_BP)


def _at(layers: LayerTrace, rows: jax.Array) -> LayerTrace:
    """What is read of a trace, at some positions."""
    names = ("residual", "head_output", "attention_output", "mlp_output")
    kept = {name: None if getattr(layers, name) is None else getattr(layers, name)[:, :, rows] for name in names}
    return LayerTrace(**kept, queries=None, keys=None, values=None, bias=None)


def _direction(model: Model, stream_BPD: jax.Array, targets_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The direction of the last stream that the logit reads, and what biases add to it."""
    embeddings = model.embeddings
    direction = embeddings.unembedding_VD[targets_BP].astype(jnp.float32)
    if model.config.scale_logits:
        direction = direction / math.sqrt(model.config.model_dim)
    bias = jnp.zeros(targets_BP.shape, jnp.float32)
    if embeddings.output_bias is not None:
        bias += embeddings.output_bias[...].astype(jnp.float32)[targets_BP]
    norm, head = model.final_norm, model.prediction_head
    if head is not None:
        before = head.transform(stream_BPD if norm is None else norm(stream_BPD)).astype(jnp.float32)
        factor = 0.5 * (1.0 + jax.lax.erf(before * 0.5**0.5))  # gelu(x) = x * factor
        bias += head.bias[...].astype(jnp.float32)[targets_BP]
        direction, bias = _through(head.norm, before * factor, direction, bias)
        direction *= factor
        if head.transform.bias is not None:
            bias += direction @ head.transform.bias[...].astype(jnp.float32)
        direction @= head.transform.kernel[...].astype(jnp.float32).T
    return (direction, bias) if norm is None else _through(norm, stream_BPD, direction, bias)


def _through(norm: Norm, x_BPD: jax.Array, direction_BPD: jax.Array,
             bias_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The direction before a norm of x, its scale held: norm(x) . d = x . d' + b . d."""
    if norm.bias is not None:
        bias_BP = bias_BP + direction_BPD @ norm.bias[...].astype(jnp.float32)
    x_BPD = x_BPD.astype(jnp.float32)
    direction_BPD = direction_BPD * norm.scale[...].astype(jnp.float32)
    if norm.kind == "layernorm":  # centring is linear, and its own transpose
        x_BPD, direction_BPD = (y - y.mean(-1, keepdims=True) for y in (x_BPD, direction_BPD))
    return direction_BPD * jax.lax.rsqrt(jnp.square(x_BPD).mean(-1, keepdims=True) + norm.epsilon), bias_BP


def _heads(attention: Attention, kernel_NHD: jax.Array, seen: LayerTrace, direction_BPD: jax.Array,
           bias_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What each head adds ``[B, P, N]``, and the bias with that of the output projection."""
    if attention.output.bias is not None:
        bias_BP = bias_BP + direction_BPD @ attention.output.bias[...].astype(jnp.float32)
    read_BPNH = jnp.einsum("BPD,NHD->BPNH", direction_BPD, kernel_NHD)
    return (seen.head_output.astype(jnp.float32) * read_BPNH).sum(-1), bias_BP


def _dot(x_BPD: jax.Array, direction_BPD: jax.Array) -> jax.Array:
    return (x_BPD.astype(jnp.float32) * direction_BPD).sum(-1)
