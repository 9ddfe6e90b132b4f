"""The standard causal experiments: head ablation, activation patching and path patching.

Each function compiles once, because layers, heads and positions are traced values. A ``metric`` is
a function that takes logits ``[B, T, V]`` and returns one number. Define a metric once and pass the
same function object each time: JAX compiles a new program for every new function object.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jaxtyping import Float, Int

from transformer_jax.inspection.interventions import ablate_head, patch
from transformer_jax.inspection.parts import LanguageModel, Tokens, checked_tokens, site, stack_of, trace_of
from transformer_jax.models.output import PairTrace, Trace, resolve
from transformer_jax.nn.sites import Intervene
from transformer_jax.ops.losses import cross_entropy

Metric = Callable[[jax.Array], jax.Array]
Head = tuple[int | np.integer | jax.Array, int | np.integer | jax.Array]  # (layer, head)
Rows = tuple[jax.Array | np.ndarray, ...]


def mean_token_loss(logits_BTV: Float[Array, "B T V"], tokens_BT: Int[Array | np.ndarray, "B T"],
                    segment_ids_BT: Int[Array | np.ndarray, "B T"] | None = None) -> Float[Array, ""]:
    """Computes the mean cross entropy of each token given the tokens before it.

    Padding and the first token of each document do not count.

    Args:
      logits_BTV: the logits of a causal model, ``[B, T, V]``.
      tokens_BT: the ids of the tokens that the model read, ``[B, T]``.
      segment_ids_BT: the document of each token, 0 for padding, ``[B, T]``; ``None`` if each row is
        one document without padding.

    Returns:
      The mean loss in nats, a scalar.
    """
    losses_BT = cross_entropy(logits_BTV[:, :-1], jnp.asarray(tokens_BT)[:, 1:])
    if segment_ids_BT is None:
        return losses_BT.mean()
    counts_BT = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (segment_ids_BT[:, 1:] != 0)
    return jnp.where(counts_BT, losses_BT, 0.0).sum() / jnp.maximum(counts_BT.sum(), 1)


def head_ablation_table(model: LanguageModel, tokens: Tokens, metric: Metric | None = None, *, how: str = "zero",
                        reference: Trace | PairTrace | None = None, kind: str = "self",
                        **options: jax.Array | np.ndarray) -> Float[Array, "L N"]:
    """Measures how a metric changes when one head is ablated, for every head in turn.

    Source: Michel et al. (2019), section 3.2.

    Args:
      model: the model.
      tokens: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      metric: a function from logits to one number; by default ``mean_token_loss``.
      how: how the head is ablated: ``"zero"``, ``"mean"`` or ``"resample"``, as in ``ablate_head``.
      reference: the trace of other texts, which ``"mean"`` and ``"resample"`` need.
      kind: the kind of attention whose heads are ablated: ``"self"``; in an encoder-decoder also
        ``"encoder"`` or ``"cross"``.
      **options: further array arguments of the model, such as ``segment_ids_BT``.

    Returns:
      float32 ``[L, N]``: the metric without the head minus the metric with it.

    Raises:
      ValueError: if the model is an encoder and no metric is given, or if ``ablate_head`` rejects
        the arguments.
    """
    tokens = checked_tokens(model, tokens, kind)
    if metric is None and not model.predicts_next:
        raise ValueError("an encoder does not predict the next token, so there is no default metric: pass metric=..., "
                         "a function of the logits")
    return _ablations(model, tokens, options, reference, metric, how, kind)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _ablations(model, tokens, options, reference, metric, how, kind) -> jax.Array:
    """Compiled part of ``head_ablation_table``."""
    num_layers, num_heads = stack_of(model, kind).num_layers, model.config.num_heads
    segments_BT = options.get("segment_ids_BT", options.get("target_segment_ids_BT"))

    def measure(intervene: Intervene | None) -> jax.Array:
        logits_BTV = model(*tokens, **options, intervene=intervene).logits
        return mean_token_loss(logits_BTV, tokens[-1], segments_BT) if metric is None else metric(logits_BTV)

    def without(index: jax.Array) -> jax.Array:
        return measure(ablate_head(index // num_heads, index % num_heads, how, reference=reference, kind=kind))

    values = jax.lax.map(without, jnp.arange(num_layers * num_heads))
    return values.reshape(num_layers, num_heads) - measure(None)


def patching_grid(model: LanguageModel, clean: Tokens, corrupted: Tokens, metric: Metric, *, at: str = "residual",
                  kind: str = "self", **options: jax.Array | np.ndarray) -> Float[Array, "L T"]:
    """Restores one clean activation in a corrupted run, for each layer and position in turn, and
    measures the metric (activation patching).

    A large effect shows where the model holds the information that the corruption destroyed.

    Source: Meng et al. (2022), section 2.1, causal tracing; with two prompts, Wang et al. (2022).

    Args:
      model: the model.
      clean: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      corrupted: token ids of the same shape, with the relevant tokens changed.
      metric: a function from logits to one number, such as the logit of the answer.
      at: the site that is restored: ``"residual"``, ``"attention_output"``, ``"mlp_output"`` or
        ``"head_output"`` (all heads at once).
      kind: the stack of layers: ``"self"``; in an encoder-decoder also ``"encoder"``, or
        ``"cross"`` for the attention sites.
      **options: further array arguments of the model, the same for both runs.

    Returns:
      float32 ``[L, T]``: the metric with the restored value minus the metric of the corrupted run.

    Raises:
      ValueError: if the two runs have different shapes, or if ``at`` is not one of these sites.
    """
    clean, corrupted = checked_pair(model, clean, corrupted, kind)
    sites = ("attention_output", "head_output", *(() if kind == "cross" else ("residual", "mlp_output")))
    if at not in sites:
        raise ValueError(f"at={at!r} is not one of {', '.join(sites)}")
    return _grid(model, clean, corrupted, options, metric, at, kind)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _grid(model, clean, corrupted, options, metric, at, kind) -> jax.Array:
    """Compiled part of ``patching_grid``."""
    values = getattr(trace_of(model(*clean, **options).trace, kind).layers, at)
    num_layers, _, length = values.shape[:3]

    def measure(intervene: Intervene | None) -> jax.Array:
        return metric(model(*corrupted, **options, intervene=intervene).logits)

    def restored(index: jax.Array) -> jax.Array:
        layer = index // length
        return measure(patch(site(kind, at), layer, values[layer], positions=index % length))

    return jax.lax.map(restored, jnp.arange(num_layers * length)).reshape(num_layers, length) - measure(None)


def path_effect(model: LanguageModel, clean: Tokens, corrupted: Tokens, metric: Metric, *, sender: Head,
                receiver: Head | None = None, kind: str = "self",
                **options: jax.Array | np.ndarray) -> Float[Array, ""]:
    """Measures the direct effect of one head on another through the residual stream alone (path
    patching).

    In a first pass, the sender's output comes from the corrupted run, and every other head and
    feed-forward layer before the receiver keeps its output from the clean run. In a second pass on
    the clean tokens, the receiver's output is replaced by its output from the first pass, and the
    metric is computed.

    Source: Wang et al. (2022), section 3.1 and appendix B; Goldowsky-Dill et al. (2023).

    Args:
      model: the model.
      clean: token ids ``tokens_BT``; for an encoder-decoder ``(source_BS, target_BT)``.
      corrupted: token ids of the same shape.
      metric: a function from logits to one number.
      sender: the sending head as ``(layer, head)``; both may be traced values.
      receiver: the receiving head as ``(layer, head)``, in a later layer; ``None`` for the logits.
      kind: the kind of attention that both heads belong to.
      **options: further array arguments of the model, the same for both runs.

    Returns:
      A scalar: the metric minus the metric of the clean run.

    Raises:
      ValueError: if the two runs have different shapes, if a head does not exist, or if the
        receiver is not in a later layer than the sender.
    """
    clean, corrupted = checked_pair(model, clean, corrupted, kind)
    for head in (sender, receiver):
        if head is not None:
            resolve("layers", head[0], stack_of(model, kind).num_layers)
            resolve("heads", head[1], model.config.num_heads)
    if receiver is not None and not isinstance(receiver[0] - sender[0], Tracer) and receiver[0] <= sender[0]:
        raise ValueError(f"the receiver's layer {receiver[0]} is not after the sender's layer {sender[0]}: pass a "
                         "receiver in a later layer")
    return _path(model, clean, corrupted, options, sender, receiver, metric, kind)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _path(model, clean, corrupted, options, sender, receiver, metric, kind) -> jax.Array:
    """Compiled part of ``path_effect``."""
    plain = model(*clean, **options)
    held = trace_of(plain.trace, "self" if kind == "cross" else kind).layers
    sent = trace_of(model(*corrupted, **options).trace, kind).layers.head_output[sender[0]]
    before = stack_of(model, kind).num_layers if receiver is None else receiver[0]
    send = patch(site(kind, "head_output"), sender[0], sent, heads=sender[1])

    outputs = {site("encoder" if kind == "encoder" else "self", name): getattr(held, name)
               for name in ("head_output", "mlp_output")}
    if "cross" in plain.trace.parts() and kind != "encoder":
        outputs["cross_head_output"] = trace_of(plain.trace, "cross").layers.head_output

    def hold(site: str, layer: jax.Array | int, value: jax.Array) -> jax.Array:
        if site not in outputs:
            return value
        return send(site, layer, jnp.where(layer < before, outputs[site][layer], value))

    out = model(*clean, **options, intervene=hold)
    if receiver is not None:
        received = trace_of(out.trace, kind).layers.head_output[receiver[0]]
        out = model(*clean, **options,
                    intervene=patch(site(kind, "head_output"), receiver[0], received, heads=receiver[1]))
    return metric(out.logits) - metric(plain.logits)


def checked_pair(model: LanguageModel, clean: Tokens, corrupted: Tokens, kind: str) -> tuple[Rows, Rows]:
    """Checks the tokens of both runs; raises ValueError if their shapes differ."""
    clean, corrupted = (checked_tokens(model, tokens, kind) for tokens in (clean, corrupted))
    shapes = tuple([ids.shape for ids in tokens] for tokens in (clean, corrupted))
    if shapes[0] != shapes[1]:
        raise ValueError(f"clean and corrupted tokens differ in shape: {shapes[0]} and {shapes[1]}")
    return clean, corrupted
