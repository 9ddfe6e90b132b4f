"""Multi30k English to French with a Transformer of 2.3M parameters.

python -m experiments.train --config=multi30k_enfr --workdir=runs/enfr \
    --config.data.path=train.en.gz,train.fr.gz --config.data.validation_path=val.en.gz,val.fr.gz
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
        steps=8000, batch_size=64,
        model=ModelConfig(family="encoder_decoder", max_len=64, num_layers=4, num_heads=4, model_dim=128, mlp_dim=256,
                          positions="sinusoidal", norm_position="post", activation="relu", scale_embeddings=True,
                          init_std=None, dropout=0.3, attention_dropout=0.0, unroll=4),
        data=DataConfig(tokenizer=TokenizerConfig(kind="bpe", vocab_size=8000)),
        loss=LossConfig(label_smoothing=0.1),
        optim=OptimConfig(peak_lr=4e-3, schedule="linear", end_lr=0.0, warmup_steps=1500, beta2=0.98, epsilon=1e-9,
                          weight_decay=1e-4),
        checkpoint=CheckpointConfig(every=400, keep=10), eval=EvalConfig(every=400),
        sample=SampleConfig(every=2000)))
