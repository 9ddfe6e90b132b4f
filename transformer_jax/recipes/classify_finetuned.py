"""A trained encoder or decoder learns to classify texts (JSONL with text and label).

python -m experiments.train --config=classify_finetuned --model=runs/book --workdir=runs/reviews \
    --config.data.path=reviews.jsonl
python -m experiments.classify --workdir=runs/reviews --step=best --text="a quiet, moving film"

The model is one that this library trained, or one of Hugging Face. Texts are cut to 128 tokens. A
small model, of width 128 or so, needs a higher learning rate: --config.optim.peak_lr=1e-3.
"""

import transformer_jax.config as c


def get_config() -> c.ExperimentConfig:
    return c.ExperimentConfig(
        task="classify", steps=600, batch_size=32, model=c.ModelConfig(dropout=0.1), data=c.DataConfig(max_len=128),
        optim=c.OptimConfig(peak_lr=2e-4, schedule="linear", end_lr=0.0, warmup_steps=60, weight_decay=0.01),
        checkpoint=c.CheckpointConfig(every=200), eval=c.EvalConfig(every=100), sample=c.SampleConfig(every=200))
