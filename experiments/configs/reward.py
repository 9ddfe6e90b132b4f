"""Ranked answers (JSONL with prompt, chosen, rejected, or responses): a policy becomes a reward model.

python -m experiments.reward --model=runs/sft --workdir=runs/reward --config.data.path=comparisons.jsonl
"""

from experiments.cli import overridable
from transformer_jax.config import (
    CheckpointConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
)


def get_config():
    return overridable(ExperimentConfig(
        steps=400, batch_size=16, model=ModelConfig(dropout=0.1),
        optim=OptimConfig(peak_lr=1e-3, schedule="linear", end_lr=0.0, warmup_steps=20, weight_decay=0.1),
        checkpoint=CheckpointConfig(every=100, keep=1), eval=EvalConfig(every=50), sample=SampleConfig(every=200)))
