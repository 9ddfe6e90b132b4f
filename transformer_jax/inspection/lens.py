"""The logit lens, value-weighted attention, and gradient attributions to input tokens."""

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
    LanguageModel,
    Tokens,
    as_ids,
    attention_of,
    check_count,
    check_kind,
    checked_tokens,
    output_kernel,
    read_out,
    site,
    trace_of,
    vocab_size,
)
from transformer_jax.models.functional import check_tokens
from transformer_jax.models.output import Index, PairTrace, Trace, resolve


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lens:
    """The predictions that the model would make if it ended before each layer.

    Attributes:
      ids: the ids of the K most probable tokens, in descending order, ``[L + 1, B, P, K]``. The
        last entry of the layer axis is the model's own prediction.
      probabilities: the probabilities of these tokens, ``[L + 1, B, P, K]``.
    """

    ids: Int[Array, "layers *B_P K"]
    probabilities: Float[Array, "layers *B_P K"]


def logit_lens(model: LanguageModel, trace: Trace | PairTrace, *, positions: Index = None, top_k: int = 5) -> Lens:
    """Applies the final norm and the unembedding to the residual stream before each layer and after
    the last.

    Source: nostalgebraist (2020), "interpreting GPT: the logit lens".

    Args:
      model: the model.
      trace: the trace of its forward pass. For an encoder-decoder, the function reads the residual
        stream of the decoder.
      positions: one position or several; ``None`` for all. Negative positions count from the end.
        The function holds the logits ``[B, P, V]`` of one layer at a time.
      top_k: the number K of tokens for each layer and position.

    Returns:
      The most probable tokens and their probabilities, ``[L + 1, B, P, K]``.

    Raises:
      ValueError: if a position is out of range, or if ``top_k`` exceeds the vocabulary size.
    """
    check_kind(model, "self")
    check_count("top_k", top_k, vocab_size(model))
    return _most_probable(model, *_places(trace, positions), top_k)


@functools.partial(jax.jit, static_argnums=3)
def _most_probable(model: LanguageModel, trace: Trace, places_P: jax.Array, top_k: int) -> Lens:
    """Compiled part of ``logit_lens``."""

    def of_layer(stream_BPD: jax.Array) -> Lens:
        probabilities, ids = jax.lax.top_k(jax.nn.softmax(read_out(model)(stream_BPD)), top_k)
        return Lens(ids, probabilities)

    return jax.lax.map(of_layer, trace.residual[:, :, places_P])


def target_logprobs(model: LanguageModel, trace: Trace | PairTrace,
                    targets_BP: Int[Array | np.ndarray, "B P"] | Sequence[Sequence[int]], *,
                    positions: Index = None) -> Float[Array, "layers B P"]:
    """Computes the log-probability of given tokens with the logit lens, which shows at which layer
    the answer appears.

    Args:
      model: the model.
      trace: the trace of its forward pass. For an encoder-decoder, the function reads the residual
        stream of the decoder.
      targets_BP: one token id for each row and position.
      positions: one position or several; ``None`` for all. Negative positions count from the end.

    Returns:
      float32 ``[L + 1, B, P]``: the natural logarithm of the probability of each target.

    Raises:
      ValueError: if a position is out of range, or if the targets are not token ids ``[B, P]``.
    """
    check_kind(model, "self")
    trace, places_P = _places(trace, positions)
    targets = targets_BP if isinstance(targets_BP, jax.Array) else as_ids(targets_BP)
    if targets.shape != (trace.queries.shape[1], places_P.size):
        raise ValueError(f"targets_BP has shape {targets.shape}; expected {(trace.queries.shape[1], places_P.size)}, "
                         "one token id for each row and position")
    check_tokens(targets, vocab_size(model))
    return _logprobs(model, trace, places_P, jnp.asarray(targets))


@jax.jit
def _logprobs(model: LanguageModel, trace: Trace, places_P: jax.Array, targets_BP: jax.Array) -> jax.Array:
    """Compiled part of ``target_logprobs``."""

    def of_layer(stream_BPD: jax.Array) -> jax.Array:
        logits_BPV = read_out(model)(stream_BPD)
        chosen = jnp.take_along_axis(logits_BPV, targets_BP[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits_BPV, axis=-1)

    return jax.lax.map(of_layer, trace.residual[:, :, places_P])


def _places(trace: Trace | PairTrace, positions: Index) -> tuple[Trace, jax.Array]:
    """Returns the trace of the decoder (or only stack), and the checked positions."""
    own = trace_of(trace, "self")
    return own, jnp.asarray(resolve("positions", positions, own.queries.shape[2])[0])


@functools.partial(jax.jit, static_argnames="kind")
def value_norms(model: LanguageModel, trace: Trace | PairTrace, *, kind: str = "self") -> Float[Array, "L B N S"]:
    """Computes the norm of the vector that each key adds to the residual stream through each head
    at attention weight 1: |v_j W_O|.

    Source: Kobayashi et al. (2020), section 3.

    Args:
      model: the model.
      trace: the trace of its forward pass.
      kind: the kind of attention: ``"self"``; in an encoder-decoder also ``"encoder"`` or
        ``"cross"``.

    Returns:
      float32 ``[L, B, N, S]``.
    """
    check_kind(model, kind)
    attention, values = attention_of(model, kind), trace_of(trace, kind).values
    group = attention.config.num_heads // values.shape[3]

    def of_layer(layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        values_BSKH, kernel_NHD = layer
        # |v W|^2 = v (W W^T) v^T needs no array [B, S, N, D].
        inner_NHJ = jnp.einsum("NHD,NJD->NHJ", kernel_NHD, kernel_NHD)
        values_BSNH = jnp.repeat(values_BSKH.astype(jnp.float32), group, axis=2)
        return jnp.sqrt(jnp.maximum(jnp.einsum("BSNH,NHJ,BSNJ->BNS", values_BSNH, inner_NHJ, values_BSNH), 0.0))

    return jax.lax.map(of_layer, (values, output_kernel(attention)))


def value_weighted(weights: Float[Array | np.ndarray, "*batch T S"],
                   norms: Float[Array | np.ndarray, "*batch S"]) -> Float[Array | np.ndarray, "*batch T S"]:
    """Multiplies attention weights by the norms of the transformed values: |a_ij v_j W_O| =
    a_ij |v_j W_O|.

    Source: Kobayashi et al. (2020), section 3.

    Args:
      weights: attention maps ``[..., T, S]``, such as ``trace.attention(layers=3)``.
      norms: the value norms of the same layers and heads, ``[..., S]``, such as
        ``value_norms(model, trace)[3]``.

    Returns:
      The weighted maps ``[..., T, S]``, whose rows do not sum to one.
    """
    return weights * norms[..., None, :]


def input_gradient(model: LanguageModel, tokens: Tokens, metric: Callable[[jax.Array], jax.Array], *,
                   kind: str = "self", **options: jax.Array | np.ndarray) -> Float[Array, "B T"]:
    """Computes gradient times input: the first-order effect of each input token on a metric.

    The input is the vector that enters the first layer: the token embedding plus its position.

    Source: Shrikumar et al. (2016); Denil et al. (2014) for text.

    Args:
      model: the model.
      tokens: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      metric: a function from logits ``[B, T, V]`` to one number, such as the logit of an answer.
      kind: ``"self"``; ``"encoder"`` for the source tokens of an encoder-decoder.
      **options: further array arguments of the model, such as ``segment_ids_BT``.

    Returns:
      float32 ``[B, T]``: one number for each input token.

    Raises:
      ValueError: if the tokens are not valid token ids for the model.
    """
    return _input_gradient(model, _input_tokens(model, tokens, kind), options, metric, kind)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _input_gradient(model, tokens, options, metric, kind) -> jax.Array:
    """Compiled part of ``input_gradient``."""
    embeddings_BTD, slope = _embeddings(model, tokens, options, kind), _slope(model, tokens, options, metric, kind)
    return (embeddings_BTD * slope(embeddings_BTD)).sum(-1)


def integrated_gradients(model: LanguageModel, tokens: Tokens, metric: Callable[[jax.Array], jax.Array], *,
                         baseline: jax.Array | int, steps: int = 32, kind: str = "self",
                         **options: jax.Array | np.ndarray) -> Float[Array, "B T"]:
    """Integrates the gradient along the straight line from baseline embeddings to the real ones,
    and multiplies it by their difference.

    The sum of the result is the metric of the tokens minus the metric of the baseline. The error
    depends on the number of steps of the Gauss-Legendre quadrature.

    Source: Sundararajan et al. (2017).

    Args:
      model: the model.
      tokens: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      metric: a function from logits ``[B, T, V]`` to one number.
      baseline: neutral tokens, such as padding, ``<mask>`` or ``<|endoftext|>``: one id, or an
        array of the same shape as the tokens.
      steps: the number of gradients, which are computed one after another.
      kind: ``"self"``; ``"encoder"`` for the source tokens of an encoder-decoder.
      **options: further array arguments of the model, such as ``segment_ids_BT``.

    Returns:
      float32 ``[B, T]``: one number for each input token.

    Raises:
      ValueError: if the tokens or the baseline are not valid token ids for the model, or if
        ``steps`` is less than 1.
    """
    check_count("steps", steps)
    tokens = _input_tokens(model, tokens, kind)
    place = 0 if kind == "encoder" else -1
    neutral = list(tokens)
    neutral[place] = jnp.broadcast_to(baseline if isinstance(baseline, jax.Array) else as_ids(baseline),
                                      tokens[place].shape)
    neutral = _input_tokens(model, tuple(neutral), kind)
    return _integrated_gradients(model, tokens, neutral, options, metric, steps, kind)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _integrated_gradients(model, tokens, neutral, options, metric, steps, kind) -> jax.Array:
    """Compiled part of ``integrated_gradients``."""
    start_BTD, stop_BTD = (_embeddings(model, ids, options, kind) for ids in (neutral, tokens))
    slope = _slope(model, tokens, options, metric, kind)
    nodes, weights = np.polynomial.legendre.leggauss(steps)

    def add(total_BTD: jax.Array, node_and_weight: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        node, weight = node_and_weight
        return total_BTD + weight * slope(start_BTD + node * (stop_BTD - start_BTD)), None

    ways = jnp.asarray((nodes + 1) / 2, jnp.float32), jnp.asarray(weights / 2, jnp.float32)
    return ((stop_BTD - start_BTD) * jax.lax.scan(add, jnp.zeros_like(start_BTD), ways)[0]).sum(-1)


def _input_tokens(model: LanguageModel, tokens: Tokens, kind: str) -> tuple[jax.Array | np.ndarray, ...]:
    """Checks the tokens; raises ValueError for a kind without input tokens."""
    tokens = checked_tokens(model, tokens, kind)
    if kind == "cross":
        raise ValueError("kind='cross' has no input tokens of its own: pass 'encoder' for the source, or 'self' for "
                         "the target")
    return tokens


def _embeddings(model, tokens, options, kind) -> jax.Array:
    """Returns the input of the first layer; XLA removes the rest of this forward pass."""
    return trace_of(model(*tokens, **options).trace, kind).layers.residual[0].astype(jnp.float32)


def _slope(model, tokens, options, metric, kind) -> Callable[[jax.Array], jax.Array]:
    """Returns a function that computes the gradient of the metric with respect to the first layer's
    input."""
    return jax.grad(lambda embeddings_BTD: metric(
        model(*tokens, **options, intervene=patch(site(kind, "residual"), 0, embeddings_BTD)).logits))
