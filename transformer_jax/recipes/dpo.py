"""Direct preference optimisation: a policy learns from ranked answers to prefer the better ones.

python -m experiments.dpo --model=runs/sft --workdir=runs/dpo --config.data.path=comparisons.jsonl
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="dpo", steps=200, batch_size=16, model=c.ModelConfig(dropout=0.1),
        optim=c.OptimConfig(peak_lr=1e-4, schedule="linear", end_lr=0.0, warmup_steps=20, weight_decay=0.0),
        dpo=c.PreferenceConfig(beta=0.1), checkpoint=c.CheckpointConfig(every=100, keep=1),
        eval=c.EvalConfig(every=50, batch_size=32), sample=c.SampleConfig(every=100, max_new_tokens=40))
