"""Direct logit attribution: write a logit as the sum of the contributions of the model's parts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.inspection.parts import (
    LanguageModel,
    as_ids,
    blocks_of,
    check_kind,
    output_kernel,
    stack_of,
    stream_of,
    trace_of,
    vocab_size,
)
from transformer_jax.models.functional import check_tokens
from transformer_jax.models.output import Index, PairTrace, Trace, resolve
from transformer_jax.nn.attention import Attention
from transformer_jax.nn.blocks import LayerTrace
from transformer_jax.nn.layers import Norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Attribution:
    """The contributions of a model's parts to logits, in float32, for rows B and positions P.

    Attributes:
      embeddings: the contribution of the token and position embeddings, ``[B, P]``.
      heads: the contribution of each self-attention head, ``[L, B, P, N]``.
      cross_heads: the contribution of each cross-attention head, ``[L, B, P, N]``; ``None`` for a
        model without cross-attention.
      mlp: the contribution of each feed-forward layer, ``[L, B, P]``.
      bias: the summed contribution of all biases: those of norms, of attention output projections,
        of the logits, and of an encoder's prediction head, ``[B, P]``.
    """

    embeddings: Float[Array, "*B_P"]
    heads: Float[Array, "L ... N"]
    cross_heads: Float[Array, "L ... N"] | None
    mlp: Float[Array, "L ..."]
    bias: Float[Array, "*B_P"]

    @property
    def total(self) -> Float[Array, "*B_P"]:
        """The sum of all contributions, which equals the logit, ``[B, P]``."""
        cross = 0.0 if self.cross_heads is None else self.cross_heads.sum((0, -1))
        return self.embeddings + self.heads.sum((0, -1)) + cross + self.mlp.sum(0) + self.bias


def direct_logit_attribution(model: LanguageModel, trace: Trace | PairTrace,
                             targets_BP: Int[Array | np.ndarray, "B P"] | Sequence[Sequence[int]], *,
                             positions: Index = None) -> Attribution:
    """Computes how much each head, feed-forward layer and embedding adds directly to a logit.

    "Directly" means through the residual stream alone, not through later layers. The function
    propagates the logit's direction back through the final norm (in post-norm models, through every
    norm). It keeps the scale of each norm fixed at its value in this forward pass, so everything is
    linear and the contributions sum to the logit. In an encoder's prediction head, it keeps the
    factor P(normal <= x) of the GELU, x * P(normal <= x), fixed in the same way. If the model caps
    its logits (``config.limits.logits``), the contributions sum to the logit before the cap.

    Source: Elhage et al. (2021); nostalgebraist (2020); the frozen scale: Wang et al. (2022),
      section 3.

    Args:
      model: the model.
      trace: the trace of its forward pass without interventions. For an encoder-decoder, the
        function reads the residual stream of the decoder.
      targets_BP: for each row and position, the id of the token whose logit is explained. To
        explain the difference of two logits, subtract two attributions.
      positions: one position or several; ``None`` for all. Negative positions count from the end.

    Returns:
      The contributions of all parts, in float32.

    Raises:
      ValueError: if a position is out of range, or if the targets are not token ids ``[B, P]``.
    """
    check_kind(model, "self")
    final_BTD = stream_of(trace)
    rows = resolve("positions", positions, final_BTD.shape[1])[0]
    targets = targets_BP if isinstance(targets_BP, jax.Array) else as_ids(targets_BP)
    if not np.issubdtype(targets.dtype, np.integer):
        raise ValueError(f"targets_BP is of type {targets.dtype}; expected the ids of tokens")
    if targets.shape != (final_BTD.shape[0], rows.size):
        raise ValueError(f"targets_BP has shape {targets.shape}; expected {(final_BTD.shape[0], rows.size)}, one "
                         "token id for each row and position")
    check_tokens(targets, vocab_size(model))
    return _attribute(model, trace, jnp.asarray(targets), jnp.asarray(rows))


class _Layer(NamedTuple):
    """The values of one layer's trace that the attribution needs, at the positions ``P``."""

    residual: jax.Array
    head_output: jax.Array
    attention_output: jax.Array
    mlp_output: jax.Array | None
    cross: Any = None  # the same values for cross-attention


@jax.jit
def _attribute(model: LanguageModel, trace: Trace | PairTrace, targets_BP: jax.Array, rows: jax.Array) -> Attribution:
    """Computes the contributions layer by layer, from the last layer to the first."""
    layers = _at(trace_of(trace, "self").layers, rows)
    if "cross" in trace.parts():
        layers = layers._replace(cross=_at(trace_of(trace, "cross").layers, rows))
    direction_BPD, bias_BP = _direction(model, stream_of(trace)[:, rows], targets_BP)
    is_post = model.config.norm_position == "post"

    def layer(state: tuple[jax.Array, jax.Array], item: Any) -> tuple[Any, Any]:
        block, traced, kernel_NHD, cross_kernel_NHD = item
        outputs = [(block.attention_norm, traced.attention_output), (block.mlp_norm, traced.mlp_output)]
        if traced.cross is not None:
            outputs.insert(1, (block.cross_norm, traced.cross.attention_output))
        stream, norms = traced.residual, []  # the residual stream so far, and each norm with its input
        for norm, output in outputs:
            norms.append((norm, stream + output))
            stream = norm(stream + output) if is_post else stream + output

        def before_norm(direction: jax.Array, bias: jax.Array) -> tuple[jax.Array, jax.Array]:
            norm, read = norms.pop()
            return _through(norm, read, direction, bias) if is_post else (direction, bias)

        direction, bias = before_norm(*state)
        mlp, cross = _dot(traced.mlp_output, direction), None
        if traced.cross is not None:
            direction, bias = before_norm(direction, bias)
            cross, bias = _heads(block.cross_attention, cross_kernel_NHD, traced.cross, direction, bias)
        direction, bias = before_norm(direction, bias)
        if getattr(block, "attention_output_norm", None) is not None:
            merged = block.attention.merge(traced.head_output)
            direction_of_heads, bias = _through(block.attention_output_norm, merged, direction, bias)
        else:
            direction_of_heads = direction
        heads, bias = _heads(block.attention, kernel_NHD, traced, direction_of_heads, bias)
        return (direction, bias), (heads, cross, mlp)

    blocks = blocks_of(stack_of(model, "self"))
    kernels = (output_kernel(blocks.attention),
               None if layers.cross is None else output_kernel(blocks.cross_attention))
    (direction_BPD, bias_BP), (heads, cross, mlp) = jax.lax.scan(
        layer, (direction_BPD, bias_BP), (blocks, layers, *kernels), reverse=True)
    return Attribution(embeddings=_dot(layers.residual[0], direction_BPD), heads=heads, cross_heads=cross, mlp=mlp,
                       bias=bias_BP)


def _at(layers: LayerTrace, rows: jax.Array) -> _Layer:
    """Selects the values of all layers at the given positions."""
    return _Layer(layers.residual[:, :, rows], layers.head_output[:, :, rows], layers.attention_output[:, :, rows],
                  None if layers.mlp_output is None else layers.mlp_output[:, :, rows])


def _direction(model: LanguageModel, stream_BPD: jax.Array, targets_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the direction in the final residual stream whose dot product is the logit, and the
    contribution of the biases."""
    embeddings = model.embeddings
    direction = embeddings.read(embeddings.unembedding_VD[targets_BP].astype(jnp.float32))
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
    """Propagates a direction back through a norm of x with a fixed scale, so that
    norm(x) . d = x . d' + b . d."""
    if norm.bias is not None:
        bias_BP = bias_BP + direction_BPD @ norm.bias[...].astype(jnp.float32)
    x_BPD = x_BPD.astype(jnp.float32)
    if (factor_D := norm.factor()) is not None:
        direction_BPD = direction_BPD * factor_D
    if norm.subtracts_mean:  # subtracting the mean is a symmetric linear map
        x_BPD, direction_BPD = (y - y.mean(-1, keepdims=True) for y in (x_BPD, direction_BPD))
    return direction_BPD * jax.lax.rsqrt(jnp.square(x_BPD).mean(-1, keepdims=True) + norm.epsilon), bias_BP


def _heads(attention: Attention, kernel_NHD: jax.Array, traced: _Layer, direction_BPD: jax.Array,
           bias_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the contribution of each head, ``[B, P, N]``, and ``bias_BP`` with the contribution
    of the output projection's bias added."""
    if attention.output.bias is not None:
        bias_BP = bias_BP + direction_BPD @ attention.output.bias[...].astype(jnp.float32)
    read_BPNH = jnp.einsum("BPD,NHD->BPNH", direction_BPD, kernel_NHD)
    return (traced.head_output.astype(jnp.float32) * read_BPNH).sum(-1), bias_BP


def _dot(x_BPD: jax.Array, direction_BPD: jax.Array) -> jax.Array:
    """Returns the dot product of the last axes, in float32."""
    return (x_BPD.astype(jnp.float32) * direction_BPD).sum(-1)
