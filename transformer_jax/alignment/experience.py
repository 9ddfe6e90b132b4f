"""What a policy learns from in reinforcement learning: its own responses, drawn anew every few
updates."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

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
from transformer_jax.alignment.rollout import Reward, Rollout, collect
from transformer_jax.config import ExperimentConfig, ReinforcementConfig
from transformer_jax.data.tokenizer import Tokenizer
from transformer_jax.data.windows import make_batches
from transformer_jax.models.decoder import Decoder
from transformer_jax.models.heads import RewardModel


class Experience:
    """Minibatches of rollouts, for :func:`transformer_jax.training.loop.fit`; the hook ``Follow``
    calls :meth:`follow`.

    Its state is the rollout in use, the place in it, the KL coefficient and the place among the
    prompts: with it an interrupted run goes on, also in the middle of a rollout, with the bits it
    would have had.
    """

    def __init__(self, config: ExperimentConfig, prompts: Sequence[Sequence[int]],
                 held_out: Sequence[Sequence[int]] = (), *, reference: Decoder, reward: Reward, tokenizer: Tokenizer):
        """Checks that everything fits together.

        Args:
          config: its ``rl``, ``batch_size`` and ``seed`` are read.
          prompts: token ids of each, as :func:`transformer_jax.data.conversations.encode_prompt`
            gives them.
          held_out: prompts for :meth:`measure`.
          reference: what the policy is kept near to.
          reward: a reward model, or a function from the texts of the responses to as many numbers.
          tokenizer: the policy's.

        Raises:
          ValueError: a prompt that leaves no room for a response, too few prompts, minibatches that
            do not divide a rollout, or a reference or reward model of another vocabulary or too
            short a context.
        """
        settings = config.rl
        if jax.process_count() > 1:
            raise ValueError("rollouts are drawn by one process; this run has several")
        self._prompts, self._held_out = ([list(prompt) for prompt in part] for part in (prompts, held_out))
        longest = max(map(len, self._prompts + self._held_out), default=0)
        self._prompt_len = max(longest, 1)  # one shape for the whole run
        models = {"reference": reference} | ({"reward": reward} if isinstance(reward, RewardModel) else {})
        for name, model in models.items():
            if model.config.vocab_size != tokenizer.vocab_size:
                raise ValueError(f"the {name} model has a vocabulary of {model.config.vocab_size}, the tokenizer one "
                                 f"of {tokenizer.vocab_size}; policy, reference and reward model share one tokenizer")
            room = model.config.max_len - settings.max_new_tokens
            if longest > room:
                raise ValueError(f"a prompt of {longest} tokens and a response of rl.max_new_tokens="
                                 f"{settings.max_new_tokens} do not fit the {name} model's context of "
                                 f"{model.config.max_len}; shorten the prompt, or take fewer new tokens")
        if len(self._prompts) < settings.num_prompts:
            raise ValueError(f"{len(self._prompts)} prompts do not fill a rollout of rl.num_prompts="
                             f"{settings.num_prompts}")
        self._num_rows = settings.num_prompts * settings.num_samples
        if self._num_rows % config.batch_size:
            raise ValueError(f"a rollout of {settings.num_prompts} x {settings.num_samples} responses does not divide "
                             f"into minibatches of batch_size={config.batch_size}")
        self._config, self._settings = config, settings
        self._reference, self._reward, self._tokenizer = reference, reward, tokenizer
        self._order = make_batches(_Numbers(len(self._prompts)), batch_size=settings.num_prompts, seed=config.seed)
        self._kl_coefficient = settings.kl_coefficient
        self._num_rollouts = 0
        self._turn = 0  # minibatches taken from the rollout
        self._rows: dict[str, np.ndarray] | None = None

    @property
    def _num_turns(self) -> int:
        return self._settings.epochs * self._num_rows // self._config.batch_size

    def follow(self, policy: Decoder, metrics: dict[str, jax.Array] | None) -> dict[str, float]:
        """Draws a new rollout with these weights when the last one is used up, or the policy has
        gone too far from it.

        Args:
          policy: with a value head, for PPO.
          metrics: of the last update, if there was one.

        Returns:
          Means over a new rollout: reward, KL to the reference in nats a response, response length
          ...
        """
        limit = self._settings.max_step_kl
        if metrics is not None and limit is not None and float(metrics["step_kl"]) > limit:
            self._turn = self._num_turns
        if self._rows is not None and self._turn < self._num_turns:
            return {}
        prompts = [self._prompts[number] for number in next(self._order)["numbers"]]
        key = jax.random.fold_in(jax.random.key(self._config.seed), self._num_rollouts)
        rollout = self._collect(policy, prompts, key, self._settings.num_samples)
        rows, means = jax.device_get(_learnable(rollout, jnp.float32(self._kl_coefficient), self._settings))
        self._rows, self._turn, self._num_rollouts = rows, 0, self._num_rollouts + 1
        means = {name: float(mean) for name, mean in (_means(rollout) | means).items()}
        means["kl_coefficient"] = self._kl_coefficient
        if self._settings.kl_target is not None:
            self._kl_coefficient = adapted_kl_coefficient(self._kl_coefficient, means["kl"], self._settings.kl_target)
        return means

    def measure(self, policy: Decoder) -> dict[str, float]:
        """Means over one response to each held-out prompt: reward, KL to the reference in nats a
        response, length."""
        rollout = self._collect(policy, self._held_out, jax.random.key(self._config.seed), 1)
        return {name: float(mean) for name, mean in _means(rollout).items()}

    def _collect(self, policy: Decoder, prompts: Sequence[Sequence[int]], key: jax.Array, num_samples: int) -> Rollout:
        rollout, _ = collect(policy, prompts, reference=self._reference, reward=self._reward,
                             tokenizer=self._tokenizer, key=key, prompt_len=self._prompt_len,
                             max_new_tokens=self._settings.max_new_tokens, num_samples=num_samples)
        if not self._settings.min_length:
            return rollout
        lacking_B = jnp.maximum(0.0, 1.0 - rollout.mask_BR.sum(1) / self._settings.min_length)
        return dataclasses.replace(rollout, scores_B=rollout.scores_B - lacking_B)

    def __iter__(self):
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        epoch, place = divmod(self._turn * self._config.batch_size, self._num_rows)
        order = np.random.default_rng((self._config.seed, self._num_rollouts, epoch)).permutation(self._num_rows)
        self._turn += 1
        chosen = order[place:place + self._config.batch_size]
        return {name: rows[chosen] for name, rows in self._rows.items()}

    def get_state(self) -> dict[str, Any]:
        """The position as JSON can hold it; the arrays of the rollout are an npz file in base64."""
        file = io.BytesIO()
        np.savez_compressed(file, **self._rows)
        return {"order": self._order.get_state(), "kl_coefficient": self._kl_coefficient, "turn": self._turn,
                "num_rollouts": self._num_rollouts, "rollout": base64.b64encode(file.getvalue()).decode()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from there."""
        self._order.set_state(state["order"])
        self._kl_coefficient, self._turn = state["kl_coefficient"], state["turn"]
        self._num_rollouts = state["num_rollouts"]
        with np.load(io.BytesIO(base64.b64decode(state["rollout"])), allow_pickle=False) as rows:
            self._rows = dict(rows)


class _Numbers:
    """0, 1, 2 ...: which prompts a rollout has."""

    def __init__(self, size: int):
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {"numbers": np.asarray(indices)}


def _learnable_now(rollout: Rollout, kl_coefficient: jax.Array,
                   settings: ReinforcementConfig) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The rows of the minibatches, and what is to be said of the critic."""
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
    kls_BR = jnp.where(rollout.mask_BR, rollout.logprobs_BR - rollout.reference_logprobs_BR, 0.0)
    return {"reward": rollout.scores_B.mean(), "kl": kls_BR.sum(1).mean(),
            "response_length": rollout.mask_BR.sum(1).mean()}


_learnable = jax.jit(_learnable_now, static_argnums=2)
