"""Reinforcement learning of models whose vocabulary was rounded up past the tokenizer's: ids that
the tokenizer cannot decode are never drawn."""

import jax
import numpy as np
import pytest

from transformer_jax.alignment.rollouts import collect, excluded_ids
from transformer_jax.config import EvalConfig, ExperimentConfig, ReinforcementConfig
from transformer_jax.data import Message
from transformer_jax.data.conversations import encode_prompt
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel
from transformer_jax.tasks.policy import PolicyLearning
from transformer_jax.training.bundle import Bundle

WORDS = ("the cat", "a mat", "it was", "good")
EXTRA = 30


@pytest.fixture(scope="module")
def policy(config, tokenizer):
    """Makes a policy whose logits would draw only ids that are not tokens."""
    larger = config.replace(vocab_size=config.vocab_size + EXTRA, num_layers=1, tie_embeddings=False)
    policy = jax.jit(lambda key: Decoder(larger, key=key))(jax.random.key(0))
    policy.embeddings.output[...] = policy.embeddings.output[...].at[tokenizer.vocab_size:].multiply(20.0)
    return policy


@pytest.fixture(scope="module")
def reward(policy):
    return RewardModel.of(policy, key=jax.random.key(1))


@pytest.mark.long
def test_ids_that_cannot_be_decoded_are_not_drawn_and_have_no_probability(policy, tokenizer, reward):
    prompts = [encode_prompt(word, tokenizer) for word in WORDS]
    rollout, texts = collect(policy, prompts, reference=policy, reward=reward, tokenizer=tokenizer,
                             key=jax.random.key(2), prompt_len=12, max_new_tokens=8)
    tokens_BT, mask_BR = np.asarray(rollout.tokens_BT), np.asarray(rollout.mask_BR)
    assert tokens_BT.max() < tokenizer.vocab_size and len(set(texts)) > 1
    logits = np.asarray(policy(rollout.tokens_BT, segment_ids_BT=rollout.segment_ids_BT).logits, np.float64)
    assert (logits.argmax(-1) >= tokenizer.vocab_size).mean() > 0.9
    logits = logits[:, 11:-1, :tokenizer.vocab_size]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = np.take_along_axis(log_p, tokens_BT[:, 12:, None], axis=-1)[..., 0]
    for found in (rollout.logprobs_BR, rollout.reference_logprobs_BR):
        np.testing.assert_allclose(np.asarray(found)[mask_BR], expected[mask_BR], rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_updates_are_of_the_policy_that_drew(policy, tokenizer, algorithm):
    rl = ReinforcementConfig(algorithm=algorithm, num_prompts=2, num_samples=2, max_new_tokens=8, epochs=1,
                             entropy_coefficient=0.1)
    config = ExperimentConfig(steps=1, batch_size=4, model=policy.config, rl=rl, eval=EvalConfig(batch_size=2))
    task = PolicyLearning(config, reward=lambda texts: [float(len(text)) for text in texts],
                          base=Bundle(model=policy, tokenizer=tokenizer, config=policy.config))
    model = task.start_from(task.base).model
    prompts = [(Message("user", word),) for word in WORDS]
    experience = task.prepare(prompts, prompts[:2], tokenizer, None).train
    experience.follow(model, None)

    def mean_loss(model, batch):
        loss, weight, sums = task.loss(model, batch)
        return loss / weight, {name: total / weight for name, total in sums.items()}

    (_, means), gradient = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(model, next(experience))
    assert float(means["step_kl"]) < 1e-6 and float(means["clip_fraction"]) == 0.0
    assert 0.1 < float(means["entropy"]) < np.log(tokenizer.vocab_size)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    unembedding = np.asarray(gradient.embeddings.output[...])
    assert not unembedding[tokenizer.vocab_size:].any() and unembedding[:tokenizer.vocab_size].any()


def test_a_vocabulary_of_the_tokenizers_size_excludes_nothing(config, tokenizer):
    assert excluded_ids(config, tokenizer) is None
    found = excluded_ids(config.replace(vocab_size=config.vocab_size + 2), tokenizer)
    assert found is not None and np.flatnonzero(found).tolist() == [tokenizer.vocab_size, tokenizer.vocab_size + 1]
