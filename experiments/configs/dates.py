"""Dates written in words, Portuguese and English, into ISO form: an encoder-decoder that needs no file.

python -m experiments.dates
"""

from experiments.cli import overridable
from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    SampleConfig,
    TokenizerConfig,
)


def get_config():
    return overridable(ExperimentConfig(
        steps=1500, batch_size=16,
        model=ModelConfig(family="encoder_decoder", max_len=64, num_layers=2, num_heads=4, model_dim=128,
                          positions="sinusoidal", activation="relu", scale_embeddings=True, init_std=None, unroll=2),
        data=DataConfig(generated="dates", tokenizer=TokenizerConfig(kind="bpe", vocab_size=600)),
        loss=LossConfig(label_smoothing=0.0),
        optim=OptimConfig(peak_lr=2e-3, schedule="linear", end_lr=0.0, warmup_steps=200, beta2=0.98, weight_decay=0.01),
        checkpoint=CheckpointConfig(every=500), eval=EvalConfig(every=500, max_batches=8),
        sample=SampleConfig(every=500)))
