"""Rollouts: responses that the policy samples, with everything that is needed to learn from them.

All arrays have a fixed shape, so that programs need not be compiled again for other lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Bool, Float, Int

from transformer_jax.config import ModelConfig
from transformer_jax.data.conversations import AnyTokenizer, answer_end_ids
from transformer_jax.decoding.batch import never_drawn, pad_left
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel
from transformer_jax.models.output import Trace

_EXCLUDED_LOGIT = -1e30

Reward = RewardModel | Callable[[list[str]], Sequence[float]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Responses of a policy to prompts.

    Each of the B rows has P positions for the prompt, which is padded on the left, and then R
    positions for the response, which is padded on the right.

    Attributes:
      tokens_BT: token ids of prompts and responses; T = P + R.
      segment_ids_BT: 1 for tokens, 0 for padding.
      mask_BR: True for the tokens of the response, including the token that ended it.
      logprobs_BR: log probability of each token under the policy that sampled it, in nats.
      reference_logprobs_BR: log probability of each token under the reference model, in nats.
      values_BR: the value head's estimate of the future reward before each token was sampled; 0 if
        the policy has no value head.
      scores_B: the reward of each response.
    """

    tokens_BT: Int[Array, "B T"]
    segment_ids_BT: Int[Array, "B T"]
    mask_BR: Bool[Array, "B R"]
    logprobs_BR: Float[Array, "B R"]
    reference_logprobs_BR: Float[Array, "B R"]
    values_BR: Float[Array, "B R"]
    scores_B: Float[Array, " B"]


def collect(policy: Decoder, prompts: Sequence[Sequence[int]], *, reference: Decoder, reward: Reward,
            tokenizer: AnyTokenizer, key: jax.Array, prompt_len: int, max_new_tokens: int,
            num_samples: int = 1) -> tuple[Rollout, list[str]]:
    """Samples responses from the policy, and measures them.

    Args:
      policy: the policy. It samples at temperature 1, so that the distribution of the tokens is
        exactly that of the stored log probabilities.
      prompts: the token ids of each prompt, as ``transformer_jax.data.encode_prompt`` returns them.
      reference: the reference model. Its vocabulary and that of the policy may be larger than that
        of the tokenizer: tokens that the tokenizer cannot decode are never sampled, and both models
        give them the probability 0.
      reward: a reward model, or a function that maps the texts of the responses to one number per
        text.
      tokenizer: the tokenizer of all three models.
      key: PRNG key for sampling.
      prompt_len: P, the number of positions for a prompt; at least the length of the longest one.
      max_new_tokens: R, the largest number of tokens in a response.
      num_samples: number of responses per prompt, which stand next to each other.

    Returns:
      The rollout, and the texts of its responses.

    Raises:
      ValueError: if the reward function does not return one number per text, or a number is not
        finite.
    """
    excluded_V, reference_excluded_V = (excluded_ids(model.config, tokenizer) for model in (policy, reference))
    result = generate(policy, prompts, tokenizer=tokenizer, key=key, max_new_tokens=max_new_tokens,
                      num_samples=num_samples, end_ids=answer_end_ids(tokenizer))
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    texts = cast(list[str], result.texts)  # it is None only without a tokenizer
    tokens_BT, segment_ids_BT = map(jnp.asarray, place_responses(rows, result.tokens, prompt_len, max_new_tokens))
    logprobs_BR, values_BR, reference_logprobs_BR = _measure(
        policy, reference, tokens_BT, segment_ids_BT, prompt_len, excluded_V, reference_excluded_V)
    mask_BR = segment_ids_BT[:, prompt_len:] == 1
    if isinstance(reward, RewardModel):
        scores_B = check_scores(_rewards(reward, tokens_BT, segment_ids_BT), texts)
    else:
        scores_B = check_scores(reward(texts), texts)
    return Rollout(tokens_BT=tokens_BT, segment_ids_BT=segment_ids_BT, mask_BR=mask_BR, logprobs_BR=logprobs_BR,
                   reference_logprobs_BR=reference_logprobs_BR, values_BR=values_BR,
                   scores_B=jnp.asarray(scores_B)), texts


def place_responses(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], prompt_len: int,
                    response_len: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Puts prompts and responses into arrays in which every response starts at position P.

    Args:
      prompts: the token ids of each prompt.
      responses: the token ids of each response.
      prompt_len: P, the number of positions for a prompt.
      response_len: R, the number of positions for a response.

    Returns:
      The token ids and the segment ids (1 for tokens, 0 for padding), each int32 ``[B, P + R]``.
    """
    tokens_BT, segment_ids_BT = (np.pad(x, ((0, 0), (0, response_len))) for x in pad_left(prompts, prompt_len))
    for row, response in enumerate(responses):
        tokens_BT[row, prompt_len:prompt_len + len(response)] = response
        segment_ids_BT[row, prompt_len:prompt_len + len(response)] = 1
    return tokens_BT, segment_ids_BT


def excluded_ids(config: ModelConfig, tokenizer: AnyTokenizer) -> Bool[np.ndarray, " V"] | None:
    """Returns which tokens of a model's vocabulary are never sampled.

    These are the tokens that ``transformer_jax.generate`` never draws: one rule decides both.

    Args:
      config: the config of the model.
      tokenizer: the tokenizer.

    Returns:
      A boolean array ``[V]``, True for the excluded tokens; ``None`` if no token is excluded.
    """
    excluded_V = never_drawn(config, tokenizer, answer_end_ids(tokenizer))
    return excluded_V if excluded_V.any() else None


def read_responses(policy: Decoder, tokens_BT: Int[Array, "B T"], segment_ids_BT: Int[Array, "B T"], prompt_len: int,
                   excluded_V: Bool[np.ndarray, " V"] | Bool[Array, " V"] | None = None,
                   ) -> tuple[Float[Array, "B R V"], Float[Array, "B R"], Trace]:
    """Computes log probabilities and values in one teacher-forced pass over prompts and responses.

    Args:
      policy: the model to run, which may be another one than the model that sampled the responses.
      tokens_BT: token ids of prompts and responses, as ``place_responses`` arranges them.
      segment_ids_BT: 1 for tokens, 0 for padding.
      prompt_len: P, the number of positions for a prompt.
      excluded_V: True for the tokens that are never sampled, as ``excluded_ids`` returns them. The
        probabilities are those of the distribution over all other tokens.

    Returns:
      The log probabilities of every token of the vocabulary at every position of the response,
      float32 ``[B, R, V]``; the values of the text before each position, float32 ``[B, R]``, 0 if
      the policy has no value head; and the trace of the forward pass.
    """
    out = policy(tokens_BT, segment_ids_BT=segment_ids_BT)
    before_BRD = out.hidden[:, prompt_len - 1:-1]
    logits_BRV = policy.unembed(before_BRD)
    if excluded_V is not None:
        # The value is finite, because the entropy multiplies it by a probability of 0: with minus
        # infinity, that product and its gradient would be NaN.
        logits_BRV = jnp.where(excluded_V, _EXCLUDED_LOGIT, logits_BRV)
    log_p_BRV = jax.nn.log_softmax(logits_BRV)
    values_BR = (jnp.zeros(before_BRD.shape[:2], jnp.float32) if policy.value_head is None
                 else policy.value_head(before_BRD))
    return log_p_BRV, values_BR, cast(Trace, out.trace)


def chosen(log_p_BRV: Float[Array, "B R V"], tokens_BR: Int[Array, "B R"]) -> Float[Array, "B R"]:
    """Selects the log probabilities of the given tokens, ``[B, R]``, from those of all tokens."""
    return jnp.take_along_axis(log_p_BRV, tokens_BR[..., None], axis=-1)[..., 0]


def _measure_unjitted(policy, reference, tokens_BT, segment_ids_BT, prompt_len, excluded_V, reference_excluded_V):
    """Returns the log probabilities of the responses, their values, and the log probabilities under
    the reference model, each ``[B, R]``."""
    log_p_BRV, values_BR, _ = read_responses(policy, tokens_BT, segment_ids_BT, prompt_len, excluded_V)
    reference_log_p_BRV, *_ = read_responses(reference, tokens_BT, segment_ids_BT, prompt_len, reference_excluded_V)
    tokens_BR = tokens_BT[:, prompt_len:]
    return chosen(log_p_BRV, tokens_BR), values_BR, chosen(reference_log_p_BRV, tokens_BR)


_measure = jax.jit(_measure_unjitted, static_argnums=4)
_rewards = jax.jit(lambda model, tokens_BT, segment_ids_BT: model.rewards(tokens_BT, segment_ids_BT=segment_ids_BT))


def check_scores(scores: Sequence[float] | np.ndarray | Array, texts: Sequence[str]) -> Float[np.ndarray, " B"]:
    """Checks that there is one finite reward per text.

    Args:
      scores: the rewards.
      texts: the texts that they belong to.

    Returns:
      The rewards, float32 ``[B]``.

    Raises:
      ValueError: if the number of rewards is not that of the texts, or a reward is not finite.
    """
    scores_B = np.asarray(scores, np.float32)
    if scores_B.shape != (len(texts),):
        raise ValueError(f"the reward function returned the shape {scores_B.shape} for {len(texts)} texts; expected "
                         "one number per text")
    if not np.isfinite(scores_B).all():
        row = int(np.flatnonzero(~np.isfinite(scores_B))[0])
        raise ValueError(f"the reward of response {row}, {texts[row]!r}, is {scores_B[row]}; it must be finite. "
                         "Correct the reward and run the same command again: the run continues from its last "
                         "checkpoint")
    return scores_B
