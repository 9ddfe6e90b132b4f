"""A small GPT with role tokens in its tokenizer, trained on some megabytes of text: a base for SFT.

python -m experiments.train --config=chat_base --config.data.path='novels/*.txt' --workdir=runs/base
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=600, batch_size=8,
        model=c.ModelConfig(max_len=512, num_layers=4, num_heads=4, model_dim=256, positions="rope", activation="gelu",
                            unroll=4),
        data=c.DataConfig(validation_fraction=0.02,
                          tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000, chat=True)),
        optim=c.OptimConfig(peak_lr=2e-3, warmup_steps=60),
        checkpoint=c.CheckpointConfig(every=100), eval=c.EvalConfig(every=200, batch_size=8, max_batches=8),
        sample=c.SampleConfig(every=300))
