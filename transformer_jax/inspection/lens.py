"""Lenses and attributions: what a layer already knows, and what a logit is made of."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from transformer_jax.inspection.interventions import patch
from transformer_jax.inspection.parts import (
    Tokens,
    attention_of,
    check_kind,
    checked_tokens,
    output_kernel,
    read_out,
    site,
    trace_of,
)
from transformer_jax.models.functional import Model
from transformer_jax.models.output import Index, PairTrace, Trace, resolve


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lens:
    """What would be predicted if the model ended before each layer.

    Attributes:
      ids: the most probable tokens, the first one first ``[L + 1, B, P, K]``; the last of the
        layers is the model's own prediction.
      probabilities: theirs, likewise.
    """

    ids: jax.Array
    probabilities: jax.Array


def logit_lens(model: Model, trace: Trace | PairTrace, *, positions: Index = None, top_k: int = 5) -> Lens:
    """The final norm and the unembedding on the residual stream before each layer and after the
    last.

    Source: nostalgebraist (2020), "interpreting GPT: the logit lens".

    Args:
      model: the model.
      trace: of its forward pass; of an encoder-decoder, the target's stream is read.
      positions: one or several, ``None`` for all; negative ones count from the end. One layer's
        ``[B, P, V]`` is held at a time.
      top_k: how many tokens.

    Raises:
      ValueError: for a position that there is not.
    """
    return _most_probable(model, *_places(trace, positions), top_k)


@functools.partial(jax.jit, static_argnums=3)
def _most_probable(model: Model, trace: Trace, places_P: jax.Array, top_k: int) -> Lens:
    def of_layer(stream_BPD: jax.Array) -> Lens:
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(read_out(model)(stream_BPD)), top_k)
        return Lens(ids, probabilities)

    return jax.lax.map(of_layer, trace.residual[:, :, places_P])


def target_logprobs(model: Model, trace: Trace | PairTrace,
                    targets_BP: Int[Array | np.ndarray, "B P"] | Sequence[Sequence[int]], *,
                    positions: Index = None) -> Float[Array, "layers B P"]:
    """log P of given tokens by :func:`logit_lens`, float32 ``[L + 1, B, P]``: at which layer the
    answer appears.

    Args:
      model: see :func:`logit_lens`; so are ``trace`` and ``positions``.
      trace: of its forward pass.
      targets_BP: a token for each position.
      positions: which.
    """
    return _logprobs(model, *_places(trace, positions), jnp.asarray(targets_BP))


@jax.jit
def _logprobs(model: Model, trace: Trace, places_P: jax.Array, targets_BP: jax.Array) -> jax.Array:
    def of_layer(stream_BPD: jax.Array) -> jax.Array:
        logits_BPV = read_out(model)(stream_BPD)
        chosen = jnp.take_along_axis(logits_BPV, targets_BP[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits_BPV, axis=-1)

    return jax.lax.map(of_layer, trace.residual[:, :, places_P])


def _places(trace: Trace | PairTrace, positions: Index) -> tuple[Trace, jax.Array | np.ndarray]:
    trace = trace_of(trace, "self")
    return trace, resolve("positions", positions, trace.queries.shape[2])[0]


@functools.partial(jax.jit, static_argnames="kind")
def value_norms(model: Model, trace: Trace | PairTrace, *, kind: str = "self") -> Float[Array, "L B N S"]:
    """The length of what each key would add to the stream through each head, |v_j W_O|, float32
    ``[L, B, N, S]``.

    Source: Kobayashi et al. (2020), section 3.
    """
    check_kind(model, kind)
    attention, values = attention_of(model, kind), trace_of(trace, kind).values
    group = attention.config.num_heads // values.shape[3]

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        values_BSKH, kernel_NHD = layer
        # |v W|^2 = v (W W^T) v: [B, S, N, D] is never held.
        inner_NHJ = jnp.einsum("NHD,NJD->NHJ", kernel_NHD, kernel_NHD)
        values_BSNH = jnp.repeat(values_BSKH.astype(jnp.float32), group, axis=2)
        return jnp.sqrt(jnp.maximum(jnp.einsum("BSNH,NHJ,BSNJ->BNS", values_BSNH, inner_NHJ, values_BSNH), 0.0))

    return jax.lax.map(of_layer, (values, output_kernel(attention)))


def value_weighted(weights: Float[Array | np.ndarray, "*batch T S"],
                   norms: Float[Array | np.ndarray, "*batch S"]) -> Float[Array | np.ndarray, "*batch T S"]:
    """Maps in which a weight counts as much as what it lets through: |a_ij v_j W_O| = a_ij |v_j
    W_O|.

    Source: Kobayashi et al. (2020), section 3.

    Args:
      weights: maps ``[..., T, S]``, such as ``trace.attention(layers=3)``.
      norms: of the same layers and heads ``[..., S]``, such as ``value_norms(model, trace)[3]``.

    Returns:
      ``[..., T, S]``; rows do not sum to one.
    """
    return weights * norms[..., None, :]


def input_gradient(model: Model, tokens: Tokens, metric: Callable[[jax.Array], jax.Array], *, kind: str = "self",
                   **options: jax.Array) -> Float[Array, "B T"]:
    """Gradient x input: how much each input token moves a metric, to first order, float32
    ``[B, T]``.

    The input is what enters the first layer, the token's embedding with its position.

    Source: Shrikumar et al. (2016); Denil et al. (2014) for text.

    Args:
      model: the model.
      tokens: ``tokens_BT``, or ``(source_BS, target_BT)``.
      metric: from logits ``[B, T, V]`` to one number, such as the logit of an answer.
      kind: ``"encoder"`` for the source tokens of an encoder-decoder.
      **options: arrays that the model's call takes, such as ``segment_ids_BT``.
    """
    return _input_gradient(model, _input_tokens(model, tokens, kind), options, metric, kind)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _input_gradient(model, tokens, options, metric, kind) -> jax.Array:
    embeddings_BTD, slope = _embeddings(model, tokens, options, kind), _slope(model, tokens, options, metric, kind)
    return (embeddings_BTD * slope(embeddings_BTD)).sum(-1)


def integrated_gradients(model: Model, tokens: Tokens, metric: Callable[[jax.Array], jax.Array], *,
                         baseline: jax.Array | int, steps: int = 32, kind: str = "self",
                         **options: jax.Array) -> Float[Array, "B T"]:
    """The gradient along the straight line from baseline embeddings, times the way, float32
    ``[B, T]``.

    Its sum is the metric minus that of the baseline, as nearly as the steps resolve the line
    (Gauss-Legendre).

    Source: Sundararajan et al. (2017).

    Args:
      model: the model.
      tokens: see :func:`input_gradient`; so are ``metric``, ``kind`` and ``options``.
      metric: what is explained.
      baseline: tokens that say nothing, one id or an array like the tokens: padding, ``<mask>``,
        ``<|endoftext|>``.
      steps: gradients taken, one after another.
      kind: whose tokens.
      **options: arrays that the model's call takes.
    """
    tokens = _input_tokens(model, tokens, kind)
    place = 0 if kind == "encoder" else -1
    neutral = list(tokens)
    neutral[place] = jnp.broadcast_to(jnp.asarray(baseline), tokens[place].shape)
    neutral = _input_tokens(model, tuple(neutral), kind)
    return _integrated_gradients(model, tokens, neutral, options, metric, steps, kind)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _integrated_gradients(model, tokens, neutral, options, metric, steps, kind) -> jax.Array:
    start_BTD, stop_BTD = (_embeddings(model, ids, options, kind) for ids in (neutral, tokens))
    slope = _slope(model, tokens, options, metric, kind)
    nodes, weights = np.polynomial.legendre.leggauss(steps)

    def add(total_BTD: jax.Array, node_and_weight: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        node, weight = node_and_weight
        return total_BTD + weight * slope(start_BTD + node * (stop_BTD - start_BTD)), None

    ways = jnp.asarray((nodes + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)
    return ((stop_BTD - start_BTD) * jax.lax.scan(add, jnp.zeros_like(start_BTD), ways)[0]).sum(-1)


def _input_tokens(model: Model, tokens: Tokens, kind: str) -> tuple[jax.Array | np.ndarray, ...]:
    tokens = checked_tokens(model, tokens, kind)
    if kind == "cross":
        raise ValueError("kind='cross' has no input tokens of its own: 'encoder' for the source, 'self' for the target")
    return tokens


def _embeddings(model, tokens, options, kind) -> jax.Array:
    """What enters the first layer; the rest of this forward pass is not computed."""
    return trace_of(model(*tokens, **options).trace, kind).layers.residual[0].astype(jnp.float32)


def _slope(model, tokens, options, metric, kind) -> Callable[[jax.Array], jax.Array]:
    """The gradient of the metric with respect to what enters the first layer."""
    return jax.grad(lambda embeddings_BTD: metric(
        model(*tokens, **options, intervene=patch(site(kind, "residual"), 0, embeddings_BTD)).logits))
