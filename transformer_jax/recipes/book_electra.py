"""ELECTRA on one book: a discriminator finds the tokens that a small generator replaced.

python -m experiments.train --config=book_electra --config.data.path=dom_casmurro.txt --workdir=runs/electra
python -m experiments.evaluate --workdir=runs/electra

The discriminator is a post-norm encoder with learned positions, as in the published models, so that
transformers can read its export.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="replaced_tokens", steps=2000, batch_size=32,
        model=presets.get("electra-small").replace(
            vocab_size=None, max_len=128, num_layers=4, num_token_types=1, init_std=0.05, dropout=0.1, unroll=4),
        data=c.DataConfig(validation_fraction=0.05,
                          tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000, min_frequency=2)),
        optim=c.OptimConfig(peak_lr=1e-3, schedule="linear", end_lr=0.0, warmup_steps=100, beta2=0.98,
                            weight_decay=0.01, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=250, batch_size=32),
        sample=c.SampleConfig(every=500, prompt="digo que o amor é <mask>"))
