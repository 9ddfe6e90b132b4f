"""Rollouts: log-probabilities of one pass agree with those of decoding and of the loss; shapes;
refused arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import transformer_jax as tj
from transformer_jax.alignment import rollouts
from transformer_jax.alignment.ppo import ppo_loss, with_value_head
from transformer_jax.alignment.rollouts import collect
from transformer_jax.config import ReinforcementConfig
from transformer_jax.data.conversations import encode_prompt
from transformer_jax.models.heads import RewardModel

PROMPTS = ("the cat", "a mat or a cat", "it")
R = 12


def lengths(texts):
    return [float(len(text)) for text in texts]


@pytest.fixture(scope="module")
def policy(make_decoder, tokenizer):
    """Makes a policy that ends many of its texts early."""
    policy = with_value_head(make_decoder(1), key=jax.random.key(5))
    policy.value_head.kernel[...] = 10 * policy.value_head.kernel[...]
    row = policy.embeddings.token[...][tokenizer.eos_id]
    policy.embeddings.token[...] = policy.embeddings.token[...].at[tokenizer.eos_id].set(2.5 * row)
    return policy


@pytest.fixture(scope="module")
def prompts(tokenizer):
    return [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def arguments(make_decoder, tokenizer):
    return dict(reference=make_decoder(2), reward=lengths, tokenizer=tokenizer, key=jax.random.key(3), prompt_len=20,
                max_new_tokens=R, num_samples=2)


@pytest.fixture(scope="module")
def collected(policy, prompts, arguments):
    return collect(policy, prompts, **arguments)


def test_the_responses_are_those_of_generate(collected, policy, prompts, tokenizer):
    rollout, texts = collected
    generated = tj.generate(policy, prompts, tokenizer=tokenizer, key=jax.random.key(3), max_new_tokens=R,
                            num_samples=2)
    assert texts == generated.texts and len(set(texts)) == 6
    assert {"eos", "length"} == set(generated.finish_reasons)
    for row, tokens in enumerate(generated.tokens):
        assert rollout.tokens_BT[row, 20:][rollout.mask_BR[row]].tolist() == tokens
        prompt = prompts[row // 2]
        assert rollout.tokens_BT[row, :20][rollout.segment_ids_BT[row, :20] == 1].tolist() == prompt
        assert rollout.tokens_BT[row, 19] == prompt[-1]
        # Both end at the token that ends the text: decoding with a cache, and one pass with padding
        # on both sides.
        np.testing.assert_allclose(rollout.logprobs_BR[row][rollout.mask_BR[row]], generated.logprobs[row], atol=1e-5)
    np.testing.assert_array_equal(rollout.scores_B, lengths(texts))


@pytest.mark.long
def test_values_and_reference_without_padding(collected, arguments, policy):
    rollout, _ = collected
    for row in range(6):
        real = np.asarray(rollout.tokens_BT[row])[np.asarray(rollout.segment_ids_BT[row]) == 1]
        length = int(rollout.mask_BR[row].sum())
        before = slice(len(real) - length - 1, len(real) - 1)
        logits = np.asarray(arguments["reference"](jnp.asarray(real)[None]).logits, np.float64)[0, before]
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = log_p[np.arange(length), real[-length:]]
        np.testing.assert_allclose(rollout.reference_logprobs_BR[row, :length], expected, atol=1e-5)
        hidden = policy(jnp.asarray(real)[None]).hidden[0, before]
        np.testing.assert_allclose(rollout.values_BR[row, :length], policy.value_head(hidden), atol=1e-5)


def test_old_and_new_agree_before_the_first_update(collected, policy):
    rollout, _ = collected
    ones = np.ones(rollout.mask_BR.shape, np.float32)
    batch = {"tokens": rollout.tokens_BT, "segment_ids": rollout.segment_ids_BT, "mask": rollout.mask_BR,
             "logprobs": rollout.logprobs_BR, "advantages": ones, "values": rollout.values_BR, "returns": ones}
    log_p_BRV, values_BR, _ = jax.jit(rollouts.read_responses, static_argnums=3)(
        policy, batch["tokens"], batch["segment_ids"], 20)
    now = rollouts.chosen(log_p_BRV, rollout.tokens_BT[:, 20:])
    assert np.abs(np.asarray(now - rollout.logprobs_BR)[rollout.mask_BR]).max() < 1e-5
    _, weight, sums = jax.jit(ppo_loss(ReinforcementConfig()))(policy, batch)
    assert float(sums["clip_fraction"]) == 0.0 and float(sums["step_kl"] / weight) < 1e-9
    assert float(sums["policy_loss"]) == pytest.approx(-float(weight), rel=1e-5)
    np.testing.assert_allclose(values_BR, rollout.values_BR, atol=1e-5)


def test_a_reward_model_reads_prompt_and_response(collected, policy, prompts, arguments, reward_model):
    rollout, _ = collect(policy, prompts, **arguments | {"reward": reward_model})
    for row in range(6):
        real = np.asarray(rollout.tokens_BT[row])[np.asarray(rollout.segment_ids_BT[row]) == 1]
        assert float(rollout.scores_B[row]) == pytest.approx(float(reward_model(jnp.asarray(real)[None])[0]), abs=1e-5)
    np.testing.assert_array_equal(rollout.tokens_BT, collected[0].tokens_BT)


def test_without_a_value_head(policy, prompts, arguments, make_decoder):
    rollout, _ = collect(make_decoder(1), prompts, **arguments)
    assert not np.asarray(rollout.values_BR).any()


def test_a_new_value_head_changes_no_token(policy, make_decoder):
    plain = make_decoder(1)
    headed = with_value_head(plain, key=jax.random.key(0))
    assert headed.config == plain.config.replace(use_value_head=True)
    np.testing.assert_array_equal(headed(jnp.array([[3, 4]])).logits, plain(jnp.array([[3, 4]])).logits)
    assert with_value_head(headed, key=jax.random.key(1)) is headed
    fresh = jax.eval_shape(lambda key: tj.Decoder(headed.config, key=key), jax.random.key(0))
    assert jax.tree.structure(fresh) == jax.tree.structure(headed)  # in the form that a checkpoint stores


def test_measuring_compiles_once(policy, prompts, arguments, reward_model):
    """Other prompts, other weights, other lengths of the responses: the same shapes and
    programs."""
    for function in (rollouts._measure, rollouts._rewards):
        function.clear_cache()
    for seed in range(3):
        moved = jax.tree.map(lambda x, scale=1 + 0.01 * seed: x * scale, policy)
        collect(moved, prompts[seed:] + prompts[:seed], **arguments | {"key": jax.random.key(seed),
                                                                       "reward": reward_model})
    assert rollouts._measure._cache_size() == rollouts._rewards._cache_size() == 1


def test_the_rollout_is_a_pytree(collected):
    doubled = jax.tree.map(lambda x: x * 2, dataclasses.replace(collected[0]))
    np.testing.assert_array_equal(doubled.scores_B, 2 * collected[0].scores_B)


@pytest.mark.parametrize(("reward", "message"), [
    (lambda texts: [0.0, float("nan"), *[0.0] * 4], r"the reward of response 1, '.*', is nan; it must be finite"),
    (lambda texts: [0.0, 0.0, float("inf"), *[0.0] * 3], r"the reward of response 2, '.*', is inf"),
    (lambda texts: [0.0] * 5, r"returned the shape \(5,\) for 6 texts; expected one number per text"),
    (lambda texts: [[0.0]] * 6, r"returned the shape \(6, 1\)")])
def test_a_reward_function_that_is_wrong(policy, prompts, arguments, reward, message):
    with pytest.raises(ValueError, match=message):
        collect(policy, prompts, **arguments | {"reward": reward})


def test_a_reward_model_of_another_reading(policy, prompts, arguments, reward_model):
    broken = jax.tree.map(lambda x: x, reward_model)
    broken.head.bias[...] = jnp.float32(jnp.nan)
    assert isinstance(broken, RewardModel)
    with pytest.raises(ValueError, match="the reward of response 0"):
        collect(policy, prompts, **arguments | {"reward": broken})
