"""nanoGPT's GPU recipe: a 10.7M character model of Shakespeare, 5,000 steps, in bfloat16.

python -m experiments.train --config=shakespeare_gpu --config.data.path=input.txt --workdir=runs/shakespeare_gpu

nanoGPT reports a validation loss of 1.4697 after about 3 minutes on an A100. This recipe
has not been measured on a GPU.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        seed=1337, steps=5000, batch_size=64,
        model=presets.get("nanogpt-char-gpu").replace(vocab_size=None, dtype="bfloat16"),
        optim=c.OptimConfig(peak_lr=1e-3, end_lr=0.1, warmup_steps=100, beta2=0.99, weight_decay=0.1, clip_norm=1.0),
        checkpoint=c.CheckpointConfig(every=500), eval=c.EvalConfig(every=250), sample=c.SampleConfig(every=1000))
