"""Rollouts: the policy's own responses, with everything that learning from them needs, in arrays of
fixed shape."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.decoding.batch import pad_left
from transformer_jax.decoding.sample import generate
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel

Reward = RewardModel | Callable[[list[str]], Sequence[float]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """Responses of a policy to prompts: P places for the prompt, filled on the right, then R for
    the response.

    Attributes:
      tokens_BT: T = P + R.
      segment_ids_BT: 1 for tokens, 0 for padding.
      mask_BR: True for the tokens of the response, with the one that ended it.
      logprobs_BR: log P of each token under the policy that drew it, in nats.
      reference_logprobs_BR: log P under the reference.
      values_BR: the reward to come, as expected before each token was drawn; 0 without a value
        head.
      scores_B: the reward of each response.
    """

    tokens_BT: jax.Array
    segment_ids_BT: jax.Array
    mask_BR: jax.Array
    logprobs_BR: jax.Array
    reference_logprobs_BR: jax.Array
    values_BR: jax.Array
    scores_B: jax.Array


def collect(policy: Decoder, prompts: Sequence[Sequence[int]], *, reference: Decoder, reward: Reward,
            tokenizer: Tokenizer, key: jax.Array, prompt_len: int, max_new_tokens: int,
            num_samples: int = 1) -> tuple[Rollout, list[str]]:
    """Lets the policy respond, and measures its responses.

    Args:
      policy: responds at temperature 1, so that what it draws is what its log-probabilities say.
      prompts: token ids of each, as :func:`transformer_jax.data.conversations.encode_prompt` gives
        them.
      reference: what the policy is kept near to; of the same vocabulary.
      reward: a reward model, or a function from the texts of the responses to as many numbers.
      tokenizer: of all three.
      key: PRNG key.
      prompt_len: P, at least the longest prompt.
      max_new_tokens: R.
      num_samples: responses to each prompt; they are neighbours.

    Returns:
      The rollout, and the texts of its responses.

    Raises:
      ValueError: for a reward function that returns another number of rewards, or one that is not
        finite.
    """
    result = generate(policy, prompts, tokenizer=tokenizer, key=key, max_new_tokens=max_new_tokens,
                      num_samples=num_samples)
    rows = [prompt for prompt in prompts for _ in range(num_samples)]
    tokens_BT, segment_ids_BT = lay_out(rows, result.tokens, prompt_len, max_new_tokens)
    logprobs_BR, values_BR, reference_logprobs_BR = _measure(policy, reference, tokens_BT, segment_ids_BT, prompt_len)
    mask_BR = segment_ids_BT[:, prompt_len:] == 1
    if isinstance(reward, RewardModel):
        scores_B = check_scores(_rewards(reward, tokens_BT, segment_ids_BT), result.texts)
    else:
        scores_B = check_scores(reward(result.texts), result.texts)
    return Rollout(tokens_BT=tokens_BT, segment_ids_BT=segment_ids_BT, mask_BR=mask_BR, logprobs_BR=logprobs_BR,
                   reference_logprobs_BR=reference_logprobs_BR, values_BR=values_BR, scores_B=scores_B), result.texts


def lay_out(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], prompt_len: int,
            response_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and segment ids ``[B, P + R]``: every response starts at place P."""
    tokens_BT, segment_ids_BT = (np.pad(x, ((0, 0), (0, response_len))) for x in pad_left(prompts, prompt_len))
    for row, response in enumerate(responses):
        tokens_BT[row, prompt_len:prompt_len + len(response)] = response
        segment_ids_BT[row, prompt_len:prompt_len + len(response)] = 1
    return tokens_BT, segment_ids_BT


def read_responses(policy: Decoder, tokens_BT: jax.Array, segment_ids_BT: jax.Array,
                   prompt_len: int) -> tuple[jax.Array, jax.Array]:
    """One teacher-forced pass over rows laid out by :func:`lay_out`.

    Returns:
      Log-probabilities ``[B, R, V]`` of every token at every place of the response, and values
      ``[B, R]`` of the text before that place, 0 without a value head; float32.
    """
    hidden_BTD = policy(tokens_BT, segment_ids_BT=segment_ids_BT).hidden
    before_BRD = hidden_BTD[:, prompt_len - 1:-1]
    log_p_BRV = jax.nn.log_softmax(policy.embeddings.unembed(before_BRD))
    if policy.value_head is None:
        return log_p_BRV, jnp.zeros(before_BRD.shape[:2], jnp.float32)
    return log_p_BRV, policy.value_head(before_BRD)


def chosen(log_p_BRV: jax.Array, tokens_BR: jax.Array) -> jax.Array:
    """The log-probabilities ``[B, R]`` of the tokens that are there."""
    return jnp.take_along_axis(log_p_BRV, tokens_BR[..., None], axis=-1)[..., 0]


def _measure_now(policy, reference, tokens_BT, segment_ids_BT, prompt_len):
    log_p_BRV, values_BR = read_responses(policy, tokens_BT, segment_ids_BT, prompt_len)
    reference_log_p_BRV, _ = read_responses(reference, tokens_BT, segment_ids_BT, prompt_len)
    tokens_BR = tokens_BT[:, prompt_len:]
    return chosen(log_p_BRV, tokens_BR), values_BR, chosen(reference_log_p_BRV, tokens_BR)


_measure = jax.jit(_measure_now, static_argnums=4)
_rewards = jax.jit(lambda model, tokens_BT, segment_ids_BT: model.rewards(tokens_BT, segment_ids_BT=segment_ids_BT))


def check_scores(scores: Sequence[float] | np.ndarray | jax.Array, texts: Sequence[str]) -> np.ndarray:
    """The rewards as float32 ``[B]``; ValueError where they are not one finite number a text."""
    scores_B = np.asarray(scores, np.float32)
    if scores_B.shape != (len(texts),):
        raise ValueError(f"the reward of {len(texts)} texts has shape {scores_B.shape}; expected one number a text")
    if not np.isfinite(scores_B).all():
        row = int(np.flatnonzero(~np.isfinite(scores_B))[0])
        raise ValueError(f"the reward of response {row}, {texts[row]!r}, is {scores_B[row]}; it must be finite. The "
                         "run goes on from its last checkpoint when the same command is given again")
    return scores_B
