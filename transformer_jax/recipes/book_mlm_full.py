"""RoBERTa of 83.5M parameters from scratch on one book, in bfloat16; for accelerators.

python -m experiments.train --config=book_mlm_full --config.data.path=BOOK.txt --workdir=runs/book_full

The tokenizer learns at most 52,000 pieces, each of which occurs at least twice in the book. The
embedding table of the model has room for all of them. This recipe has not been measured on a GPU.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=8000, batch_size=64,
        model=presets.get("roberta-book").replace(dtype="bfloat16", unroll=6),
        data=c.DataConfig(validation_fraction=0.05,
                          tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=52_000, min_frequency=2)),
        optim=c.OptimConfig(peak_lr=4e-4, schedule="linear", end_lr=0.0, warmup_steps=500, beta2=0.98,
                            weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=1000), eval=c.EvalConfig(every=1000, batch_size=64),
        sample=c.SampleConfig(every=1000, prompt="digo que o amor é <mask>"))
