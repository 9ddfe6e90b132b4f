"""The training data of reinforcement learning: the policy's own responses, which are sampled again
every few updates."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from transformer_jax.alignment.advantages import (
    adapted_kl_coefficient,
    explained_variance,
    generalized_advantages,
    group_advantages,
    token_rewards,
    whiten,
)
from transformer_jax.alignment.rollouts import Reward, Rollout, collect
from transformer_jax.config import ExperimentConfig, ReinforcementConfig
from transformer_jax.data.conversations import AnyTokenizer
from transformer_jax.data.windows import make_batches
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel


class Experience:
    """An iterator over minibatches of rollouts, which ``transformer_jax.training.fit`` trains on.

    The training hook ``Follow`` calls ``follow`` after every update, so that a new rollout is
    sampled with the current weights when the last one is used up.

    The state of the iterator is the current rollout, the position in it, the KL coefficient and the
    position among the prompts. An interrupted run that restores this state continues, even in the
    middle of a rollout, and its result is the same to the bit.
    """

    def __init__(self, config: ExperimentConfig, prompts: Sequence[Sequence[int]],
                 held_out: Sequence[Sequence[int]] = (), *, reference: Decoder, reward: Reward,
                 tokenizer: AnyTokenizer):
        """Stores the prompts and models, and checks that they fit together.

        Args:
          config: the settings of the run, of which ``rl``, ``batch_size`` and ``seed`` are used.
          prompts: the token ids of each prompt, as ``transformer_jax.data.encode_prompt`` returns
            them.
          held_out: the token ids of the prompts that ``measure`` uses.
          reference: the reference model; the KL penalty keeps the policy close to it.
          reward: a reward model, or a function that maps the texts of the responses to one number
            per text.
          tokenizer: the tokenizer of the policy.

        Raises:
          ValueError: if a prompt leaves no room for a response, there are too few prompts, the
            batch size does not divide the number of responses in a rollout, the reference or reward
            model has too small a vocabulary or too short a context, or the run has several
            processes.
        """
        settings = config.rl
        if jax.process_count() > 1:
            raise ValueError(f"reinforcement learning supports only one process, but this run has "
                             f"{jax.process_count()}; start it with one process")
        self._prompts, self._held_out = ([list(prompt) for prompt in part] for part in (prompts, held_out))
        longest = max(map(len, self._prompts + self._held_out), default=0)
        self._prompt_len = max(longest, 1)  # one shape for the whole run
        models = {"reference": reference} | ({"reward": reward} if isinstance(reward, RewardModel) else {})
        for name, model in models.items():
            if cast(int, model.config.vocab_size) < tokenizer.vocab_size:
                raise ValueError(f"the {name} model has a vocabulary of {model.config.vocab_size} tokens, but the "
                                 f"tokenizer has {tokenizer.vocab_size}; the policy, the reference model and the "
                                 "reward model must use the same tokenizer")
            room = model.config.max_len - settings.max_new_tokens
            if longest > room:
                raise ValueError(f"a prompt of {longest} tokens and a response of up to rl.max_new_tokens="
                                 f"{settings.max_new_tokens} tokens do not fit into the {name} model's context of "
                                 f"{model.config.max_len} tokens; shorten the prompt, or reduce rl.max_new_tokens")
        if len(self._prompts) < settings.num_prompts:
            raise ValueError(f"there are {len(self._prompts)} prompts, but a rollout needs rl.num_prompts="
                             f"{settings.num_prompts}; give more prompts, or reduce rl.num_prompts")
        self._num_rows = settings.num_prompts * settings.num_samples
        if self._num_rows % config.batch_size:
            raise ValueError(f"a rollout of {settings.num_prompts} x {settings.num_samples} responses cannot be "
                             f"divided into minibatches of batch_size={config.batch_size}; choose a batch_size that "
                             f"divides {self._num_rows}")
        self._config, self._settings = config, settings
        self._reference, self._reward, self._tokenizer = reference, reward, tokenizer
        self._order = make_batches(_Indices(len(self._prompts)), batch_size=settings.num_prompts, seed=config.seed)
        self._kl_coefficient = settings.kl_coefficient
        self._num_rollouts = 0
        self._num_taken = 0  # minibatches taken from the current rollout
        self._rows: dict[str, np.ndarray] | None = None

    @property
    def _num_minibatches(self) -> int:
        """The number of minibatches that are taken from one rollout, over all epochs."""
        return self._settings.epochs * self._num_rows // self._config.batch_size

    def follow(self, policy: Decoder, metrics: dict[str, jax.Array] | None) -> dict[str, float]:
        """Samples a new rollout with the current weights if one is needed.

        A new rollout is needed if the last one is used up, or if the policy has moved further from
        it than ``rl.max_step_kl`` allows.

        Args:
          policy: the current policy; for PPO, it has a value head.
          metrics: the metrics of the last update; ``None`` before the first update.

        Returns:
          Means over the new rollout, to be logged: the reward, the KL divergence from the reference
          in nats per response, the response length in tokens, the KL coefficient, and for PPO the
          explained variance of the critic. The dict is empty if no new rollout was sampled.
        """
        limit = self._settings.max_step_kl
        if metrics is not None and limit is not None and float(metrics["step_kl"]) > limit:
            self._num_taken = self._num_minibatches
        if self._rows is not None and self._num_taken < self._num_minibatches:
            return {}
        prompts = [self._prompts[number] for number in next(self._order)["numbers"]]
        key = jax.random.fold_in(jax.random.key(self._config.seed), self._num_rollouts)
        rollout = self._collect(policy, prompts, key, self._settings.num_samples)
        rows, means = jax.device_get(_training_rows(rollout, jnp.float32(self._kl_coefficient), self._settings))
        self._rows, self._num_taken, self._num_rollouts = rows, 0, self._num_rollouts + 1
        means = {name: float(mean) for name, mean in (_means(rollout) | means).items()}
        means["kl_coefficient"] = self._kl_coefficient
        if self._settings.kl_target is not None:
            self._kl_coefficient = adapted_kl_coefficient(self._kl_coefficient, means["kl"], self._settings.kl_target)
        return means

    def measure(self, policy: Decoder) -> dict[str, float]:
        """Samples one response to each held-out prompt, and measures the responses.

        Args:
          policy: the policy to measure.

        Returns:
          The means ``reward``, ``kl`` (KL divergence from the reference, in nats per response) and
          ``response_length`` (in tokens).
        """
        rollout = self._collect(policy, self._held_out, jax.random.key(self._config.seed), 1)
        return {name: float(mean) for name, mean in _means(rollout).items()}

    def _collect(self, policy: Decoder, prompts: Sequence[Sequence[int]], key: jax.Array, num_samples: int) -> Rollout:
        """Samples responses, and subtracts a penalty from the scores of short ones."""
        rollout, _ = collect(policy, prompts, reference=self._reference, reward=self._reward,
                             tokenizer=self._tokenizer, key=key, prompt_len=self._prompt_len,
                             max_new_tokens=self._settings.max_new_tokens, num_samples=num_samples)
        if not self._settings.min_length:
            return rollout
        missing_fraction_B = jnp.maximum(0.0, 1.0 - rollout.mask_BR.sum(1) / self._settings.min_length)
        return dataclasses.replace(rollout, scores_B=rollout.scores_B - missing_fraction_B)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        rows = self._current_rows()
        epoch, place = divmod(self._num_taken * self._config.batch_size, self._num_rows)
        order = np.random.default_rng((self._config.seed, self._num_rollouts, epoch)).permutation(self._num_rows)
        self._num_taken += 1
        chosen = order[place:place + self._config.batch_size]
        return {name: values[chosen] for name, values in rows.items()}

    def get_state(self) -> dict[str, Any]:
        """Returns the position of the iterator, for a checkpoint.

        Returns:
          A dict that can be written as JSON. It stores the arrays of the current rollout as an npz
          file in base64.
        """
        file = io.BytesIO()
        np.savez_compressed(file, **cast(dict[str, Any], self._current_rows()))
        return {"order": self._order.get_state(), "kl_coefficient": self._kl_coefficient, "turn": self._num_taken,
                "num_rollouts": self._num_rollouts, "rollout": base64.b64encode(file.getvalue()).decode()}

    def _current_rows(self) -> dict[str, np.ndarray]:
        """Returns the rows of the current rollout."""
        if self._rows is None:
            raise ValueError("there is no rollout yet; call follow(policy, None) before you take the first batch")
        return self._rows

    def set_state(self, state: dict[str, Any]) -> None:
        """Continues from a stored position.

        Args:
          state: the dict that ``get_state`` returned.
        """
        self._order.set_state(state["order"])
        self._kl_coefficient, self._num_taken = state["kl_coefficient"], state["turn"]
        self._num_rollouts = state["num_rollouts"]
        with np.load(io.BytesIO(base64.b64decode(state["rollout"])), allow_pickle=False) as rows:
            self._rows = dict(rows)


class _Indices:
    """A data source of the indices 0, 1, 2 ..., from which the prompts of a rollout are chosen."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"numbers": np.asarray(indices)}


def _training_rows_unjitted(rollout: Rollout, kl_coefficient: jax.Array, settings: ReinforcementConfig,
                            ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Returns the arrays that minibatches are taken from, and metrics of the critic (for PPO)."""
    mask_BR = rollout.mask_BR
    rows = {"tokens": rollout.tokens_BT, "segment_ids": rollout.segment_ids_BT, "mask": mask_BR,
            "logprobs": rollout.logprobs_BR}
    if settings.algorithm == "grpo":
        advantages_B = group_advantages(rollout.scores_B, settings.num_samples)
        rows |= {"advantages": jnp.where(mask_BR, advantages_B[:, None], 0.0),
                 "reference_logprobs": rollout.reference_logprobs_BR,
                 "kl_coefficients": jnp.full(mask_BR.shape, kl_coefficient)}
        return rows, {}
    rewards_BR = token_rewards(rollout.scores_B, rollout.logprobs_BR, rollout.reference_logprobs_BR, mask_BR,
                               kl_coefficient)
    advantages_BR, returns_BR = generalized_advantages(
        rewards_BR, rollout.values_BR, mask_BR, discount=settings.discount, trace_decay=settings.trace_decay)
    rows |= {"advantages": whiten(advantages_BR, mask_BR), "values": rollout.values_BR, "returns": returns_BR}
    return rows, {"explained_variance": explained_variance(rollout.values_BR, returns_BR, mask_BR)}


@jax.jit
def _means(rollout: Rollout) -> dict[str, jax.Array]:
    """Returns the mean reward, KL divergence and length of the responses of a rollout."""
    kls_BR = jnp.where(rollout.mask_BR, rollout.logprobs_BR - rollout.reference_logprobs_BR, 0.0)
    return {"reward": rollout.scores_B.mean(), "kl": kls_BR.sum(1).mean(),
            "response_length": rollout.mask_BR.sum(1).mean()}


_training_rows = jax.jit(_training_rows_unjitted, static_argnums=2)
