"""Direct preference optimisation: the policy as its own reward model."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from transformer_jax.alignment.rankings import Rankings
from transformer_jax.alignment.reward import ranking_sums
from transformer_jax.config import PreferenceConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.training.step import Batch, LossFn, Sums


def response_logprobs(model: Decoder, batch: Batch, key: jax.Array | None = None) -> jax.Array:
    """log P of every response given its prompt, float32 ``[B, K]`` in nats, for a batch of
    :class:`Rankings`."""
    B, K, T = batch["tokens"].shape
    tokens_MT, mask_MT = batch["tokens"].reshape(B * K, T), batch["mask"].reshape(B * K, T)
    logits_MTV = model(tokens_MT, segment_ids_BT=batch["segment_ids"].reshape(B * K, T), key=key).logits
    log_p_MTV = jax.nn.log_softmax(logits_MTV[:, :-1])
    logprobs_MT = jnp.take_along_axis(log_p_MTV, tokens_MT[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(mask_MT[:, 1:], logprobs_MT, 0.0).sum(-1).reshape(B, K)


_measure = jax.jit(response_logprobs)


def with_reference(rankings: Rankings, reference: Decoder, batch_size: int = 32) -> Rankings:
    """The rankings with the log-probabilities of the reference, measured once.

    Raises:
      ValueError: for a reference of another vocabulary.
    """
    largest = int(rankings.tokens_NKT.max())
    if largest >= reference.config.vocab_size:
        raise ValueError(f"the rankings hold token {largest}, but the reference has a vocabulary of "
                         f"{reference.config.vocab_size}; both must have the same tokenizer")
    parts = [np.asarray(_measure(reference, batch)) for batch in tqdm(
        rankings.batches(batch_size), unit="batch", desc="reference", leave=False)]
    return dataclasses.replace(rankings, reference_logprobs_NK=np.concatenate(parts)[:len(rankings)])


def dpo_loss(config: PreferenceConfig) -> LossFn:
    """Batches of :class:`Rankings` with reference log-probabilities; pairs as published, rankings
    by Plackett-Luce.

    A response's reward is ``beta`` times the log ratio of its probabilities under the policy and
    under the reference.

    Source: Rafailov et al. (2023), equation 7, and for rankings appendix A.3.
    """
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        log_ratios_BK = response_logprobs(model, batch, key) - batch["reference_logprobs"]
        return ranking_sums(config.beta * log_ratios_BK, batch["ranks"])

    return loss_fn
