"""ELECTRA on one book: a discriminator finds the tokens that a small generator replaced.

python -m experiments.train --config=book_electra --config.data.path=dom_casmurro.txt --workdir=runs/electra
python -m experiments.evaluate --workdir=runs/electra

With post-norm and learned positions, as in the published models, neither of the two models learns
more than the frequencies of the tokens in the first 500 of these steps. With pre-norm, rotary
positions and QK-norm they do; but no model of transformers has these parts together, so this one
cannot be exported. For an export, set norm_position=post, positions=learned, use_qk_norm=False and
use_embedding_norm=True, as the preset electra-small has them, and train for longer.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="replaced_tokens", steps=800, batch_size=16,
        model=presets.get("electra-small").replace(
            vocab_size=None, max_len=128, num_layers=4, norm_position="pre", positions="rope", use_qk_norm=True,
            use_embedding_norm=False, init_std=0.05, dropout=0.1, unroll=4),
        data=c.DataConfig(validation_fraction=0.05,
                          tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000, min_frequency=2)),
        optim=c.OptimConfig(name="muon", peak_lr=3e-3, muon_lr=0.02, schedule="linear", end_lr=0.0, warmup_steps=50,
                            beta2=0.98, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=250), eval=c.EvalConfig(every=250, batch_size=32),
        sample=c.SampleConfig(every=500, prompt="digo que o amor é <mask>"))
