"""Translates dates in Portuguese and English words into ISO form. It needs no file.

python -m experiments.dates
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=1500, batch_size=16,
        model=c.ModelConfig(family="encoder_decoder", max_len=64, num_layers=2, num_heads=4, model_dim=128,
                            positions="sinusoidal", activation="relu", scale_embeddings=True, init_std=None, unroll=2),
        data=c.DataConfig(generated="dates", tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=600)),
        loss=c.LossConfig(label_smoothing=0.0),
        optim=c.OptimConfig(peak_lr=2e-3, schedule="linear", end_lr=0.0, warmup_steps=200, beta2=0.98,
                            weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=500, max_batches=8),
        sample=c.SampleConfig(every=500))
