"""A small RoBERTa from scratch on one book, on a CPU.

python -m experiments.train --config=book_mlm --config.data.path=dom_casmurro.txt --workdir=runs/book
python -m experiments.evaluate --workdir=runs/book
"""

from experiments.cli import overridable
from transformer_jax import presets
from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    OptimConfig,
    SampleConfig,
    TokenizerConfig,
)


def get_config():
    return overridable(ExperimentConfig(
        steps=1500, batch_size=32,
        model=presets.get("roberta-base").replace(vocab_size=None, max_len=128, num_layers=4, num_heads=4,
                                                  model_dim=256, unroll=4),
        data=DataConfig(validation_fraction=0.05,
                        tokenizer=TokenizerConfig(kind="bpe", vocab_size=4000, min_frequency=2)),
        optim=OptimConfig(peak_lr=1e-3, schedule="linear", end_lr=0.0, warmup_steps=200, beta2=0.98, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=500), eval=EvalConfig(every=250, batch_size=32),
        sample=SampleConfig(every=500, prompt="digo que o amor é <mask>")))
