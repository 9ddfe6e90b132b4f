"""A small masked language model from scratch on one book, on a CPU.

python -m experiments.train --config=book_mlm --config.data.path=dom_casmurro.txt --workdir=runs/book
python -m experiments.evaluate --workdir=runs/book
python -m experiments.fill_mask --workdir=runs/book --text="digo que o amor é <mask>"

With RoBERTa's own recipe (post-norm, AdamW) the model predicts only token frequencies for about
600 of these steps. With pre-norm, rotary positions, QK-norm and Muon it learns more after 100.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=1000, batch_size=32,
        model=presets.get("roberta-base").replace(
            vocab_size=None, max_len=128, num_layers=4, num_heads=4, model_dim=256, norm_position="pre",
            positions="rope", use_qk_norm=True, use_embedding_norm=False, init_std=0.05, dropout=0.15, unroll=4),
        data=c.DataConfig(validation_fraction=0.05,
                          tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=4000, min_frequency=2)),
        optim=c.OptimConfig(name="muon", peak_lr=3e-3, muon_lr=0.02, schedule="linear", end_lr=0.0, warmup_steps=50,
                            beta2=0.98, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=250), eval=c.EvalConfig(every=250, batch_size=32),
        sample=c.SampleConfig(every=500, prompt="digo que o amor é <mask>"))
