"""PPO: a policy learns from the rewards of its own answers, with a value head as the critic.

python -m experiments.ppo --model=runs/sft --workdir=runs/ppo --config.data.path=prompts.txt \
    --config.rl.reward=runs/reward
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="policy", steps=320, batch_size=32,
        rl=c.ReinforcementConfig(num_prompts=64, epochs=4, kl_coefficient=0.05, max_step_kl=0.1),
        optim=c.OptimConfig(peak_lr=3e-4, schedule="constant", warmup_steps=10, weight_decay=0.0, beta2=0.95),
        checkpoint=c.CheckpointConfig(every=80, keep=1), eval=c.EvalConfig(every=80), model=c.ModelConfig(),
        sample=c.SampleConfig(every=80, max_new_tokens=40, temperature=1.0))
