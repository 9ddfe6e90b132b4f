"""A base model learns to follow instructions (JSON with instruction, input, output).

python -m experiments.sft --config=sft_instructions --model=runs/base --workdir=runs/sft \
    --config.data.path=instruction-data.json [--config.lora.rank=8 --config.optim.peak_lr=3e-3]
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="sft", steps=200, batch_size=4, model=c.ModelConfig(dropout=0.1),
        data=c.DataConfig(validation_fraction=0.1),
        optim=c.OptimConfig(peak_lr=1e-3, warmup_steps=20, weight_decay=0.1),
        checkpoint=c.CheckpointConfig(every=100, keep=1), eval=c.EvalConfig(every=10, batch_size=8),
        sample=c.SampleConfig(every=100, max_new_tokens=60, temperature=0.0))
