"""Portuguese to English on 12,816 pairs from Tatoeba, with a small Transformer.

python -m experiments.train --config=tatoeba_pten --config.data.path=train.tsv --config.data.validation_path=val.tsv \
    --workdir=runs/pten

The files have English in column 0 and Portuguese in column 1.
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
        steps=3000, batch_size=64,
        model=ModelConfig(family="encoder_decoder", max_len=64, num_layers=4, num_heads=4, model_dim=128, mlp_dim=256,
                          positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True,
                          init_std=None, dropout=0.3, attention_dropout=0.0, unroll=4),
        data=DataConfig(source="1", target="0", tokenizer=TokenizerConfig(kind="bpe", vocab_size=4000)),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(peak_lr=4e-3, schedule="linear", end_lr=0.0, warmup_steps=500, beta2=0.98, epsilon=1e-9,
                          weight_decay=1e-4),
        checkpoint=CheckpointConfig(every=400, keep=10), eval=EvalConfig(every=400),
        sample=SampleConfig(every=2000)))
