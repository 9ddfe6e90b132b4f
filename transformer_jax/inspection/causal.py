"""The standard experiments with interventions: is this head needed, where is the answer, what tells
whom.

Each compiles once: layers, heads and positions are traced. A ``metric`` is a function of the logits
``[B, T, V]`` that returns one number; define it once and pass the same function again, since a new
one is a new program.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from transformer_jax.inspection.interventions import ablate_head, patch
from transformer_jax.inspection.parts import Tokens, checked_tokens, site, stack_of, trace_of
from transformer_jax.models.functional import Model
from transformer_jax.models.output import PairTrace, Trace, resolve
from transformer_jax.nn.sites import Intervene
from transformer_jax.ops.losses import cross_entropy

Metric = Callable[[jax.Array], jax.Array]
Rows = tuple[jax.Array | np.ndarray, ...]


def next_token_loss(logits_BTV: jax.Array, tokens_BT: jax.Array,
                    segment_ids_BT: jax.Array | None = None) -> jax.Array:
    """Mean cross entropy of each token given those before it, in nats; padding and first tokens do
    not count."""
    losses_BT = cross_entropy(logits_BTV[:, :-1], tokens_BT[:, 1:])
    if segment_ids_BT is None:
        return losses_BT.mean()
    counts_BT = (segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1]) & (segment_ids_BT[:, 1:] != 0)
    return jnp.where(counts_BT, losses_BT, 0.0).sum() / jnp.maximum(counts_BT.sum(), 1)


def head_ablation_table(model: Model, tokens: Tokens, metric: Metric | None = None, *, how: str = "zero",
                        reference: Trace | PairTrace | None = None, kind: str = "self",
                        **options: jax.Array) -> jax.Array:
    """How much worse the model gets without each head.

    Source: Michel et al. (2019), section 3.2.

    Args:
      model: the model.
      tokens: ``tokens_BT``, or ``(source_BS, target_BT)``.
      metric: what is measured; by default :func:`next_token_loss`.
      how: see :func:`~transformer_jax.inspection.interventions.ablate_head`; so are ``reference``
        and ``kind``.
      reference: the trace of other texts.
      kind: whose heads.
      **options: arrays that the model's call takes, such as ``segment_ids_BT``.

    Returns:
      float32 ``[L, N]``: the metric without the head minus the metric with it.

    Raises:
      ValueError: for an encoder without a metric, or what ``ablate_head`` refuses.
    """
    tokens = checked_tokens(model, tokens, kind)
    if metric is None and not model.predicts_next:
        raise ValueError("an encoder has no next token: pass metric=..., a function of the logits")
    return _ablations(model, tokens, options, reference, metric, how, kind)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _ablations(model, tokens, options, reference, metric, how, kind) -> jax.Array:
    num_layers, num_heads = stack_of(model, kind).num_layers, model.config.num_heads
    segments_BT = options.get("segment_ids_BT", options.get("target_segment_ids_BT"))

    def measure(intervene: Intervene | None) -> jax.Array:
        logits_BTV = model(*tokens, **options, intervene=intervene).logits
        return next_token_loss(logits_BTV, tokens[-1], segments_BT) if metric is None else metric(logits_BTV)

    def without(index: jax.Array) -> jax.Array:
        return measure(ablate_head(index // num_heads, index % num_heads, how, reference=reference, kind=kind))

    values = jax.lax.map(without, jnp.arange(num_layers * num_heads))
    return values.reshape(num_layers, num_heads) - measure(None)


def patching_grid(model: Model, clean: Tokens, corrupted: Tokens, metric: Metric, *, at: str = "residual",
                  kind: str = "self", **options: jax.Array) -> jax.Array:
    """Where the answer is: the corrupted run with one value of the clean run put back, for each
    layer and position.

    Source: Meng et al. (2022), section 2.1, causal tracing; with two prompts, Wang et al. (2022).

    Args:
      model: the model.
      clean: ``tokens_BT``, or ``(source_BS, target_BT)``.
      corrupted: tokens of the same shape, in which what matters is changed.
      metric: what is measured, such as the logit of the answer.
      at: what is put back: ``"residual"``, ``"attention_output"``, ``"mlp_output"`` or
        ``"head_output"`` (all heads).
      kind: ``"self"``, or in an encoder-decoder ``"encoder"`` or, of attention, ``"cross"``.
      **options: arrays that the model's call takes, for both runs.

    Returns:
      float32 ``[L, T]``: the metric minus that of the corrupted run.

    Raises:
      ValueError: for runs of different shapes, or another ``at``.
    """
    clean, corrupted = _pair(model, clean, corrupted, kind)
    sites = ("attention_output", "head_output", *(() if kind == "cross" else ("residual", "mlp_output")))
    if at not in sites:
        raise ValueError(f"at={at!r} is not one of {', '.join(sites)}")
    return _grid(model, clean, corrupted, options, metric, at, kind)


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def _grid(model, clean, corrupted, options, metric, at, kind) -> jax.Array:
    values = getattr(trace_of(model(*clean, **options).trace, kind).layers, at)
    num_layers, _, length = values.shape[:3]

    def measure(intervene: Intervene | None) -> jax.Array:
        return metric(model(*corrupted, **options, intervene=intervene).logits)

    def restored(index: jax.Array) -> jax.Array:
        layer = index // length
        return measure(patch(site(kind, at), layer, values[layer], positions=index % length))

    return jax.lax.map(restored, jnp.arange(num_layers * length)).reshape(num_layers, length) - measure(None)


def path_effect(model: Model, clean: Tokens, corrupted: Tokens, metric: Metric, *, sender: tuple[int, int],
                receiver: tuple[int, int] | None = None, kind: str = "self", **options: jax.Array) -> jax.Array:
    """What one head tells another directly, through the residual stream alone: path patching.

    The sender's output is that of the corrupted run; every other head and feed-forward layer before
    the receiver keeps its output of the clean run. What the receiver then computes is put into a
    clean run, and the metric is read.

    Source: Wang et al. (2022), section 3.1 and appendix B; Goldowsky-Dill et al. (2023).

    Args:
      model: the model.
      clean: ``tokens_BT``, or ``(source_BS, target_BT)``.
      corrupted: tokens of the same shape.
      metric: what is measured.
      sender: layer and head; may be traced.
      receiver: layer and head, in a later layer; ``None``: the logits.
      kind: which attention both are of.
      **options: arrays that the model's call takes, for both runs.

    Returns:
      The metric minus that of the clean run, a scalar.

    Raises:
      ValueError: for runs of different shapes, a head that there is not, or a receiver that is not
        after the sender.
    """
    clean, corrupted = _pair(model, clean, corrupted, kind)
    for head in (sender, receiver):
        if head is not None:
            resolve("layers", head[0], stack_of(model, kind).num_layers)
            resolve("heads", head[1], model.config.num_heads)
    if receiver is not None and not isinstance(receiver[0] - sender[0], Tracer) and receiver[0] <= sender[0]:
        raise ValueError(f"the receiver's layer {receiver[0]} is not after the sender's layer {sender[0]}")
    return _path(model, clean, corrupted, options, sender, receiver, metric, kind)


@functools.partial(jax.jit, static_argnums=(6, 7))
def _path(model, clean, corrupted, options, sender, receiver, metric, kind) -> jax.Array:
    plain = model(*clean, **options)
    held = trace_of(plain.trace, "self" if kind == "cross" else kind).layers
    sent = trace_of(model(*corrupted, **options).trace, kind).layers.head_output[sender[0]]
    before = stack_of(model, kind).num_layers if receiver is None else receiver[0]
    send = patch(site(kind, "head_output"), sender[0], sent, heads=sender[1])

    outputs = {site("encoder" if kind == "encoder" else "self", name): getattr(held, name)
               for name in ("head_output", "mlp_output")}
    if "cross" in plain.trace.parts() and kind != "encoder":
        outputs["cross_head_output"] = trace_of(plain.trace, "cross").layers.head_output

    def hold(site: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        if site not in outputs:
            return value
        return send(site, layer, jnp.where(layer < before, outputs[site][layer], value))

    out = model(*clean, **options, intervene=hold)
    if receiver is not None:
        received = trace_of(out.trace, kind).layers.head_output[receiver[0]]
        out = model(*clean, **options,
                    intervene=patch(site(kind, "head_output"), receiver[0], received, heads=receiver[1]))
    return metric(out.logits) - metric(plain.logits)


def _pair(model: Model, clean: Tokens, corrupted: Tokens, kind: str) -> tuple[Rows, Rows]:
    clean, corrupted = (checked_tokens(model, tokens, kind) for tokens in (clean, corrupted))
    shapes = tuple([ids.shape for ids in tokens] for tokens in (clean, corrupted))
    if shapes[0] != shapes[1]:
        raise ValueError(f"clean and corrupted tokens differ in shape: {shapes[0]} and {shapes[1]}")
    return clean, corrupted
