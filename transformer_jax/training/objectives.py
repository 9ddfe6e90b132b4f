"""What each model family learns from: loss functions for :func:`make_train_step`.

Each is ``loss_fn(model, batch, key) -> (sum of losses, sum of weights)``, in nats over the tokens
to predict; a key switches dropout on.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from transformer_jax.config import LossConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.encoder import Encoder
from transformer_jax.models.encoder_decoder import EncoderDecoder
from transformer_jax.models.output import Output
from transformer_jax.nn.embeddings import Embeddings
from transformer_jax.ops.losses import cross_entropy, linear_cross_entropy
from transformer_jax.sharding import as_rows, gathered, num_parts
from transformer_jax.training.step import Batch, LossFn


def next_token_loss(config: LossConfig = LossConfig()) -> LossFn:
    """Language modelling: batches with ``tokens`` and ``targets`` ``[B, T]``, maybe ``segment_ids``
    and ``weights``."""
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        out = model(batch["tokens"], segment_ids_BT=batch.get("segment_ids"), key=key)
        return _target_loss(model, out, batch, config)

    return loss_fn


def translation_loss(config: LossConfig = LossConfig()) -> LossFn:
    """Sequence to sequence: as :func:`next_token_loss`, with ``source`` and ``source_segment_ids``
    ``[B, S]``."""
    def loss_fn(model: EncoderDecoder, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        out = model(batch["source"], batch["tokens"], source_segment_ids_BS=batch.get("source_segment_ids"),
                    target_segment_ids_BT=batch.get("segment_ids"), key=key)
        return _target_loss(model, out, batch, config)

    return loss_fn


def masked_token_loss(config: LossConfig = LossConfig()) -> LossFn:
    """Masked language modelling (Devlin et al., 2019), with logits of the masked positions alone.

    Batches have ``tokens`` and ``segment_ids`` ``[B, T]``, and ``masked_positions``,
    ``masked_targets`` and ``masked_weights`` ``[B, P]``.
    """
    def loss_fn(model: Encoder, batch: Batch, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        targets_BP = batch["masked_targets"]
        hidden_BPD = _masked_hidden(model, batch, key)
        if targets_BP.size * model.config.vocab_size >= config.most_logits:
            losses_BP = _chunked(model.embeddings, model.head.transformed(hidden_BPD), targets_BP, config,
                                 model.head.bias[...])
        else:
            losses_BP = cross_entropy(model.predict(hidden_BPD), targets_BP, label_smoothing=config.label_smoothing,
                                      z_loss=config.z_loss)
        return (losses_BP * batch["masked_weights"]).sum(), batch["masked_weights"].sum()

    return loss_fn


def masked_logits(model: Encoder, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """Logits, float32 ``[B, P, V]``, at the ``masked_positions`` of a batch."""
    return model.predict(_masked_hidden(model, batch, key))


def _masked_hidden(model: Encoder, batch: Batch, key: jax.Array | None) -> jax.Array:
    out = model(batch["tokens"], segment_ids_BT=batch.get("segment_ids"), key=key)
    return jnp.take_along_axis(out.hidden, batch["masked_positions"][..., None], axis=1)


def _target_loss(model: Decoder | EncoderDecoder, out: Output, batch: Batch,
                 config: LossConfig) -> tuple[jax.Array, jax.Array]:
    if batch["targets"].size * model.config.vocab_size >= config.most_logits:
        losses_BT = _chunked(model.embeddings, out.hidden, batch["targets"], config)
    else:
        losses_BT = cross_entropy(out.logits, batch["targets"], label_smoothing=config.label_smoothing,
                                  z_loss=config.z_loss)
    if "weights" not in batch:
        return losses_BT.sum(), jnp.asarray(losses_BT.size, jnp.float32)
    return (losses_BT * batch["weights"]).sum(), batch["weights"].sum()


def _chunked(embeddings: Embeddings, hidden_BTD: jax.Array, targets_BT: jax.Array, config: LossConfig,
             bias_V: jax.Array | None = None) -> jax.Array:
    """The cross entropy ``[B, T]`` without the logits; ``bias_V`` is that of a head."""
    if embeddings.output_bias is not None:
        bias_V = embeddings.output_bias[...] if bias_V is None else embeddings.output_bias[...] + bias_V
    table_VD, rows = embeddings.unembedding_VD, as_rows(embeddings.read(hidden_BTD))
    losses = linear_cross_entropy(rows, gathered(table_VD, embeddings.token.axes), targets_BT.reshape(rows.shape[:-1]),
                                  config.label_smoothing, config.z_loss, bias_V=bias_V,
                                  parts=num_parts(table_VD.shape[0], "vocab"), precision=embeddings.config.precision)
    return losses.reshape(targets_BT.shape)
