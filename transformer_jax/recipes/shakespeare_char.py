"""nanoGPT's CPU recipe: a 0.8M character model of Shakespeare, 2,000 steps of AdamW.

python -m experiments.train --config=shakespeare_char --config.data.path=input.txt --workdir=runs/shakespeare

70 seconds on two CPU cores; validation loss 1.750 over the whole last tenth of tinyshakespeare
(nanoGPT's own initial weights, init_std=0.02, give 1.893).
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        seed=1337, steps=2000, batch_size=12,
        model=presets.get("nanogpt-char-cpu").replace(vocab_size=None, unroll=4, init_std=0.08),
        data=c.DataConfig(),
        optim=c.OptimConfig(peak_lr=1e-3, end_lr=0.1, warmup_steps=100, beta2=0.99, weight_decay=0.1, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=500, batch_size=128),
        sample=c.SampleConfig(every=500))
