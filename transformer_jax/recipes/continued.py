"""Continues the training of a model, from this library or from Hugging Face, on new plain text.

python -m experiments.train --config=continued --model=openai-community/gpt2 --workdir=runs/more \
    --config.data.path=FILE

A decoder learns to predict the next token, an encoder masked tokens. Rows have 256 tokens, or fewer
if the model can read fewer; --config.data.max_len sets another length.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        steps=1000, batch_size=8, data=c.DataConfig(max_len=256),
        optim=c.OptimConfig(peak_lr=5e-5, end_lr=0.1, warmup_steps=50, beta2=0.95, weight_decay=0.1),
        checkpoint=c.CheckpointConfig(every=200), eval=c.EvalConfig(every=100, batch_size=16))
