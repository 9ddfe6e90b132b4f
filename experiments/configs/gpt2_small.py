"""GPT-2 small (124M) on your own text, with a byte-level BPE of 50,257 pieces; for accelerators.

python -m experiments.train --config=gpt2_small --config.data.path='texts/*.txt' --workdir=runs/gpt2

Set ``--config.mesh.fsdp`` to divide the weights, ``--config.optim.accumulation`` to fit the batch.
"""

from experiments.cli import overridable
from transformer_jax import presets
from transformer_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    ExperimentConfig,
    OptimConfig,
    SampleConfig,
    TokenizerConfig,
)


def get_config():
    return overridable(ExperimentConfig(
        steps=100_000, batch_size=480,
        model=presets.get("gpt2-small").replace(vocab_size=None, dtype="bfloat16", remat="dots"),
        data=DataConfig(tokenizer=TokenizerConfig(kind="bpe", vocab_size=50_257), validation_fraction=0.005),
        optim=OptimConfig(peak_lr=6e-4, end_lr=0.1, warmup_steps=2000, beta2=0.95, weight_decay=0.1, clip_norm=1.0,
                          accumulation=8),
        checkpoint=CheckpointConfig(every=1000), eval=EvalConfig(every=1000, batch_size=32, max_batches=100),
        sample=SampleConfig(every=5000)))
