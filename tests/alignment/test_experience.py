"""PPO and GRPO in the training loop: rollouts and updates compile once, a stopped run resumes
exactly, and several devices compute the same as one."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest

from transformer_jax.alignment import experience as experiences
from transformer_jax.alignment import rollouts
from transformer_jax.alignment.experience import Experience
from transformer_jax.alignment.ppo import grpo_loss, ppo_loss, with_value_head
from transformer_jax.config import (
    CheckpointConfig,
    EvalConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    ReinforcementConfig,
)
from transformer_jax.data.conversations import encode_prompt
from transformer_jax.sharding import make_mesh
from transformer_jax.training.errors import Interrupted
from transformer_jax.training.leaves import tree_digest
from transformer_jax.training.metrics import read_metrics
from transformer_jax.training.optimizer import make_optimizer
from transformer_jax.training.session import run_training
from transformer_jax.training.state import init_state
from transformer_jax.training.step import make_train_step

STEPS = 14  # of 6 in a rollout: 3 epochs of 2 minibatches
PPO = ReinforcementConfig(num_prompts=8, max_new_tokens=8, epochs=3, kl_coefficient=0.1, kl_target=2.0,
                          entropy_coefficient=0.01)
GRPO = ReinforcementConfig(algorithm="grpo", num_prompts=4, num_samples=2, max_new_tokens=8, epochs=3, kl_target=2.0)
CONFIG = ExperimentConfig(steps=STEPS, batch_size=4, log_every=1, model=ModelConfig(), rl=PPO,
                          optim=OptimConfig(peak_lr=3e-3, warmup_steps=1, weight_decay=0.0),
                          checkpoint=CheckpointConfig(every=4), eval=EvalConfig(every=100))
WORDS = ("the cat", "a mat", "it was", "good", "bad", "or bad", "cat", "sat on a mat", "and")


def vowels(texts):
    """Rewards each vowel with half a point."""
    return [sum(map(text.count, "aiou")) / 2 for text in texts]


class Interrupting(Experience):
    """An iterator that sends a signal to the process after a given number of batches."""

    at, given = None, 0

    def __next__(self):
        self.given += 1
        if self.given == self.at:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().__next__()


@pytest.fixture(scope="module")
def make_experience(make_decoder, tokenizer):
    def make(config, prompts=WORDS, **changes):
        arguments = dict(reference=make_decoder(2), reward=vowels, tokenizer=tokenizer) | changes
        encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
        return Interrupting(config, encoded, encoded[:3], **arguments)

    return make


@pytest.fixture(scope="module")
def run(make_decoder, make_experience):
    def run(workdir, config=CONFIG, mesh=None, at=None, **changes):
        experience = make_experience(config, **changes)
        experience.at = at
        policy, loss = make_decoder(2), grpo_loss
        if config.rl.algorithm == "ppo":
            policy, loss = with_value_head(policy, key=jax.random.key(1)), ppo_loss
        return run_training(
            config.replace(model=policy.config), workdir, loss_fn=loss(config.rl), batches=experience,
            make_params=jax.tree_util.Partial(lambda policy, key: policy, policy), follow=experience.follow,
            mesh=make_mesh(config.mesh, jax.devices()[:1]) if mesh is None else mesh,
            evaluate=lambda policy: {"validation_loss": -experience.measure(policy)["reward"]})

    return run


def deterministic(workdir):
    return [{name: value for name, value in line.items() if not name.endswith("_per_second")}
            for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, run(workdir)


def test_a_run_logs_its_rollouts_and_updates(whole):
    workdir, state = whole
    lines = deterministic(workdir)
    drawn = [line for line in lines if "response_length" in line]
    assert [line["step"] for line in drawn] == [0, 6, 12]
    assert set(drawn[0]) == {"step", "reward", "kl", "response_length", "explained_variance", "kl_coefficient"}
    assert drawn[0]["kl"] == pytest.approx(0.0, abs=1e-4) and drawn[2]["kl"] > 1e-3
    # Below its target at first, so the coefficient falls by a fiftieth each time.
    np.testing.assert_allclose([line["kl_coefficient"] for line in drawn[:2]], [0.1, 0.098])
    updates = [line for line in lines if "policy_loss" in line]
    assert [line["step"] for line in updates] == list(range(1, STEPS + 1))
    assert {"loss", "value_loss", "entropy", "clip_fraction", "step_kl", "grad_norm"} <= set(updates[0])
    assert updates[0]["step_kl"] < 1e-9 < updates[5]["step_kl"] and updates[0]["clip_fraction"] == 0
    assert updates[6]["step_kl"] < 1e-9  # a new rollout, of the policy as it is
    assert int(state.skipped) == 0


@pytest.mark.long
@pytest.mark.parametrize("stop", [1, 3, 6, 8])
def test_stopped_in_a_rollout_it_ends_as_the_whole_run(run, whole, tmp_path, stop):
    """Stops in the middle of a rollout (after 1, 3 and 8 updates) and between two rollouts."""
    with pytest.raises(Interrupted, match=f"saved step {stop}$"):
        run(tmp_path, at=stop)
    state = run(tmp_path)
    assert tree_digest(state) == tree_digest(whole[1]) and deterministic(tmp_path) == deterministic(whole[0])


@pytest.mark.long
def test_a_crash_loses_only_the_steps_since_the_last_checkpoint(run, whole, tmp_path):
    """The reward function fails in the second rollout, after the checkpoint of step 4. It is then
    corrected, and the run continues."""
    calls = []

    def sometimes(texts):
        calls.append(texts)
        return vowels(texts) if len(calls) < 2 else [float("nan")] * len(texts)

    with pytest.raises(ValueError, match="the reward of response 0, .* is nan; it must be finite. Correct the reward"):
        run(tmp_path, reward=sometimes)
    state = run(tmp_path)
    assert tree_digest(state) == tree_digest(whole[1]) and deterministic(tmp_path) == deterministic(whole[0])


@pytest.mark.long
def test_a_new_rollout_is_drawn_when_the_policy_moves_too_far(run, tmp_path):
    """Also holds when the run is stopped at this step."""
    config = CONFIG.replace(rl=ReinforcementConfig(num_prompts=8, max_new_tokens=8, epochs=3, max_step_kl=1e-5))
    state = run(tmp_path / "whole", config)
    drawn = [line["step"] for line in deterministic(tmp_path / "whole") if "response_length" in line]
    assert drawn[:3] == [0, 2, 4]  # after the first update that finds the policy moved
    with pytest.raises(Interrupted):
        run(tmp_path / "run", config, at=2)
    assert tree_digest(run(tmp_path / "run", config)) == tree_digest(state)
    assert deterministic(tmp_path / "run") == deterministic(tmp_path / "whole")


@pytest.mark.long
def test_grpo_resumes_exactly(run, tmp_path):
    config = CONFIG.replace(rl=GRPO, steps=9)
    state = run(tmp_path / "whole", config)
    with pytest.raises(Interrupted):
        run(tmp_path / "run", config, at=8)
    assert tree_digest(run(tmp_path / "run", config)) == tree_digest(state)
    updates = [line for line in deterministic(tmp_path / "run") if "policy_loss" in line]
    assert "reference_kl" in updates[0] and "value_loss" not in updates[0]


@pytest.mark.long
@pytest.mark.parametrize("rl", [PPO, GRPO], ids=["ppo", "grpo"])
def test_more_reward(run, tmp_path, rl):
    """Forty updates with a reward for vowels raise the reward."""
    config = CONFIG.replace(rl=rl, steps=40, optim=OptimConfig(peak_lr=1e-2, warmup_steps=1, weight_decay=0.0),
                            checkpoint=CheckpointConfig(every=100), eval=EvalConfig(every=39))
    run(tmp_path, config)
    rewards = [line["reward"] for line in deterministic(tmp_path) if "response_length" in line]
    assert rewards[-1] > rewards[0] + 0.3, rewards


@pytest.mark.long
def test_rollouts_and_updates_compile_once(make_decoder, make_experience):
    """Three rollouts of other prompts with other weights, and their updates."""
    traces = []

    def traced(model, batch, key):
        traces.append(batch)
        return ppo_loss(PPO)(model, batch, key)

    experience = make_experience(CONFIG)
    optimizer = make_optimizer(CONFIG.optim, STEPS)
    policy = with_value_head(make_decoder(2), key=jax.random.key(1))
    state = init_state(jax.tree_util.Partial(lambda policy, key: policy, policy), optimizer, jax.random.key(0))
    step = make_train_step(traced, optimizer)
    rollouts._measure.clear_cache()
    experience.follow(state.params, None)
    drawn = 0
    for _ in range(STEPS):
        state, metrics = step(state, next(experience))
        drawn += bool(experience.follow(state.params, metrics))
    assert drawn == 2 and len(traces) == rollouts._measure._cache_size() == 1


@pytest.mark.long
def test_eight_devices_have_the_losses_of_one(run, whole, tmp_path):
    config = CONFIG.replace(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    run(tmp_path, config, mesh=make_mesh(config.mesh))
    found, one = ([(line["loss"], line["grad_norm"]) for line in deterministic(workdir) if "loss" in line]
                  for workdir in (tmp_path, whole[0]))
    assert len(found) == STEPS
    np.testing.assert_allclose(found, one, rtol=2e-3, atol=1e-5)


@pytest.mark.long
def test_short_responses_lose_the_share_that_they_lack(make_decoder, make_experience, monkeypatch):
    drawn = []
    collect = rollouts.collect
    monkeypatch.setattr(experiences, "collect", lambda *arguments, **options: drawn.append(
        collect(*arguments, **options)) or drawn[-1])
    policy = make_decoder(2)
    plain, least = (make_experience(CONFIG.replace(rl=dataclasses.replace(
        PPO, max_new_tokens=30, min_length=length))).measure(policy) for length in (0, 25))
    lengths_B = np.asarray(drawn[0][0].mask_BR).sum(1)
    assert plain["response_length"] == least["response_length"] and lengths_B.min() < 25, "some end early"
    assert plain["reward"] - least["reward"] == pytest.approx(np.mean(np.maximum(0, 1 - lengths_B / 25)), abs=1e-5)


def test_prompts_and_batches_that_do_not_fit_are_refused(make_experience, make_decoder, reward_model, config):
    long = "a" * 45
    with pytest.raises(ValueError, match=r"a prompt of 48 tokens and a response of up to rl.max_new_tokens=8 tokens do "
                                         r"not fit into the reference model's context of 48 tokens"):
        make_experience(CONFIG, [*WORDS, long])
    with pytest.raises(ValueError, match="there are 7 prompts, but a rollout needs rl.num_prompts=8"):
        make_experience(CONFIG, WORDS[:7])
    with pytest.raises(ValueError, match="8 x 1 responses cannot be divided into minibatches of batch_size=3"):
        make_experience(CONFIG.replace(batch_size=3))
    other = jax.eval_shape(lambda key: type(make_decoder(2))(config.replace(vocab_size=7), key=key), jax.random.key(0))
    with pytest.raises(ValueError, match="the reference model has a vocabulary of 7 tokens, but the tokenizer has"):
        make_experience(CONFIG, reference=other)
    other = jax.eval_shape(lambda key: type(reward_model)(reward_model.config.replace(vocab_size=7), key=key),
                           jax.random.key(0))
    with pytest.raises(ValueError, match="the reward model has a vocabulary of 7"):
        make_experience(CONFIG, reward=other)


def test_settings_that_cannot_be():
    for changes, message in (({"algorithm": "grpo"}, "rl.num_samples must be at least 2"),
                             ({"clip": 0.0}, "rl.clip=0.0 must be positive"), ({"epochs": 0}, "epochs=0 must be"),
                             ({"kl_coefficient": -1.0}, "rl.kl_coefficient=-1.0 must not be negative"),
                             ({"min_length": 49}, "rl.min_length=49 must be from 0 to rl.max_new_tokens=48"),
                             ({"discount": 1.5}, r"rl.discount=1.5 must be in \[0, 1\]")):
        with pytest.raises(ValueError, match=message):
            ReinforcementConfig(**changes)
