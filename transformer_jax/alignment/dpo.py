"""Direct preference optimisation (DPO): train the policy on comparisons without a reward model."""

from __future__ import annotations

import dataclasses
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float
from tqdm import tqdm

from transformer_jax.alignment.rankings import Rankings
from transformer_jax.alignment.reward import ranking_sums
from transformer_jax.config import PreferenceConfig
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.output import Trace
from transformer_jax.training.router_losses import with_router_losses
from transformer_jax.training.step import Batch, LossFn, Sums


def response_logprobs(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Float[Array, "B K"]:
    """Computes the log probability of every response given its prompt.

    Args:
      model: the decoder.
      batch: a batch of ``Rankings``: ``tokens``, ``segment_ids`` and ``mask``, each ``[B, K, T]``.
      key: a PRNG key that switches dropout on; ``None`` runs the model without dropout.

    Returns:
      The log probabilities, float32 ``[B, K]``, in nats; 0 where there is no response.
    """
    return _logprobs_and_trace(model, batch, key)[0]


def _logprobs_and_trace(model: Decoder, batch: Batch, key: jax.Array | None) -> tuple[jax.Array, Trace]:
    """Returns the log probability of every response, and the trace of the forward pass."""
    B, K, T = batch["tokens"].shape
    tokens_MT, mask_MT = batch["tokens"].reshape(B * K, T), batch["mask"].reshape(B * K, T)
    out = model(tokens_MT, segment_ids_BT=batch["segment_ids"].reshape(B * K, T), key=key)
    log_p_MTV = jax.nn.log_softmax(out.logits[:, :-1])
    logprobs_MT = jnp.take_along_axis(log_p_MTV, tokens_MT[:, 1:, None], axis=-1)[..., 0]
    return jnp.where(mask_MT[:, 1:], logprobs_MT, 0.0).sum(-1).reshape(B, K), cast(Trace, out.trace)


_measure = jax.jit(response_logprobs)


def with_reference(rankings: Rankings, reference: Decoder, batch_size: int = 32) -> Rankings:
    """Adds the log probabilities of the responses under the reference model to rankings.

    The reference model does not change during training, so they are computed only once.

    Args:
      rankings: the ranked responses, N prompts with up to K responses each.
      reference: the reference model, usually the model before training.
      batch_size: number of prompts that are processed at a time.

    Returns:
      A copy of the rankings in which ``reference_logprobs_NK`` is set.

    Raises:
      ValueError: if the rankings contain a token that is not in the vocabulary of the reference.
    """
    largest = int(rankings.tokens_NKT.max())
    if largest >= cast(int, reference.config.vocab_size):  # None only in a config that has no model yet
        raise ValueError(f"the rankings contain the token id {largest}, but the reference model has a vocabulary of "
                         f"{reference.config.vocab_size} tokens; build the rankings with the tokenizer of the "
                         "reference model")
    parts = [np.asarray(_measure(reference, batch)) for batch in tqdm(
        rankings.batches(batch_size), unit="batch", desc="reference", leave=False)]
    return dataclasses.replace(rankings, reference_logprobs_NK=np.concatenate(parts)[:len(rankings)])


def dpo_loss(config: PreferenceConfig) -> LossFn:
    """Makes the DPO loss for pairs and longer rankings of responses.

    The implicit reward of a response is ``beta`` times the log ratio of its probabilities under the
    policy and under the reference model. The loss is the negative log-likelihood of the rankings
    under the Plackett-Luce model of these rewards; for pairs it is the published DPO loss.

    Source: Rafailov et al. (2023), equation 7, and appendix A.3 for rankings.

    Args:
      config: the settings of preference learning, of which ``beta`` is used.

    Returns:
      A loss function for ``make_train_step``. It takes batches of ``Rankings`` that contain
      ``reference_logprobs`` (see ``with_reference``). In training, which a key shows, it adds the
      losses of the router of a mixture of experts.
    """
    def loss_fn(model: Decoder, batch: Batch, key: jax.Array | None = None) -> Sums:
        logprobs_BK, trace = _logprobs_and_trace(model, batch, key)
        sums = ranking_sums(config.beta * (logprobs_BK - batch["reference_logprobs"]), batch["ranks"])
        segment_ids_MT = batch["segment_ids"].reshape(-1, batch["segment_ids"].shape[-1])
        return with_router_losses(sums, model.config, trace, segment_ids_MT, key)

    return loss_fn
