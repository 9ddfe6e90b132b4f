"""The loss functions of the model families, for ``make_train_step``.

Each loss function is ``loss_fn(model, batch, key) -> (sum of losses, sum of weights)``. The losses
are in nats, and the sums run over the tokens to predict. A PRNG key means training: it switches on
dropout and the losses of a router. ``None`` means evaluation.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from transformer_jax.config import LossConfig
from transformer_jax.models.classifier import Classifier
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.heads import MaskedTokenHead
from transformer_jax.models.output import Output, Trace
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.ops.losses import cross_entropy, linear_cross_entropy
from transformer_jax.sharding import as_rows, gather_weight, num_shards
from transformer_jax.training.router_losses import with_router_losses
from transformer_jax.training.step import Batch, LossFn, Sums


def next_token_loss(config: LossConfig = LossConfig()) -> LossFn:
    """Makes the loss of a language model, which predicts the next token.

    Args:
      config: label smoothing, z-loss, and when to compute the loss in chunks.

    Returns:
      A loss function for ``Decoder`` models. Its batches have ``tokens`` and ``targets``
      ``[B, T]``, and optionally ``segment_ids`` and ``weights`` ``[B, T]``. In training, which a
      PRNG key shows, it adds the losses of the router of a mixture of experts.
    """
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        out = model(batch["tokens"], segment_ids_BT=batch.get("segment_ids"), key=key)
        return with_router_losses(_target_loss(model, out, batch, config), model.config, cast(Trace, out.trace),
                                  batch.get("segment_ids"), key)

    return loss_fn


def translation_loss(config: LossConfig = LossConfig()) -> LossFn:
    """Makes the loss of a sequence-to-sequence model, such as a translation model.

    Args:
      config: label smoothing, z-loss, and when to compute the loss in chunks.

    Returns:
      A loss function for ``EncoderDecoder`` models. Its batches are those of ``next_token_loss``,
      with ``source`` and optionally ``source_segment_ids`` ``[B, S]`` in addition.
    """
    def loss_fn(model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        out = model(batch["source"], batch["tokens"], source_segment_ids_BS=batch.get("source_segment_ids"),
                    target_segment_ids_BT=batch.get("segment_ids"), key=key)
        return _target_loss(model, out, batch, config)

    return loss_fn


def masked_token_loss(config: LossConfig = LossConfig()) -> LossFn:
    """Makes the loss of masked language modelling (Devlin et al., 2019).

    Logits are computed only for the P masked positions of each row.

    Args:
      config: label smoothing, z-loss, and when to compute the loss in chunks.

    Returns:
      A loss function for ``Encoder`` models. Its batches have ``tokens`` and optionally
      ``segment_ids`` ``[B, T]``, and ``masked_positions``, ``masked_targets`` and
      ``masked_weights`` ``[B, P]``.
    """
    def loss_fn(model: Encoder, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        targets_BP = batch["masked_targets"]
        hidden_BPD = _masked_hidden(model, batch, key)
        if targets_BP.size * cast(int, model.config.vocab_size) >= config.most_logits:
            head = cast(MaskedTokenHead, model.head)
            losses_BP = _chunked_cross_entropy(model.embeddings, head.transformed(hidden_BPD), targets_BP, config,
                                               head.bias[...])
        else:
            losses_BP = cross_entropy(model.predict(hidden_BPD), targets_BP, label_smoothing=config.label_smoothing,
                                      z_loss=config.z_loss)
        return (losses_BP * batch["masked_weights"]).sum(), batch["masked_weights"].sum()

    return loss_fn


def classification_loss(config: LossConfig = LossConfig()) -> LossFn:
    """Makes the loss of a classifier of texts or of tokens.

    Args:
      config: label smoothing and z-loss.

    Returns:
      A loss function for ``Classifier`` models. Its batches have ``tokens`` and ``segment_ids``
      ``[B, T]``, and ``labels`` and ``weights`` ``[B]``, or ``[B, T]`` for a classifier of tokens.
      The third item of its result has the sum ``accuracy``.
    """
    def loss_fn(model: Classifier, batch: Batch, key: jax.Array | None = None) -> Sums:
        logits = model(batch["tokens"], segment_ids_BT=batch["segment_ids"], key=key).logits
        labels, weights = batch["labels"], batch["weights"]
        losses = cross_entropy(logits, labels, label_smoothing=config.label_smoothing, z_loss=config.z_loss)
        hits = (logits.argmax(-1) == labels) * weights
        return (losses * weights).sum(), weights.sum(), {"accuracy": hits.sum()}

    return loss_fn


def masked_logits(model: Encoder, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Returns the logits, float32 ``[B, P, V]``, at the ``masked_positions`` of a batch."""
    return model.predict(_masked_hidden(model, batch, key))


def _masked_hidden(model: Encoder, batch: Batch, key: jax.Array | None) -> jax.Array:
    """Returns the hidden states ``[B, P, D]`` at the ``masked_positions`` of a batch."""
    out = model(batch["tokens"], segment_ids_BT=batch.get("segment_ids"), key=key)
    return jnp.take_along_axis(out.hidden, batch["masked_positions"][..., None], axis=1)


def _target_loss(model: Decoder | EncoderDecoder, out: Output, batch: Batch,
                 config: LossConfig) -> tuple[jax.Array, jax.Array]:
    """Returns the weighted sum of the losses of the targets, and the sum of the weights."""
    if batch["targets"].size * cast(int, model.config.vocab_size) >= config.most_logits:
        losses_BT = _chunked_cross_entropy(model.embeddings, out.hidden, batch["targets"], config)
    else:
        losses_BT = cross_entropy(out.logits, batch["targets"], label_smoothing=config.label_smoothing,
                                  z_loss=config.z_loss)
    if "weights" not in batch:
        return losses_BT.sum(), jnp.asarray(losses_BT.size, jnp.float32)
    return (losses_BT * batch["weights"]).sum(), batch["weights"].sum()


def _chunked_cross_entropy(embeddings: Embeddings, hidden_BTD: jax.Array, targets_BT: jax.Array, config: LossConfig,
                           bias_V: jax.Array | None = None) -> jax.Array:
    """Returns the cross entropy ``[B, T]``, computed in chunks; ``bias_V`` is that of a head."""
    if embeddings.output_bias is not None:
        bias_V = embeddings.output_bias[...] if bias_V is None else embeddings.output_bias[...] + bias_V
    table_VD, rows = embeddings.unembedding_VD, as_rows(embeddings.read(hidden_BTD))
    losses = linear_cross_entropy(rows, gather_weight(table_VD, embeddings.token.axes),
                                  targets_BT.reshape(rows.shape[:-1]), config.label_smoothing, config.z_loss,
                                  bias_V=bias_V, parts=num_shards(table_VD.shape[0], "vocab"),
                                  precision=embeddings.config.precision, cap=embeddings.config.limits.logits)
    return cast(jax.Array, losses).reshape(targets_BT.shape)
