"""WMT14 English to German in the base setting of "Attention Is All You Need"; for TPU pods.

python -m experiments.train --config=wmt14_ende --workdir=runs/wmt14

Trains on the TFDS set (extra ``tfds``), about 4.5M pairs, 100,000 steps of about 25,000 tokens a
side. Vaswani et al. (2017) report BLEU 27.3 after 12 hours on 8 P100s. This recipe
was checked only by a dry run: shapes, memory, and reading a substitute data set.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=100_000, batch_size=128,
        model=presets.get("transformer-base").replace(vocab_size=None, max_len=256, dtype="bfloat16"),
        data=c.DataConfig(tfds="wmt14_translate/de-en", source="en", target="de",
                          tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=37_000)),
        loss=c.LossConfig(label_smoothing=0.1),
        optim=c.OptimConfig(peak_lr=7e-4, schedule="noam", warmup_steps=4000, beta2=0.98, epsilon=1e-9,
                            weight_decay=0.0, clip_norm=None),
        checkpoint=c.CheckpointConfig(every=1500, keep=5), eval=c.EvalConfig(every=5000, max_batches=50))
