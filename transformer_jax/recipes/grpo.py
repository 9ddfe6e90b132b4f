"""GRPO: like ppo.py, but compares each answer with other answers to the prompt, without a critic.

python -m experiments.ppo --config=grpo --model=runs/sft --workdir=runs/grpo --config.data.path=prompts.txt \
    --config.rl.reward=runs/reward
"""

import transformer_jax.config as c
from transformer_jax.recipes import ppo


def get_config() -> c.ExperimentConfig:
    return ppo.get_config().replace(rl=c.ReinforcementConfig(
        algorithm="grpo", num_prompts=16, num_samples=8, epochs=2, kl_coefficient=0.02, max_step_kl=0.1))
