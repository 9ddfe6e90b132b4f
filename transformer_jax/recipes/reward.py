"""Ranked answers (JSONL with prompt, chosen, rejected): a policy is trained into a reward model.

python -m experiments.reward --model=runs/sft --workdir=runs/reward --config.data.path=comparisons.jsonl
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="reward", steps=400, batch_size=16, model=c.ModelConfig(dropout=0.1),
        optim=c.OptimConfig(peak_lr=1e-3, schedule="linear", end_lr=0.0, warmup_steps=20, weight_decay=0.1),
        checkpoint=c.CheckpointConfig(every=100, keep=1), eval=c.EvalConfig(every=50), sample=c.SampleConfig(every=200))
