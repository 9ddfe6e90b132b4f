"""A small GPT with role tokens in its tokenizer: a base for experiments.sft, from any text of some megabytes.

python -m experiments.train --config=chat_base --config.data.path='novels/*.txt' --workdir=runs/base
"""

from experiments.cli import overridable
from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TokenizerConfig,
)


def get_config():
    return overridable(ExperimentConfig(
        steps=600, batch_size=8,
        model=ModelConfig(max_len=512, num_layers=4, num_heads=4, model_dim=256, positions="rope", activation="gelu",
                          unroll=4),
        data=DataConfig(validation_fraction=0.02, tokenizer=TokenizerConfig(kind="bpe", vocab_size=4000, chat=True)),
        optim=OptimConfig(peak_lr=2e-3, warmup_steps=60),
        checkpoint=CheckpointConfig(every=100), eval=EvalConfig(every=200, batch_size=8, max_batches=8),
        sample=SampleConfig(every=300)))
