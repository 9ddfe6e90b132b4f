"""Ranked answers (JSONL with prompt, chosen, rejected, or responses): a policy learns to prefer the better ones.

python -m experiments.dpo --model=runs/sft --workdir=runs/dpo --config.data.path=comparisons.jsonl
"""

from experiments.cli import overridable
from transformer_jax.config import (
    CheckpointConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    PreferenceConfig,
    SampleConfig,
)


def get_config():
    return overridable(ExperimentConfig(
        steps=200, batch_size=16, model=ModelConfig(dropout=0.1),
        optim=OptimConfig(peak_lr=1e-4, schedule="linear", end_lr=0.0, warmup_steps=20, weight_decay=0.0),
        dpo=PreferenceConfig(beta=0.1), checkpoint=CheckpointConfig(every=100, keep=1),
        eval=EvalConfig(every=50, batch_size=32), sample=SampleConfig(every=100, max_new_tokens=40)))
