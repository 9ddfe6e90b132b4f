"""GPT-2 small (124M) on your own text, with a byte-level BPE of 50,257 pieces; for accelerators.

python -m experiments.train --config=gpt2_small --config.data.path='texts/*.txt' --workdir=runs/gpt2

Set ``--config.mesh.fsdp`` to shard the weights, and ``--config.optim.accumulation`` to fit the
batch.
"""

import transformer_jax.config as c
from transformer_jax import presets


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=100_000, batch_size=480,
        model=presets.get("gpt2-small").replace(vocab_size=None, dtype="bfloat16", remat="dots"),
        data=c.DataConfig(tokenizer=c.TokenizerConfig(kind="bpe", vocab_size=50_257), validation_fraction=0.005),
        optim=c.OptimConfig(peak_lr=6e-4, end_lr=0.1, warmup_steps=2000, beta2=0.95, weight_decay=0.1, clip_norm=1.0,
                            accumulation=8),
        checkpoint=c.CheckpointConfig(every=1000), eval=c.EvalConfig(every=1000, batch_size=32, max_batches=100),
        sample=c.SampleConfig(every=5000))
